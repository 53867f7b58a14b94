// Runs every CUDA kernel of rnn in the emulator against the textbook's equations in fp64, differentiated by the
// machine; without torch, so that sanitizers see only our code. Exit status 1 and a line per case where they differ.
//
//   rnn [SEED [EVERY]]     runs each EVERY-th case; SEED draws what the list of cases leaves open
//
// EVERY should have no factor in common with 2, 3, 5 and 7, the lengths of the lists: then it reaches all their
// entries.
#include <cstdlib>
#include <random>

#include "buffer.h"
#include "common/random.h"
#include "rnn/params.h"
#include "rnn/stepwise.h"
#include "rnn/tile.h"
#include "sequences.h"
#include "tape.h"

namespace {

using namespace seqkern;
using namespace seqkern::rnn;
using cuda::Path;
using naive::Batch;
using naive::Buffer;
using naive::Number;
using naive::Numbers;
using naive::Packing;
using naive::passes;
using naive::Sequence;
using naive::Wanted;

// The numbers c that kernels carry for a unit, and those of the papers: sLSTM's (y, l) and (c, n, m).
Numbers published(Cell cell, const Numbers& c) {
  return cell == Cell::kSlstm ? Numbers{c[0], 1, c[1]} : c;
}
Numbers carried(Cell cell, const Numbers& c) {
  if (cell != Cell::kSlstm) return c;
  if (c[1].value == 0) return {0, -INFINITY};
  return {c[0] / c[1], c[2] + log(c[1])};
}
Numbers empty(Cell cell) {
  return cell == Cell::kSlstm ? Numbers{0, 0, -INFINITY} : Numbers(sizes_of(cell).carried);
}

// To a type, and as if nothing were lost in the derivative.
Number rounded(Number a, DType dtype) {
  Buffer one(dtype, 1);
  one.set(0, a.value);
  return {one[0], {{a.node, 1}}};
}

// [cell] of one unit, as the papers have it: m_t; c becomes that of t. u is kept for the backward in the type `kept`.
Number next(Cell cell, const Numbers& x, const Numbers& u, Number h, Numbers& c, DType kept) {
  switch (cell) {
    case Cell::kLstm: {
      const Number i = sigmoid(x[0] + u[0]), f = sigmoid(x[1] + u[1]), g = tanh(x[2] + u[2]), o = sigmoid(x[3] + u[3]);
      c[0] = f * c[0] + i * g;
      return o * tanh(c[0]);
    }
    case Cell::kGru: {
      const Number r = sigmoid(x[0] + u[0]), z = sigmoid(x[1] + u[1]), n = tanh(x[2] + r * u[2]);
      return (1 - z) * n + z * h;
    }
    case Cell::kSlstm: {
      const Number i = x[0] + u[0], f = log_sigmoid(x[1] + u[1]) + c[2], z = tanh(x[2] + u[2]), m = larger(f, i);
      const Number keep = exp(f - m), add = exp(i - m);
      c = {keep * c[0] + add * z, keep * c[1] + add, m};
      return sigmoid(x[3] + u[3]) * c[0] / c[1];
    }
    case Cell::kElmanTanh:
      return tanh(x[0] + u[0]);
    case Cell::kElmanRelu: {
      const Number sum = x[0] + u[0];
      const bool passes = x[0].value + rounded(u[0], kept).value > 0;
      return {std::max(sum.value, 0.0), {{sum.node, passes ? 1.0 : 0.0}}};
    }
  }
  return {};
}

struct Case {
  Path path;
  Cell cell;
  DType dtype;            // of x and h; weights and states have this one or another
  int64_t B, L, H, P, Q;  // Q < 0: no proj
  Packing packing;
  bool bias, states, reset, reverse, poison, training, weights;  // weights: what their gradients are made of
  double zoneout, recurrent_dropout, grad_clip;

  int64_t outputs() const { return Q < 0 ? P : Q; }
  std::string text() const {
    char line[256];
    std::snprintf(line, sizeof line,
                  "%s %s %s B=%ld L=%ld H=%ld P=%ld Q=%ld %s%s%s%s%s%s zoneout=%g%s dropout=%g clip=%g",
                  path == Path::kFused ? "fused" : "stepwise", sizes_of(cell).name, naive::text(dtype), B, L, H, P, Q,
                  naive::text(packing), bias ? " bias" : "", states ? " states" : "", reset ? " reset" : "",
                  poison ? " poison" : "", reverse ? " reverse" : "", zoneout, training ? " training" : "",
                  recurrent_dropout, grad_clip);
    return line;
  }
};

// A (B, L, H, G, P) tensor, or (G, B, L, H, P), or with time before batch. Its first element may be one that no vector
// begins with.
struct Gates : Buffer {
  int64_t first, b, l, h, g;

  Gates(DType dtype, const Case& c, int64_t G, int64_t P, bool time_major, bool gates_first = false, int64_t first = 0)
      : Buffer(dtype, c.B * c.L * c.H * G * P + first), first(first) {
    h = gates_first ? P : G * P, g = gates_first ? c.B * c.L * c.H * P : P;
    l = c.H * h, b = c.L * l;
    if (time_major) b = c.H * h, l = c.B * b;
  }
  int64_t place(int64_t b_, int64_t t, int64_t h_, int64_t g_, int64_t p = 0) const {
    return first + b_ * b + t * l + h_ * h + g_ * g + p;
  }
  void* begin() const { return bytes.get() + first * size_of(array.dtype); }
  GateData gates() const { return {begin(), array.dtype, b, l, h, g}; }
  TokenData tokens() const { return {begin(), array.dtype, b, l, h}; }
  CarriedData carried() const { return {begin(), array.dtype, g, b, l, h}; }
};

// Everything that a call reads, and its results.
struct Data {
  Batch batch;
  Gates x, h, u, c, dh, dx, du_last, operand, dh_total, m;
  Buffer R, bias, proj, initial_h, initial_c, final_h, final_c, dfinal_h, dfinal_c, dinitial_h, dinitial_c;
  std::unique_ptr<bool[]> reset;
  int64_t seed;

  Data(const Case& c, bool time_major, std::mt19937& random)
      : Data(c, sizes_of(c.cell), accumulator(c.dtype), time_major, random) {}

  Inputs inputs(const Case& c) const {
    Inputs in{};
    in.sequences = batch.sequences, in.heads = c.H, in.units = c.P, in.outputs = c.outputs(), in.cell = c.cell;
    in.accumulator = accumulator(c.dtype), in.x = x.gates(), in.R = R.array;
    if (c.bias) in.bias = bias.array;
    if (c.Q >= 0) in.proj = proj.array;
    if (c.states) in.initial_h = initial_h.array, in.initial_c = initial_c.array;
    if (c.reset) in.reset = reset.get();
    in.zoneout = c.zoneout, in.recurrent_dropout = c.recurrent_dropout, in.training = c.training, in.seed = &seed;
    return in;
  }

  FwdParams forward(const Case& c) const {
    FwdParams p{};
    static_cast<Inputs&>(p) = inputs(c);
    p.h = h.tokens(), p.u = u.gates(), p.c = this->c.carried();
    if (c.states) p.final_h = final_h.array, p.final_c = final_c.array;
    return p;
  }

  BwdParams backward(const Case& c) const {
    const CellSizes sizes = sizes_of(c.cell);
    BwdParams p{};
    static_cast<Inputs&>(p) = inputs(c);
    p.grad_clip = c.grad_clip, p.dh = dh.tokens(), p.h = h.tokens(), p.u = u.gates(), p.c = this->c.carried();
    p.dx = dx.gates();
    if (c.weights) p.operand = operand.tokens();
    if (sizes.two_sides) p.du_last = du_last.tokens();
    if (c.weights && c.Q >= 0) p.dh_total = dh_total.tokens(), p.m = m.tokens();
    if (c.states) {
      p.dfinal_h = dfinal_h.array, p.dfinal_c = dfinal_c.array;
      p.dinitial_h = dinitial_h.array, p.dinitial_c = dinitial_c.array;
    }
    return p;
  }

 private:
  Data(const Case& c, const CellSizes& sizes, DType type, bool time_major, std::mt19937& random)
      : batch(c.packing, c.B, c.L, c.reverse, random),
        x(c.dtype, c, sizes.gates, c.P, time_major, random() % 4 == 0, random() % 2),
        h(c.dtype, c, 1, c.outputs(), time_major),
        u(c.dtype, c, sizes.gates, c.P, time_major),
        c(type, c, sizes.carried, c.P, time_major, true),
        dh(c.dtype, c, 1, c.outputs(), random() % 2, false, random() % 2),
        dx(c.dtype, c, sizes.gates, c.P, time_major),
        du_last(c.dtype, c, 1, c.P, time_major),
        operand(c.dtype, c, 1, c.outputs(), time_major),
        dh_total(c.dtype, c, 1, c.outputs(), time_major),
        m(c.dtype, c, 1, c.P, time_major),
        R(some_dtype(c, random), c.H * sizes.gates * c.P * c.outputs()),
        bias(some_dtype(c, random), c.H * sizes.gates * c.P),
        proj(some_dtype(c, random), c.H * c.outputs() * c.P),
        initial_h(some_dtype(c, random), batch.sequences.count * c.H * c.outputs()),
        initial_c(some_dtype(c, random), sizes.carried * batch.sequences.count * c.H * c.P),
        final_h(type, initial_h.size),
        final_c(type, initial_c.size),
        dfinal_h(type, initial_h.size),
        dfinal_c(type, initial_c.size),
        dinitial_h(type, initial_h.size),
        dinitial_c(type, initial_c.size),
        reset(new bool[c.B * c.L]),
        seed(static_cast<int64_t>(random()) << 32 | random()) {
    std::normal_distribution<double> normal;
    const auto draw = [&](int64_t) { return normal(random); };
    // Such that a gradient neither grows nor dies over a few tokens.
    const auto weight = [&](int64_t) { return normal(random) / std::sqrt(static_cast<double>(c.P)); };
    for (Buffer* of_1 :
         {static_cast<Buffer*>(&x), static_cast<Buffer*>(&dh), &bias, &initial_h, &initial_c, &dfinal_h, &dfinal_c})
      of_1->fill(draw);
    R.fill(weight), proj.fill(weight);
    for (Buffer* zero : {&dinitial_h, &dinitial_c}) zero->fill([](int64_t) { return 0; });  // as the operator does it
    for (int64_t i = 0; i < c.B * c.L; ++i) reset[i] = c.reset && random() % 4 == 0;
    if (c.poison) poison(c);
  }

  // Nothing passes a reset, NaN neither: of the first head, in the token or state before it.
  void poison(const Case& c) {
    for (const Sequence& s : batch.all) {
      for (size_t i = 0; i < s.tokens.size(); ++i) {
        if (!reset[s.b * c.L + s.tokens[i]]) continue;
        if (i > 0)
          x.set(x.place(s.b, s.tokens[i - 1], 0, 0), NAN);
        else
          initial_h.set(s.initial * c.H * c.outputs(), NAN);
      }
    }
  }

  static DType some_dtype(const Case& c, std::mt19937& random) {
    const DType all[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, c.dtype, c.dtype, c.dtype, c.dtype};
    return c.dtype == DType::kFloat64 ? c.dtype : all[random() % 7];
  }
};

struct WantedData {
  Wanted h, final_h, final_c, u, c, dx, du_last, operand, dh_total, m, dinitial_h, dinitial_c, dR, dbias, dproj;

  explicit WantedData(const Data& d)
      : h(d.h),
        final_h(d.final_h),
        final_c(d.final_c),
        u(d.u),
        c(d.c),
        dx(d.dx),
        du_last(d.du_last),
        operand(d.operand),
        dh_total(d.dh_total),
        m(d.m),
        dinitial_h(d.dinitial_h),
        dinitial_c(d.dinitial_c),
        dR(d.R),
        dbias(d.bias),
        dproj(d.proj) {}

  // What one sequence and head give.
  void add(const Case& c, const Data& d, const Sequence& s, int64_t head) {
    const CellSizes sizes = sizes_of(c.cell);
    const int64_t G = sizes.gates, C = sizes.carried, P = c.P, Q = c.outputs(), N = d.batch.sequences.count;
    const bool drops = c.training && c.recurrent_dropout > 0, skips = c.training && c.zoneout > 0;
    const auto word = [&](int64_t first, int64_t q, RandomKind kind) {
      const int64_t e = head * Q + q;
      return philox(d.seed, first, static_cast<uint32_t>(e / 4), kind).word[e % 4];
    };
    const auto leaves = [](int64_t count, auto&& value) {
      Numbers all;
      for (int64_t i = 0; i < count; ++i) all.push_back(Number::leaf(value(i)));
      return all;
    };
    const auto row = [](const Numbers& matrix, int64_t i, int64_t width) {
      return Numbers(matrix.begin() + i * width, matrix.begin() + (i + 1) * width);
    };
    const auto weight = [&](const Buffer& w, int64_t i) { return rounded(w[i], c.dtype).value; };

    Number::clear();
    const Numbers R = leaves(G * P * Q, [&](int64_t i) { return weight(d.R, head * G * P * Q + i); });
    const Numbers bias = leaves(c.bias ? G * P : 0, [&](int64_t i) { return d.bias[head * G * P + i]; });
    const Numbers proj = leaves(c.Q < 0 ? 0 : Q * P, [&](int64_t i) { return weight(d.proj, head * Q * P + i); });
    const auto of_h = [&](int64_t n, int64_t q) { return (n * c.H + head) * Q + q; };
    const auto of_c = [&](int64_t k, int64_t n, int64_t p) { return ((k * N + n) * c.H + head) * P + p; };
    const Numbers initial_h = leaves(c.states ? Q : 0, [&](int64_t q) { return d.initial_h[of_h(s.initial, q)]; });
    const Numbers initial_c =
        leaves(c.states ? C * P : 0, [&](int64_t i) { return d.initial_c[of_c(i / P, s.initial, i % P)]; });

    Numbers h = c.states ? initial_h : Numbers(Q);
    std::vector<Numbers> state(P, empty(c.cell));  // c of every unit
    for (int64_t p = 0; c.states && p < P; ++p) {
      Numbers of_unit;
      for (int64_t k = 0; k < C; ++k) of_unit.push_back(initial_c[k * P + p]);
      state[p] = published(c.cell, of_unit);
    }
    struct Token {
      Numbers x, u, y, h;
    };
    std::vector<Token> tokens;
    for (const int64_t t : s.tokens) {
      if (c.reset && d.reset[s.b * c.L + t]) h = Numbers(Q), state.assign(P, empty(c.cell));
      Numbers before, read, units;
      for (int64_t q = 0; q < Q; ++q) {
        before.push_back({h[q].value, {{h[q].node, 1}}, c.grad_clip < 0 ? INFINITY : c.grad_clip});
        const bool dropped =
            drops && happens(word(s.initial, q, kDropoutWords), static_cast<float>(c.recurrent_dropout));
        const Number scaled = drops ? before[q] / (1 - c.recurrent_dropout) : before[q];
        read.push_back(dropped ? Number(0) : rounded(scaled, c.dtype));
        operand[d.operand.place(s.b, t, head, 0, q)] = read[q].value;
      }
      Token token{leaves(G * P, [&](int64_t i) { return d.x[d.x.place(s.b, t, head, i / P, i % P)]; }), {}, {}, {}};
      for (int64_t i = 0; i < G * P; ++i) {
        token.u.push_back(Number::dot(row(R, i, Q), read) + (c.bias ? bias[i] : 0));
        u[d.u.place(s.b, t, head, i / P, i % P)] = token.u[i].value;
      }
      for (int64_t p = 0; p < P; ++p) {
        Numbers x, u;
        for (int64_t g = 0; g < G; ++g) x.push_back(token.x[g * P + p]), u.push_back(token.u[g * P + p]);
        units.push_back(next(c.cell, x, u, sizes.reads_h ? before[p] : 0, state[p], c.dtype));
        m[d.m.place(s.b, t, head, 0, p)] = units[p].value;
        const Numbers kept = carried(c.cell, state[p]);
        for (int64_t k = 0; k < C; ++k) this->c[d.c.place(s.b, t, head, k, p)] = kept[k].value;
        if (c.Q >= 0) units[p] = rounded(units[p], c.dtype);
      }
      for (int64_t q = 0; q < Q; ++q) {
        token.y.push_back(c.Q < 0 ? units[q] : Number::dot(row(proj, q, P), units));
        if (skips) {
          const bool stays = happens(word(s.b * c.L + t, q, kZoneoutWords), static_cast<float>(c.zoneout));
          h[q] = stays ? before[q] : token.y[q];
        } else {
          h[q] = c.zoneout * before[q] + (1 - c.zoneout) * token.y[q];
        }
        this->h[d.h.place(s.b, t, head, 0, q)] = h[q].value;
      }
      token.h = h;
      tokens.push_back(token);
    }

    std::vector<Numbers> last;
    for (int64_t p = 0; p < P; ++p) last.push_back(carried(c.cell, state[p]));
    std::vector<double> seeds = Number::seeds();
    const auto seed = [&](const Number& of, double by) {
      if (of.node >= 0) seeds[of.node] += by;
    };
    for (int64_t q = 0; c.states && q < Q; ++q) {
      final_h[of_h(s.final, q)] = h[q].value;
      seed(h[q], d.dfinal_h[of_h(s.final, q)]);
    }
    for (int64_t i = 0; c.states && i < C * P; ++i) {
      final_c[of_c(i / P, s.final, i % P)] = last[i % P][i / P].value;
      seed(last[i % P][i / P], d.dfinal_c[of_c(i / P, s.final, i % P)]);
    }
    for (size_t i = 0; i < tokens.size(); ++i) {
      for (int64_t q = 0; q < Q; ++q) seed(tokens[i].h[q], d.dh[d.dh.place(s.b, s.tokens[i], head, 0, q)]);
    }
    const std::vector<double> gradient = Number::gradients(seeds);
    const auto of = [&](const Number& number) { return gradient[number.node]; };
    for (size_t i = 0; i < tokens.size(); ++i) {
      const int64_t t = s.tokens[i];
      for (int64_t k = 0; k < G * P; ++k) dx[d.dx.place(s.b, t, head, k / P, k % P)] = of(tokens[i].x[k]);
      for (int64_t p = 0; p < P; ++p) du_last[d.du_last.place(s.b, t, head, 0, p)] = of(tokens[i].u[(G - 1) * P + p]);
      for (int64_t q = 0; q < Q; ++q) dh_total[d.dh_total.place(s.b, t, head, 0, q)] = of(tokens[i].y[q]);
    }
    for (size_t i = 0; i < R.size(); ++i) dR.add(head * G * P * Q + i, of(R[i]));
    for (size_t i = 0; i < bias.size(); ++i) dbias.add(head * G * P + i, of(bias[i]));
    for (size_t i = 0; i < proj.size(); ++i) dproj.add(head * Q * P + i, of(proj[i]));
    for (size_t q = 0; q < initial_h.size(); ++q) dinitial_h[of_h(s.initial, q)] = of(initial_h[q]);
    for (size_t i = 0; i < initial_c.size(); ++i) dinitial_c[of_c(i / P, s.initial, i % P)] = of(initial_c[i]);
  }
};

// The stepwise path with its own products.
void run_stepwise(const FwdParams& given, DType product_dtype) {
  FwdParams p = given;
  const int64_t rows = p.heads * p.sequences.batch, GP = p.sizes().gates * p.units;
  const Buffer workspace = naive::workspace(cuda::stepwise_workspace_bytes(p));
  const Buffer operand(p.x.dtype, rows * p.outputs), product(product_dtype, rows * GP), m(p.x.dtype, rows * p.units),
      projected(product_dtype, rows * p.outputs);
  p.workspace = workspace.array.data;
  const cuda::FwdWork work{operand.array, product.array, m.array, projected.array};
  cuda::begin(p, work, {});
  for (int64_t tau = 0; tau < p.sequences.length; ++tau) {
    cuda::multiply(cuda::recur_product(p, work), {});
    cuda::forward_step(p, work, tau, {});
    if (!p.proj) continue;
    cuda::multiply(cuda::project_product(p, work), {});
    cuda::project_step(p, work, tau, {});
  }
}
void run_stepwise(const BwdParams& given, DType product_dtype) {
  BwdParams p = given;
  const int64_t rows = p.heads * p.sequences.batch, GP = p.sizes().gates * p.units;
  const Buffer workspace = naive::workspace(cuda::stepwise_workspace_bytes(p));
  const Buffer du(p.x.dtype, rows * GP), returned(product_dtype, rows * p.outputs), dh(p.x.dtype, rows * p.outputs),
      dm(product_dtype, rows * p.units);
  p.workspace = workspace.array.data;
  const cuda::BwdWork work{du.array, returned.array, dh.array, dm.array};
  cuda::begin(p, work, {});
  for (int64_t tau = p.sequences.length - 1; tau >= 0; --tau) {
    if (p.proj) {
      cuda::return_step(p, work, tau, {});
      cuda::multiply(cuda::unproject_product(p, work), {});
    }
    cuda::backward_step(p, work, tau, {});
    cuda::multiply(cuda::return_product(p, work), {});
  }
  cuda::return_step(p, work, -1, {});
}

// [weights]
struct Gradients {
  Buffer dR, dbias, dproj;

  Gradients(const Case& c, const Data& d)
      : dR(d.R.array.dtype, d.R.size), dbias(d.bias.array.dtype, d.bias.size), dproj(d.proj.array.dtype, d.proj.size) {
    const CellSizes sizes = sizes_of(c.cell);
    const int64_t GP = sizes.gates * c.P, shared = sizes.two_sides ? GP - c.P : GP;  // where du is dx
    Buffer one(c.dtype, 1);
    one.set(0, 1);
    const SumParams::Side ones{one.array.data, c.dtype, 0, 0};
    add(c, dR, 0, GP, side(d.dx), shared, side(d.operand), c.outputs());
    add(c, dbias, 0, GP, side(d.dx), shared, ones, 1);
    if (sizes.two_sides) {
      add(c, dR, shared, GP, side(d.du_last), c.P, side(d.operand), c.outputs());
      add(c, dbias, shared, GP, side(d.du_last), c.P, ones, 1);
    }
    if (c.Q >= 0) add(c, dproj, 0, c.Q, side(d.dh_total), c.Q, side(d.m), c.P);
  }

 private:
  // Tokens in the order of memory.
  static SumParams::Side side(const Gates& t) { return {t.begin(), t.array.dtype, std::min(t.b, t.l), t.h}; }

  // Rows from `first` on of the matrices of heads, which have `height` rows.
  static void add(const Case& c, const Buffer& out, int64_t first, int64_t height, SumParams::Side left, int64_t rows,
                  SumParams::Side right, int64_t columns) {
    SumParams p{.tokens = c.B * c.L,
                .heads = c.H,
                .rows = rows,
                .columns = columns,
                .accumulator = accumulator(c.dtype),
                .left = left,
                .right = right,
                .out = out.array,
                .out_head = height * columns};
    p.out.data = out.bytes.get() + first * columns * size_of(out.array.dtype);
    cuda::sum(p, {});
  }
};

void run_kernels(const Case& c, const Data& d, DType product_dtype) {
  if (c.path == Path::kFused) {
    cuda::fused_fwd(d.forward(c), {});
    cuda::fused_bwd(d.backward(c), {});
  } else {
    run_stepwise(d.forward(c), product_dtype);
    run_stepwise(d.backward(c), product_dtype);
  }
}

bool run(const Case& c, std::mt19937& random) {
  const CellSizes sizes = sizes_of(c.cell);
  const Data d(c, random() % 2, random);
  const DType type = accumulator(c.dtype);
  // The derivative of relu jumps where its argument, an output of the first product, is rounded to another sign.
  run_kernels(c, d, random() % 2 || c.cell == Cell::kElmanRelu ? type : c.dtype);

  WantedData want(d);
  for (const Sequence& s : d.batch.all) {
    for (int64_t head = 0; head < c.H; ++head) want.add(c, d, s, head);
  }
  // Of 16-bit x, u and the operands of products are rounded.
  const double terms = size_of(c.dtype) == 2 ? 8 : 64;
  const DType lost = size_of(c.dtype) == 2 ? c.dtype : type;
  const auto check = [&](const char* name, const Buffer& got, const Wanted& wanted, double of_terms) {
    return passes(c.text(), name, naive::difference(got, wanted, lost, of_terms));
  };
  bool ok = check("h", d.h, want.h, terms) & check("u", d.u, want.u, terms) & check("c", d.c, want.c, terms) &
            check("dx", d.dx, want.dx, 4 * terms);
  if (c.states) {
    ok &= check("final_h", d.final_h, want.final_h, terms) & check("final_c", d.final_c, want.final_c, terms) &
          check("dinitial_h", d.dinitial_h, want.dinitial_h, 4 * terms) &
          check("dinitial_c", d.dinitial_c, want.dinitial_c, 4 * terms);
  }
  if (sizes.two_sides) ok &= check("du_last", d.du_last, want.du_last, 4 * terms);
  if (c.weights) ok &= check("operand", d.operand, want.operand, terms);
  if (c.weights && c.Q >= 0)
    ok &= check("dh_total", d.dh_total, want.dh_total, 4 * terms) & check("m", d.m, want.m, terms);
  if (c.weights) {
    const Gradients got(c, d);
    const double of_sums = 4 * terms * std::sqrt(static_cast<double>(c.B * c.L));
    ok &= check("dR", got.dR, want.dR, of_sums);
    if (c.bias) ok &= check("dbias", got.dbias, want.dbias, of_sums);
    if (c.Q >= 0) ok &= check("dproj", got.dproj, want.dproj, of_sums);
  }
  return ok;
}

// One token for each row, whose states are rows of a pool.
bool run_step(Cell cell, DType dtype, int64_t H, int64_t P, int64_t Q, std::mt19937& random) {
  std::normal_distribution<double> normal;
  const auto draw = [&](int64_t) { return normal(random); };
  const std::vector<int64_t> indices = {2, -1, 0, 7, 3, 4};
  const int64_t B = static_cast<int64_t>(indices.size()), R = 5, empty_row = 3;
  const CellSizes sizes = sizes_of(cell);
  const int64_t G = sizes.gates, outputs = Q < 0 ? P : Q;
  const DType type = accumulator(dtype);
  const double zoneout = random() % 2 ? 0.3 : 0;
  const bool has_bias = random() % 2;
  Buffer x(dtype, B * H * G * P), h(dtype, B * H * outputs), weights(random() % 2 ? dtype : type, H * G * P * outputs),
      bias(type, H * G * P), proj(dtype, H * outputs * P);
  const auto weight = [&](int64_t) { return normal(random) / std::sqrt(static_cast<double>(P)); };
  x.fill(draw), weights.fill(weight), bias.fill(draw), proj.fill(weight);
  // (R, H, P) with rows of one unit after another, or the other way round.
  std::vector<Buffer> state;
  std::vector<StepParams::Rows> rows;
  for (int k = 0; k < sizes.published; ++k) {
    const int64_t width = k == 0 ? outputs : P;
    state.emplace_back(random() % 2 ? dtype : type, R * H * width);
    const bool turned = random() % 2;
    rows.push_back({state[k].array.data, state[k].array.dtype, turned ? 1 : H * width, turned ? R * width : width,
                    turned ? R : 1});
    state[k].fill([&](int64_t) { return k == 2 ? 0.1 + std::abs(normal(random)) : normal(random); });
  }
  const auto place = [&](int k, int64_t r, int64_t head, int64_t p) {
    return r * rows[k].b + head * rows[k].h + p * rows[k].p;
  };
  for (int64_t head = 0; head < H; ++head) {
    for (int64_t q = 0; q < outputs; ++q) state[0].set(place(0, empty_row, head, q), 0);
    for (int64_t p = 0; p < P; ++p) {
      for (int k = 1; k < sizes.published; ++k) state[k].set(place(k, empty_row, head, p), empty(cell)[k - 1].value);
    }
  }

  Wanted h_want(h);
  std::vector<Wanted> want;
  for (const Buffer& part : state) {
    want.emplace_back(part);
    for (int64_t i = 0; i < part.size; ++i) want.back()[i] = part[i];
  }
  Number::clear();
  for (int64_t b = 0; b < B; ++b) {
    const int64_t r = indices[b];
    if (r < 0 || r >= R) continue;
    for (int64_t head = 0; head < H; ++head) {
      std::vector<double> units(P);
      for (int64_t p = 0; p < P; ++p) {
        Numbers gates, u, c;
        for (int64_t g = 0; g < G; ++g) {
          gates.push_back(x[((b * H + head) * G + g) * P + p]);
          const int64_t row = (head * G + g) * P + p;
          double sum = has_bias ? bias[row] : 0;
          for (int64_t q = 0; q < outputs; ++q) {
            const double read = rounded(state[0][place(0, r, head, q)], dtype).value;
            sum += rounded(weights[row * outputs + q], dtype).value * read;
          }
          u.push_back(sum);
        }
        for (int k = 1; k < sizes.published; ++k) c.push_back(state[k][place(k, r, head, p)]);
        units[p] = next(cell, gates, u, sizes.reads_h ? state[0][place(0, r, head, p)] : 0, c, dtype).value;
        c = published(cell, carried(cell, c));  // of the scales that a state may be in that with n = 1
        for (int k = 1; k < sizes.published; ++k) want[k][place(k, r, head, p)] = c[k - 1].value;
      }
      for (int64_t q = 0; q < outputs; ++q) {
        double y = Q < 0 ? units[q] : 0;
        for (int64_t p = 0; Q >= 0 && p < P; ++p) {
          y += proj[(head * Q + q) * P + p] * rounded(units[p], dtype).value;
        }
        y = zoneout * state[0][place(0, r, head, q)] + (1 - zoneout) * y;
        want[0][place(0, r, head, q)] = h_want[(b * H + head) * outputs + q] = y;
      }
    }
  }

  StepParams p{};
  p.batch = B, p.heads = H, p.units = P, p.outputs = outputs, p.rows = R, p.cell = cell, p.accumulator = type;
  for (int k = 0; k < sizes.published; ++k) p.state[k] = rows[k];
  p.x = {x.array.data, dtype, H * G * P, 0, G * P, P};
  p.R = weights.array, p.zoneout = zoneout;
  if (has_bias) p.bias = bias.array;
  if (Q >= 0) p.proj = proj.array;
  p.h = {h.array.data, dtype, H * outputs, outputs, 1};
  p.state_indices = indices.data(), p.state_indices_is_int64 = true;
  const Buffer workspace = naive::workspace(cuda::step_workspace_bytes(p));
  p.workspace = workspace.array.data;
  cuda::step(p, {});

  char line[128];
  std::snprintf(line, sizeof line, "step %s %s H=%ld P=%ld Q=%ld zoneout=%g%s", sizes.name, naive::text(dtype), H, P, Q,
                zoneout, has_bias ? " bias" : "");
  const double terms = size_of(dtype) == 2 ? 8 : 64;
  const DType lost = size_of(dtype) == 2 ? dtype : type;
  bool ok = passes(line, "h", naive::difference(h, h_want, lost, terms));
  for (int k = 0; k < sizes.published; ++k)
    ok &= passes(line, "state", naive::difference(state[k], want[k], lost, terms));
  return ok;
}

// Whatever cu_seqlens hold, nothing outside a tensor is touched.
bool run_bad_cu_seqlens(Path path, Cell cell, std::mt19937& random) {
  const std::vector<std::vector<int64_t>> all = {
      {5, 3, -7, 100}, {100, 100}, {-5, -3}, {1, 9}, {INT64_MIN, INT64_MAX, 0}};
  bool ok = true;
  for (const std::vector<int64_t>& starts : all) {
    Case c{};
    c.path = path, c.cell = cell, c.B = 1, c.L = 12, c.H = 2, c.P = 5, c.Q = -1, c.grad_clip = -1;
    c.packing = Packing::kCuSeqlens, c.states = c.weights = true;
    Data d(c, false, random);
    Sequences& sequences = d.batch.sequences;
    const int64_t room = sequences.count;  // for at least the states of 3
    sequences.count = static_cast<int64_t>(starts.size()) - 1;
    sequences.cu_seqlens = starts.data(), sequences.cu_seqlens_is_int64 = true;
    run_kernels(c, d, c.dtype);
    for (const Buffer* state : {&d.final_h, &d.final_c, &d.dinitial_h, &d.dinitial_c}) {
      for (int64_t i = 0; i < state->size / room * sequences.count; ++i) ok &= std::isfinite((*state)[i]);
    }
  }
  if (!ok) std::printf("bad cu_seqlens %s: a result is not finite\n", sizes_of(cell).name);
  return ok;
}

}  // namespace

int main(int argc, char** argv) {
  std::mt19937 random(argc > 1 ? std::atoi(argv[1]) : 0);
  const int every = argc > 2 ? std::atoi(argv[2]) : 1;
  int failures = 0, cases = 0, seen = 0;
  const auto check = [&](auto&& run_case) {
    if (seen++ % every != 0) return;
    ++cases, failures += !run_case();
  };

  struct Size {
    int64_t B, L, H, P, Q;
  };
  // Blocks of the fused path hold 8 sequences, warps 16 units; the widest ones have no room for all weights in
  // registers.
  const Size sizes[] = {{3, 9, 2, 20, 7}, {10, 4, 1, 16, 16}, {2, 7, 3, 7, 9},    {1, 3, 1, 180, 70},
                        {2, 0, 2, 5, 3},  {1, 2, 1, 100, 30}, {1, 11, 2, 34, 40}, {9, 1, 1, 1, 1}};
  const Cell cells[] = {Cell::kLstm, Cell::kGru, Cell::kSlstm, Cell::kElmanTanh, Cell::kElmanRelu};
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
  for (const Size& size : sizes) {
    for (const Cell cell : cells) {
      for (const Path path : {Path::kFused, Path::kStepwise}) {
        for (const Packing packing : {Packing::kPlain, Packing::kCuSeqlens}) {
          Case c{};
          c.path = path, c.cell = cell, c.packing = packing;
          c.B = packing == Packing::kCuSeqlens ? 1 : size.B, c.L = size.B * size.L / c.B;
          c.H = size.H, c.P = size.P, c.Q = -1;
          if (path == Path::kStepwise && !sizes_of(cell).reads_h && random() % 2) c.Q = size.Q;
          const int64_t narrow = size.P > 128 ? 1 : 0;  // wide heads fit a block in 16 bits
          c.dtype = path == Path::kFused ? dtypes[narrow + random() % (3 - narrow)] : dtypes[random() % 4];
          c.bias = random() % 2, c.states = random() % 2, c.reset = random() % 2, c.reverse = random() % 2;
          c.poison = c.reset && random() % 2, c.weights = random() % 4, c.training = random() % 4;
          c.zoneout = random() % 2 ? 0.3 : 0, c.recurrent_dropout = random() % 2 ? 0.4 : 0;
          c.grad_clip = random() % 2 ? 0.2 : -1;
          check([&] { return run(c, random); });
        }
      }
    }
  }
  for (const Cell cell : cells) {
    for (const DType dtype : dtypes) {
      const int64_t P = 1 + random() % 40, Q = sizes_of(cell).reads_h || random() % 2 ? -1 : 1 + random() % 40;
      check([&] { return run_step(cell, dtype, 1 + random() % 2, P, Q, random); });
    }
  }
  for (const Path path : {Path::kFused, Path::kStepwise}) {
    for (const Cell cell : cells) check([&] { return run_bad_cu_seqlens(path, cell, random); });
  }
  std::printf("%d of %d cases failed\n", failures, cases);
  return failures > 0;
}
