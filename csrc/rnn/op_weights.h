// The gradients of weights [weights]: sums over tokens, by torch's matrix products or by our own in a fixed order.
#pragma once
#include "rnn/op_call.h"

namespace seqkern::rnn {

inline void sum_on_cpu(const Tensor&, const SumParams& p) {
  cpu_kernels().sum(p);
}

// What the backward leaves of every token.
struct OfTokens {
  Tensor dx;                  // (B, L, H, G, P)
  MaybeTensor du_last = {};   // (B, L, H, P)
  MaybeTensor operand = {};   // (B, L, H, Q)
  MaybeTensor dh_total = {};  // (B, L, H, Q)
  MaybeTensor m = {};         // (B, L, H, P)
};

// The kernel that adds in a fixed order; nullptr: torch's products.
using FixedOrder = void (*)(const Tensor& beside, const SumParams&);

// The sums of one call.
struct Sums {
  const Inputs& in;
  FixedOrder fixed_order;
  Checker check{"rnn"};

  // out (H, M, N) = sums over tokens of left (T, H, M) right (T, H, N)^T; nullopt: of left, and N = 1. The rows of
  // `out` are a part of those of a contiguous tensor.
  void add(const Tensor& left, const MaybeTensor& right, Tensor out) const {
    if (fixed_order) return add_in_order(left, right, out);
    // The batched product of a CPU takes heads apart; of one head, and in bf16, it is many times slower.
    const bool by_head = !left.is_cuda() && (in.heads == 1 || size_of(in.x.dtype) == 2);
    if (right && !by_head) {
      const auto heads_first = [](const Tensor& t) { return torch::stable::transpose(t, 0, 1); };  // (H, T, M)
      const Tensor transposed = torch::stable::transpose(heads_first(left), 1, 2);
      torch::stable::copy_(out, torch::stable::matmul(transposed, heads_first(*right)));
    } else if (right) {
      for (int64_t h = 0; h < in.heads; ++h) {
        const Tensor transposed = torch::stable::transpose(torch::stable::select(left, 1, h), 0, 1);
        Tensor of_head = torch::stable::select(out, 0, h);
        torch::stable::copy_(of_head, torch::stable::matmul(transposed, torch::stable::select(*right, 1, h)));
      }
    } else {
      const int64_t tokens[] = {0};
      torch::stable::copy_(out, torch::stable::unsqueeze(torch::stable::sum(left, tokens), 2));
    }
  }

 private:
  void add_in_order(const Tensor& left, const MaybeTensor& right, const Tensor& out) const {
    const auto side = [&](const Tensor& t) {
      return SumParams::Side{t.data_ptr(), check.floating("a gradient", t), t.stride(0), t.stride(1)};
    };
    Tensor one = zeros(left, {1}, left.scalar_type());
    torch::stable::fill_(one, 1);
    const SumParams::Side ones = {one.data_ptr(), in.x.dtype, 0, 0};
    fixed_order(left, {.tokens = left.size(0),
                       .heads = in.heads,
                       .rows = left.size(2),
                       .columns = right ? right->size(2) : 1,
                       .accumulator = in.accumulator,
                       .left = side(left),
                       .right = right ? side(*right) : ones,
                       .out = array(check, "a gradient", out),
                       .out_head = out.stride(0)});
  }
};

// dR, and of those given dbias and dproj.
inline void append_weights(std::vector<Tensor>& grads, const Weights& weights, const OfTokens& of, const Inputs& in,
                           FixedOrder fixed_order) {
  const int64_t H = in.heads, G = in.sizes().gates, P = in.units, Q = in.outputs;
  const int64_t shared = of.du_last ? G - 1 : G;  // gates in which du is dx
  const Sums sums{in, fixed_order};
  Tensor du = rows_of_tokens(of.dx, {H, G * P});
  const MaybeTensor du_last = of.du_last ? MaybeTensor(rows_of_tokens(*of.du_last, {H, P})) : std::nullopt;
  // (H, G P, N), of du and the other side.
  const auto of_gates = [&](const MaybeTensor& right, int64_t N, const Tensor& like) {
    Tensor out = empty(du, {H, G * P, N}, like.scalar_type());
    sums.add(torch::stable::narrow(du, 2, 0, shared * P), right, torch::stable::narrow(out, 1, 0, shared * P));
    if (du_last) sums.add(*du_last, right, torch::stable::narrow(out, 1, shared * P, P));
    return out;
  };
  grads.push_back(torch::stable::view(of_gates(rows_of_tokens(*of.operand, {H, Q}), Q, weights.R), {H, G, P, Q}));
  if (weights.bias) grads.push_back(torch::stable::view(of_gates(std::nullopt, 1, *weights.bias), {H, G, P}));
  if (weights.proj) {
    grads.push_back(empty(du, {H, Q, P}, weights.proj->scalar_type()));
    sums.add(rows_of_tokens(*of.dh_total, {H, Q}), rows_of_tokens(*of.m, {H, P}), grads.back());
  }
}

}  // namespace seqkern::rnn
