// Runs every CUDA kernel of elementwise_rnn in the emulator against the textbook's equations in fp64, differentiated by
// the machine; without torch, so that sanitizers see only our code. Exit status 1 and a line per case where they
// differ.
//
//   elementwise_rnn [SEED [EVERY]]     runs each EVERY-th case; SEED draws what the list of cases leaves open
//
// EVERY should have no factor in common with 2, 3, 5 and 7, the lengths of the lists: then it reaches all their
// entries.
#include <cstdlib>
#include <random>

#include "buffer.h"
#include "common/simt/runtime.h"
#include "elementwise_rnn/params.h"
#include "elementwise_rnn/tile.h"
#include "elementwise_rnn/tile_bwd.h"
#include "sequences.h"
#include "tape.h"

namespace {

using namespace seqkern;
using namespace seqkern::elementwise_rnn;
using naive::Batch;
using naive::Buffer;
using naive::Number;
using naive::Numbers;
using naive::Packing;
using naive::passes;
using naive::Sequence;
using naive::Wanted;
using time_scan::Path;

// The states that kernels carry, and those of the papers: sLSTM's (h, y, l) and (h, c, n, m).
Numbers published(Cell cell, const Numbers& s) {
  return cell == Cell::kSlstm ? Numbers{s[0], s[1], 1, s[2]} : s;
}
Numbers carried(Cell cell, const Numbers& s) {
  if (cell != Cell::kSlstm) return s;
  if (s[2].value == 0) return {s[0], 0, -INFINITY};
  return {s[0], s[1] / s[2], s[3] + log(s[2])};
}
Numbers empty(Cell cell) {
  return cell == Cell::kSlstm ? Numbers{0, 0, 0, -INFINITY} : Numbers(sizes_of(cell).published);
}

// [cell], as the papers have it.
Numbers next(Cell cell, const Numbers& w, const Numbers& x, const Numbers& s) {
  const Number h = s[0];
  switch (cell) {
    case Cell::kGru: {
      const Number z = sigmoid(w[0] * h + x[0]), r = sigmoid(w[1] * h + x[1]), n = tanh(w[2] * h * r + x[2]);
      return {(1 - z) * h + z * n};
    }
    case Cell::kLstm: {
      const Number f = sigmoid(w[0] * h + w[3] * s[1] + x[0]), g = tanh(w[1] * h + x[1]);
      const Number c = f * s[1] + (1 - f) * g, o = sigmoid(w[2] * h + w[4] * c + x[2]);
      return {o * tanh(c), c};
    }
    case Cell::kSlstm: {
      const Number i = w[0] * h + x[0], z = tanh(w[2] * h + x[2]), o = sigmoid(w[3] * h + x[3]);
      const Number f = log_sigmoid(w[1] * h + x[1]) + s[3], m = larger(f, i);
      const Number keep = exp(f - m), add = exp(i - m);
      const Number c = keep * s[1] + add * z, n = keep * s[2] + add;
      return {o * c / n, c, n, m};
    }
    case Cell::kIndRnn:
      return {relu(w[0] * h + x[0])};
    case Cell::kElman:
      return {tanh(w[0] * h + x[0])};
  }
  return {};
}

const char* text(Solver solver) {
  const char* names[] = {"auto", "serial", "newton", "shooting"};
  return names[static_cast<int64_t>(solver)];
}

struct Case {
  Cell cell;
  Solver solver;
  DType dtype;  // of x and h; weights have this one or another
  int64_t B, L, D;
  Packing packing;
  Path path;                             // of the backward
  int64_t chunks;                        // of shooting
  bool reset, states, reverse, weights;  // weights: dweights are wanted

  std::string text() const {
    char line[256];
    std::snprintf(line, sizeof line, "%s %s chunks=%ld %s B=%ld L=%ld D=%ld %s %s%s%s%s%s", sizes_of(cell).name,
                  ::text(solver), chunks, naive::text(dtype), B, L, D, naive::text(packing), time_scan::name(path),
                  reset ? " reset" : "", states ? " states" : "", reverse ? " reverse" : "", weights ? " weights" : "");
    return line;
  }
};

// A (B, L, G, D) tensor, in one of the orders that keep channels contiguous.
struct Tokens : Buffer {
  int64_t b, l, g;  // strides

  Tokens(DType dtype, const Case& c, int64_t G, int order = 0) : Buffer(dtype, c.B * c.L * G * c.D) {
    if (order == 0) b = c.L * G * c.D, l = G * c.D, g = c.D;
    if (order == 1) l = c.B * G * c.D, b = G * c.D, g = c.D;
    if (order == 2) g = c.B * c.L * c.D, b = c.L * c.D, l = c.D;
  }
  int64_t place(int64_t b_, int64_t t, int64_t g_, int64_t d) const { return b_ * b + t * l + g_ * g + d; }
  GateData gates() const { return {array.data, array.dtype, b, l, g}; }
  Data data() const { return {array.data, array.dtype, {.b = b, .d = 1, .l = l}}; }
};

// What a forward leaves.
struct Forward {
  Tokens h;
  Buffer final, checkpoints, estimate, sweeps;  // sweeps: int32 in the memory of floats
  std::unique_ptr<bool[]> repaired;

  Forward(const Case& c, int64_t rows)
      : h(c.dtype, c, 1),
        final(accumulator(c.dtype), sizes_of(c.cell).states * rows * c.D),
        checkpoints(accumulator(c.dtype),
                    sizes_of(c.cell).states * c.B * time_scan::ceil_div(c.L, int64_t{kKept}) * c.D),
        estimate(DType::kFloat32, c.B * c.D),
        sweeps(DType::kFloat32, c.B * c.D),
        repaired(new bool[c.B * c.D]()) {}

  void run(const Inputs& in, const Case& c, Solver solver, bool states) {
    FwdParams p{};
    static_cast<Inputs&>(p) = in;
    p.solver = solver, p.h = h.data(), p.checkpoints = checkpoints.array;
    if (states) p.final_state = final.array;
    p.stats = {static_cast<int32_t*>(sweeps.array.data), static_cast<float*>(estimate.array.data), repaired.get()};
    const auto plan = cuda::plan_fwd(p, {solver, c.chunks, "named"});
    const Buffer workspace = naive::workspace(plan.workspace_bytes);
    p.workspace = workspace.array.data;
    cuda::fwd(p, plan, {});
  }
};

// A solver's answer is within the tolerance of the serial one, or that one bit by bit.
bool agrees(const Case& c, const Forward& serial, const Forward& solved) {
  const double tolerance = tolerance_of(accumulator(c.dtype));
  double worst = 0;
  for (int64_t b = 0; b < c.B; ++b) {
    for (int64_t d = 0; d < c.D; ++d) {
      const bool repaired = solved.repaired[b * c.D + d];
      for (int64_t t = 0; t < c.L; ++t) {
        const double want = serial.h[serial.h.place(b, t, 0, d)], got = solved.h[solved.h.place(b, t, 0, d)];
        if (got == want || (std::isnan(got) && std::isnan(want))) continue;
        const double allowed =
            repaired ? 0 : 2 * tolerance * std::max(1.0, std::abs(want)) + 2 * naive::epsilon(c.dtype) * std::abs(want);
        const double error = std::abs(got - want) / allowed;
        if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error;
      }
    }
  }
  return passes(c.text(), "h beside the serial one", worst);
}

bool run(const Case& c, std::mt19937& random) {
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform(-0.95, 0.95);
  const auto draw = [&](int64_t) { return normal(random); };
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, c.dtype, c.dtype, c.dtype, c.dtype};
  const auto some_dtype = [&] { return c.dtype == DType::kFloat64 ? c.dtype : dtypes[random() % 7]; };
  const CellSizes sizes = sizes_of(c.cell);
  const DType type = accumulator(c.dtype);
  const int64_t D = c.D, G = sizes.gates, W = sizes.weights, S = sizes.states;

  const Batch batch(c.packing, c.B, c.L, c.reverse, random);
  const int64_t rows = batch.sequences.count, order = random() % 3;
  Tokens x(c.dtype, c, G, static_cast<int>(order)), dx(c.dtype, c, G), dh(c.dtype, c, 1, random() % 2);
  Buffer weights(some_dtype(), W * D), dweights(weights.array.dtype, W * D);
  Buffer initial(some_dtype(), S * rows * D), dinitial(initial.array.dtype, initial.size), dfinal(type, initial.size);
  const std::unique_ptr<bool[]> reset(new bool[c.B * c.L]);
  x.fill(draw), dh.fill(draw), initial.fill(draw), dfinal.fill(draw);
  dinitial.fill([](int64_t) { return 0; });                // as the operator allocates it
  weights.fill([&](int64_t) { return uniform(random); });  // larger ones may amplify what rounding does
  for (int64_t i = 0; i < c.B * c.L; ++i) reset[i] = c.reset && random() % 6 == 0;

  // Nothing passes a reset, in channel 0 NaN neither: from the state or token before it.
  for (const Sequence& s : batch.all) {
    for (size_t i = 0; i < s.tokens.size(); ++i) {
      if (!reset[s.b * c.L + s.tokens[i]]) continue;
      for (int64_t k = 0; k < std::max(G, S); ++k) {
        if (i > 0 && k < G) x.set(x.place(s.b, s.tokens[i - 1], k, 0), NAN);
        if (i == 0 && k < S) initial.set((k * rows + s.initial) * D, NAN);
      }
    }
  }

  Inputs in{};
  in.sequences = batch.sequences, in.channels = D, in.cell = c.cell, in.accumulator = type, in.split_time = true;
  in.x = x.gates(), in.weights = weights.array;
  if (c.states) in.initial_state = initial.array;
  if (c.reset) in.reset = reset.get();
  Forward serial(c, rows), solved(c, rows);
  serial.run(in, c, Solver::kSerial, c.states);
  if (c.solver != Solver::kSerial) solved.run(in, c, c.solver, c.states);

  BwdParams bwd{};
  static_cast<Inputs&>(bwd) = in;
  bwd.dh = dh.data(), bwd.dx = dx.gates(), bwd.checkpoints = serial.checkpoints.array;
  if (c.weights) bwd.dweights = dweights.array;
  if (c.states) bwd.dfinal_state = dfinal.array, bwd.dinitial_state = dinitial.array;
  const auto plan = cuda::plan_bwd(bwd, {c.path, "named"});
  const Buffer workspace = naive::workspace(plan.workspace_bytes);
  bwd.workspace = workspace.array.data;
  cuda::bwd(bwd, plan, {});

  Wanted h_want(serial.h), final_want(serial.final), dx_want(dx), dweights_want(dweights), dinitial_want(dinitial);
  final_want.largest_term = 1;  // of the states that led there
  for (const Sequence& s : batch.all) {
    for (int64_t d = 0; d < D; ++d) {
      Number::clear();
      const auto leaves = [](int64_t count, auto&& value) {
        Numbers all;
        for (int64_t k = 0; k < count; ++k) all.push_back(Number::leaf(value(k)));
        return all;
      };
      const auto row = [&](int64_t k, int64_t n) { return (k * rows + n) * D + d; };
      const Numbers w = leaves(W, [&](int64_t k) { return weights[k * D + d]; });
      const Numbers first = leaves(S, [&](int64_t k) { return initial[row(k, s.initial)]; });
      Numbers state = c.states ? published(c.cell, first) : empty(c.cell), outputs;
      std::vector<Numbers> tokens;
      for (const int64_t t : s.tokens) {
        if (reset[s.b * c.L + t]) state = empty(c.cell);
        tokens.push_back(leaves(G, [&](int64_t g) { return x[x.place(s.b, t, g, d)]; }));
        state = next(c.cell, w, tokens.back(), state);
        outputs.push_back(state[0]);
        h_want[serial.h.place(s.b, t, 0, d)] = state[0].value;
      }
      const Numbers last = carried(c.cell, state);
      std::vector<double> seeds = Number::seeds();
      for (int64_t k = 0; c.states && k < S; ++k) {
        final_want[row(k, s.final)] = last[k].value;
        if (last[k].node >= 0) seeds[last[k].node] += dfinal[row(k, s.final)];
      }
      for (size_t i = 0; i < s.tokens.size(); ++i) seeds[outputs[i].node] += dh[dh.place(s.b, s.tokens[i], 0, d)];

      const std::vector<double> gradient = Number::gradients(seeds);
      for (size_t i = 0; i < s.tokens.size(); ++i) {
        for (int64_t g = 0; g < G; ++g) dx_want[dx.place(s.b, s.tokens[i], g, d)] = gradient[tokens[i][g].node];
      }
      for (int64_t k = 0; k < W; ++k) dweights_want.add(k * D + d, gradient[w[k].node]);
      for (int64_t k = 0; c.states && k < S; ++k) dinitial_want[row(k, s.initial)] = gradient[first[k].node];
    }
  }

  const auto check = [&](const char* name, const Buffer& got, const Wanted& want, double terms) {
    return passes(c.text(), name, naive::difference(got, want, type, terms));
  };
  bool ok = check("h", serial.h, h_want, 64) & check("dx", dx, dx_want, 256);
  if (c.states)
    ok &= check("final_state", serial.final, final_want, 64) & check("dinitial", dinitial, dinitial_want, 256);
  if (c.weights) ok &= check("dweights", dweights, dweights_want, 256 + 8 * std::sqrt(static_cast<double>(c.B * c.L)));
  if (c.solver != Solver::kSerial) {
    // States of about 1, and an error of twice the tolerance.
    const double terms = 64 + 2 * tolerance_of(type) / naive::epsilon(type);
    ok &= agrees(c, serial, solved) & check("h as solved", solved.h, h_want, terms);
    if (c.states) ok &= check("final_state as solved", solved.final, final_want, terms);
    Wanted kept(serial.checkpoints);
    for (int64_t i = 0; i < serial.checkpoints.size; ++i) kept[i] = serial.checkpoints[i];
    ok &= check("checkpoints as solved", solved.checkpoints, kept, terms);
  }
  return ok;
}

// Where Newton's method has a hard time: no reference but the serial answer.
bool run_hostile(Cell cell, Solver solver, double scale, std::mt19937& random) {
  std::normal_distribution<double> normal;
  Case c{};
  c.cell = cell, c.solver = solver, c.B = 1, c.L = 150, c.D = 40, c.chunks = 4;
  const CellSizes sizes = sizes_of(cell);
  Tokens x(c.dtype, c, sizes.gates);
  Buffer weights(c.dtype, sizes.weights * c.D);
  x.fill([&](int64_t) { return scale * normal(random); });
  weights.fill([&](int64_t) { return 4 * normal(random); });
  Inputs in{};
  in.sequences.batch = in.sequences.count = 1, in.sequences.length = c.L, in.channels = c.D, in.cell = cell;
  in.split_time = true, in.x = x.gates(), in.weights = weights.array;
  Forward serial(c, 1), solved(c, 1);
  serial.run(in, c, Solver::kSerial, true), solved.run(in, c, solver, true);
  return agrees(c, serial, solved);
}

// Jacobians of 4, of which no product over 64 tokens and more is finite, and one of 0; all in exact numbers.
bool run_growing(Path path) {
  Case c{};
  c.cell = Cell::kIndRnn, c.solver = Solver::kSerial, c.B = 1, c.L = 300, c.D = 1;
  const int64_t cut = 40, given = 21;  // tokens: whose Jacobian is 0; that has a gradient
  const double h = 0x1p-20;            // of all tokens but the one at the cut
  Tokens x(c.dtype, c, 1), dx(c.dtype, c, 1), dh(c.dtype, c, 1);
  Buffer weights(c.dtype, 1);
  x.fill([&](int64_t t) { return t == cut ? -1 : t == 0 || t == cut + 1 ? h : -3 * h; });
  dh.fill([&](int64_t t) { return t == given; }), weights.set(0, 4);
  BwdParams p{};
  p.sequences.batch = p.sequences.count = 1, p.sequences.length = c.L, p.channels = 1, p.cell = c.cell;
  p.split_time = true, p.x = x.gates(), p.weights = weights.array;
  Forward forward(c, 1);
  forward.run(p, c, Solver::kSerial, false);
  p.dh = dh.data(), p.dx = dx.gates(), p.checkpoints = forward.checkpoints.array;
  const auto plan = cuda::plan_bwd(p, {path, "named"});
  const Buffer workspace = naive::workspace(plan.workspace_bytes);
  p.workspace = workspace.array.data;
  cuda::bwd(p, plan, {});
  bool ok = true;
  for (int64_t t = 0; t < c.L; ++t) ok &= dx[t] == (t > given ? 0 : std::ldexp(1, static_cast<int>(2 * (given - t))));
  if (!ok) std::printf("growing %s: dx is off\n", time_scan::name(path));
  return ok;
}

// One token for each row, whose states are rows of a pool.
bool run_step(Cell cell, DType dtype, int64_t D, std::mt19937& random) {
  std::normal_distribution<double> normal;
  const auto draw = [&](int64_t) { return normal(random); };
  const std::vector<int64_t> indices = {2, -1, 0, 7, 3};
  const int64_t B = static_cast<int64_t>(indices.size()), R = 5, empty_row = 3;
  const CellSizes sizes = sizes_of(cell);
  const DType type = accumulator(dtype);
  Buffer x(dtype, B * sizes.gates * D), weights(type, sizes.weights * D), h(dtype, B * D);
  x.fill(draw), weights.fill(draw);
  std::vector<Buffer> state;
  for (int k = 0; k < sizes.published; ++k) {
    state.emplace_back(random() % 2 ? dtype : type, R * D);
    state[k].fill([&](int64_t) { return k == 2 ? 0.1 + std::abs(normal(random)) : normal(random); });
    for (int64_t d = 0; d < D; ++d) state[k].set(empty_row * D + d, empty(cell)[k].value);
  }

  Wanted h_want(h);
  std::vector<Wanted> want;
  for (const Buffer& part : state) {
    want.emplace_back(part);
    for (int64_t i = 0; i < part.size; ++i) want.back()[i] = part[i];
  }
  Number::clear();
  for (int64_t b = 0; b < B; ++b) {
    if (indices[b] < 0 || indices[b] >= R) continue;
    for (int64_t d = 0; d < D; ++d) {
      Numbers w, gates, s;
      for (int64_t k = 0; k < sizes.weights; ++k) w.push_back(weights[k * D + d]);
      for (int64_t g = 0; g < sizes.gates; ++g) gates.push_back(x[(b * sizes.gates + g) * D + d]);
      for (const Buffer& part : state) s.push_back(part[indices[b] * D + d]);
      s = next(cell, w, gates, s);
      h_want[b * D + d] = s[0].value;
      s = published(cell, carried(cell, s));  // of the scales that a state may be in that with n = 1
      for (int64_t k = 0; k < sizes.published; ++k) want[k][indices[b] * D + d] = s[k].value;
    }
  }

  StepParams p{};
  p.batch = B, p.channels = D, p.rows = R, p.cell = cell, p.accumulator = type;
  for (int64_t k = 0; k < sizes.published; ++k) p.state[k] = {state[k].array.data, state[k].array.dtype, D, 1};
  p.x = {x.array.data, dtype, sizes.gates * D, 0, D}, p.weights = weights.array, p.h = {h.array.data, dtype, D, 1};
  p.state_indices = indices.data(), p.state_indices_is_int64 = true;
  cuda::step(p, {});

  char text[128];
  std::snprintf(text, sizeof text, "step %s %s D=%ld", sizes.name, naive::text(dtype), D);
  bool ok = passes(text, "h", naive::difference(h, h_want, type, 64));
  for (int64_t k = 0; k < sizes.published; ++k)
    ok &= passes(text, "state", naive::difference(state[k], want[k], type, 64));
  return ok;
}

// Values that no caller should pass: results are of no interest, only that nothing else is touched.
bool run_bad_cu_seqlens(Cell cell, Solver solver, Path path, std::mt19937& random) {
  std::normal_distribution<double> normal;
  const auto draw = [&](int64_t) { return normal(random); };
  const std::vector<std::vector<int64_t>> all = {
      {5, 3, -7, 100, 20}, {100, 100}, {-5, -3}, {1, 36}, {0, 50, 20, 37}, {INT64_MIN, INT64_MAX, 0}};
  bool ok = true;
  for (const std::vector<int64_t>& starts : all) {
    Case c{};
    c.cell = cell, c.B = 1, c.L = 90, c.D = 4, c.chunks = 3;
    const CellSizes sizes = sizes_of(cell);
    Tokens x(c.dtype, c, sizes.gates), dx(c.dtype, c, sizes.gates), dh(c.dtype, c, 1);
    Inputs in{};
    in.sequences.batch = 1, in.sequences.length = c.L, in.sequences.count = static_cast<int64_t>(starts.size()) - 1;
    in.sequences.cu_seqlens = starts.data(), in.sequences.cu_seqlens_is_int64 = true;
    Buffer weights(c.dtype, sizes.weights * c.D), dweights(c.dtype, weights.size);
    Buffer state(c.dtype, sizes.states * in.sequences.count * c.D), out(c.dtype, state.size);
    for (Buffer* buffer : {static_cast<Buffer*>(&x), static_cast<Buffer*>(&dh), &weights, &state}) buffer->fill(draw);
    out.fill([](int64_t) { return 0; });
    in.channels = c.D, in.cell = cell, in.split_time = true;
    in.x = x.gates(), in.weights = weights.array, in.initial_state = state.array;
    Forward forward(c, in.sequences.count);
    forward.final.fill([](int64_t) { return 0; });
    forward.run(in, c, solver, true);

    BwdParams bwd{};
    static_cast<Inputs&>(bwd) = in;
    bwd.dh = dh.data(), bwd.dfinal_state = state.array, bwd.checkpoints = forward.checkpoints.array;
    bwd.dx = dx.gates(), bwd.dweights = dweights.array, bwd.dinitial_state = out.array;
    const auto plan = cuda::plan_bwd(bwd, {path, "named"});
    const Buffer workspace = naive::workspace(plan.workspace_bytes);
    bwd.workspace = workspace.array.data;
    cuda::bwd(bwd, plan, {});
    for (const Buffer* buffer : {static_cast<const Buffer*>(&forward.h), static_cast<const Buffer*>(&dx),
                                 static_cast<const Buffer*>(&dweights), static_cast<const Buffer*>(&out)}) {
      for (int64_t i = 0; i < buffer->size; ++i) ok &= std::isfinite((*buffer)[i]);
    }
  }
  if (!ok) std::printf("bad cu_seqlens %s %s: a result is not finite\n", text(solver), time_scan::name(path));
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
    int64_t B, L, D;
  };
  const Size sizes[] = {{3, 17, 6}, {1, 3, 70}, {2, 257, 3}, {1, 128, 33}, {1, 144, 1}, {2, 0, 3}, {2, 79, 5}};
  const Cell cells[] = {Cell::kGru, Cell::kLstm, Cell::kSlstm, Cell::kIndRnn, Cell::kElman};
  const Solver solvers[] = {Solver::kSerial, Solver::kNewton, Solver::kShooting};
  const Path paths[] = {Path::kSerial, Path::kTwoPass, Path::kLookBack};
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
  for (int round = 0; round < 2; ++round) {
    for (const Size& size : sizes) {
      for (const Cell cell : cells) {
        for (const Solver solver : solvers) {
          for (const Packing packing : {Packing::kPlain, Packing::kCuSeqlens}) {
            Case c{};
            c.cell = cell, c.solver = solver, c.packing = packing;
            c.B = packing == Packing::kCuSeqlens ? 1 : size.B, c.L = size.L, c.D = size.D;
            c.dtype = dtypes[random() % 4], c.path = paths[random() % 3], c.chunks = 2 + random() % 4;
            c.reset = random() % 2, c.states = random() % 2, c.reverse = random() % 2, c.weights = random() % 4;
            check([&] { return run(c, random); });
          }
        }
      }
    }
  }
  for (const Path path : paths) {  // more tiles than a warp looks at at once
    Case c{};
    c.cell = Cell::kElman, c.solver = Solver::kSerial, c.B = c.D = 1, c.L = 4300, c.path = path;
    c.states = c.weights = true;
    check([&] { return run(c, random); });
  }
  for (const Cell cell : cells) {
    for (const Solver solver : {Solver::kNewton, Solver::kShooting}) {
      for (const double scale : {1.0, 20.0}) check([&] { return run_hostile(cell, solver, scale, random); });
    }
    for (const DType dtype : dtypes) {
      for (const int64_t D : {1, 37}) check([&] { return run_step(cell, dtype, D, random); });
    }
  }
  for (const Path path : paths) check([&] { return run_growing(path); });
  for (size_t i = 0; i < std::size(solvers); ++i)
    check([&] { return run_bad_cu_seqlens(cells[i], solvers[i], paths[i], random); });
  std::printf("%d of %d cases failed\n", failures, cases);
  return failures > 0;
}
