// Numbers that remember what they were made of: gradients by the chain rule alone, for references.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <vector>

namespace seqkern::naive {

struct Number {
  struct Term {
    int64_t node;
    double by;  // partial derivative
  };

  double value = 0;
  int64_t node = -1;  // on the tape, -1: a constant

  Number(double constant = 0) : value(constant) {}
  // What reaches its terms of its gradient is clamped to +-limit.
  Number(double made, std::initializer_list<Term> of, double limit = INFINITY) : value(made) {
    for (const Term& term : of) add(term);
    close(limit);
  }
  static Number leaf(double value) { return {value, {}}; }

  static Number dot(const std::vector<Number>& a, const std::vector<Number>& b) {
    Number sum;
    for (size_t i = 0; i < a.size(); ++i) {
      sum.value += a[i].value * b[i].value;
      add({a[i].node, b[i].value}), add({b[i].node, a[i].value});
    }
    sum.close(INFINITY);
    return sum;
  }

  static void clear() { terms_.clear(), nodes_.clear(); }
  // Zeros: to be set to the weights of a sum of numbers, of which gradients() then are.
  static std::vector<double> seeds() { return std::vector<double>(nodes_.size()); }
  static std::vector<double> gradients(std::vector<double> of) {
    for (size_t i = nodes_.size(); i-- > 0;) {
      const double passed = std::clamp(of[i], -nodes_[i].limit, nodes_[i].limit);
      for (size_t k = i > 0 ? nodes_[i - 1].end : 0; k < nodes_[i].end; ++k)
        of[terms_[k].node] += terms_[k].by * passed;
    }
    return of;
  }

 private:
  struct Node {
    size_t end;  // of its terms; they begin where those of the node before end
    double limit;
  };
  static inline std::vector<Term> terms_;
  static inline std::vector<Node> nodes_;

  static void add(const Term& term) {
    if (term.node >= 0) terms_.push_back(term);
  }
  void close(double limit) {
    node = static_cast<int64_t>(nodes_.size());
    nodes_.push_back({terms_.size(), limit});
  }
};
using Numbers = std::vector<Number>;

inline Number operator+(Number a, Number b) {
  return {a.value + b.value, {{a.node, 1}, {b.node, 1}}};
}
inline Number operator-(Number a, Number b) {
  return {a.value - b.value, {{a.node, 1}, {b.node, -1}}};
}
inline Number operator*(Number a, Number b) {
  return {a.value * b.value, {{a.node, b.value}, {b.node, a.value}}};
}
inline Number operator/(Number a, Number b) {
  return {a.value / b.value, {{a.node, 1 / b.value}, {b.node, -a.value / (b.value * b.value)}}};
}
inline Number exp(Number a) {
  const double y = std::exp(a.value);
  return {y, {{a.node, y}}};
}
inline Number log(Number a) {
  return {std::log(a.value), {{a.node, 1 / a.value}}};
}
inline Number tanh(Number a) {
  const double y = std::tanh(a.value);
  return {y, {{a.node, 1 - y * y}}};
}
inline Number sigmoid(Number a) {
  const double y = 1 / (1 + std::exp(-a.value));
  return {y, {{a.node, y * (1 - y)}}};
}
inline Number log_sigmoid(Number a) {
  const double y = a.value < 0 ? a.value - std::log1p(std::exp(a.value)) : -std::log1p(std::exp(-a.value));
  return {y, {{a.node, 1 / (1 + std::exp(a.value))}}};
}
inline Number relu(Number a) {
  return {a.value < 0 ? 0 : a.value, {{a.node, a.value > 0 ? 1.0 : 0.0}}};
}
inline Number larger(Number a, Number b) {
  return a.value > b.value ? a : b;
}

}  // namespace seqkern::naive
