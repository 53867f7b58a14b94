// Runs every CUDA kernel of selective_scan in the emulator against a naive loop in fp64; without torch, so that
// sanitizers see only our code. Exit status 1 and a line per case where they differ.
//
//   selective_scan [SEED [EVERY]]     runs each EVERY-th case; SEED draws what the list of cases leaves open
//
// EVERY should have no factor in common with 2, 3, 5 and 7, the lengths of the lists: then it reaches all their
// entries.
#include <cstdlib>
#include <random>

#include "buffer.h"
#include "common/simt/runtime.h"
#include "selective_scan/params.h"
#include "selective_scan/tile.h"
#include "sequences.h"

namespace {

using namespace seqkern;
using namespace seqkern::selective_scan;
using naive::Buffer;
using naive::Complex;
using naive::difference;
using naive::Packing;
using naive::passes;
using naive::Sequence;
using Complexes = std::vector<Complex>;

struct Case {
  DType dtype;  // of u; other tensors have this one or another
  int64_t B, D, L, N, groups_B, groups_C;
  Packing packing;
  bool complex, softplus, two_exp, skip, gate, bias, states, reverse, split;

  std::string text() const {
    char line[256];
    std::snprintf(line, sizeof line, "%s B=%ld D=%ld L=%ld N=%ld G=%ld,%ld %s%s%s%s%s%s%s%s%s%s", naive::text(dtype), B,
                  D, L, N, groups_B, groups_C, naive::text(packing), complex ? " complex" : "",
                  softplus ? " softplus" : "", two_exp ? " two_exp" : "", skip ? " D" : "", gate ? " z" : "",
                  bias ? " bias" : "", states ? " states" : "", reverse ? " reverse" : "", split ? " split" : "");
    return line;
  }
};

// A (B, D, L) tensor in one of the two memory orders.
struct Tokens : Buffer {
  Strides stride;

  Tokens(DType dtype, const Case& c, bool channels_first)
      : Buffer(dtype, c.B * c.D * c.L),
        stride(channels_first ? Strides{c.D * c.L, 1, c.D} : Strides{c.D * c.L, c.L, 1}) {}
  int64_t place(int64_t b, int64_t d, int64_t t) const { return b * stride.b + d * stride.d + t * stride.l; }
  double at(int64_t b, int64_t d, int64_t t) const { return (*this)[place(b, d, t)]; }
  Data data() const { return {array.data, array.dtype, stride}; }
};

// B or C, constant for no groups; variable in one of two memory orders.
struct Parameter : Buffer {
  Projection p;
  int64_t D, N, parts;

  Parameter(DType dtype, const Case& c, int64_t groups, bool states_first)
      : Buffer(dtype, (groups ? c.B * groups * c.L : c.D) * c.N * (c.complex ? 2 : 1)),
        D(c.D),
        N(c.N),
        parts(c.complex ? 2 : 1) {
    p.data = array.data, p.dtype = dtype, p.groups = groups;
    if (groups == 0) return;
    p.b = groups * c.N * c.L * parts;
    if (states_first)
      p.n = 1, p.g = c.N, p.im = groups * c.N;
    else
      p.im = 1, p.n = c.L * parts, p.g = c.N * p.n;
    p.l = parts * p.im;
  }
  int64_t place(int64_t b, int64_t d, int64_t n, int64_t t) const {
    if (p.constant()) return (d * N + n) * parts;
    return b * p.b + d / (D / p.groups) * p.g + n * p.n + t * p.l;
  }
  int64_t imaginary() const { return p.constant() ? 1 : p.im; }
  Complex at(int64_t b, int64_t d, int64_t n, int64_t t) const {
    const int64_t i = place(b, d, n, t);
    return {(*this)[i], parts == 2 ? (*this)[i + imaginary()] : 0};
  }
};

struct Wanted : naive::Wanted {
  using naive::Wanted::add;
  using naive::Wanted::Wanted;
  void add(const Parameter& to, int64_t b, int64_t d, int64_t n, int64_t t, Complex value) {
    const int64_t i = to.place(b, d, n, t);
    (*this)[i] += value.real();
    if (to.parts == 2) (*this)[i + to.imaginary()] += value.imag();
  }
};

// [delta] and its derivative
struct Delta {
  double value, derivative;

  Delta(double raw, bool softplus)
      : value(!softplus || raw > 20 ? raw : std::log1p(std::exp(raw))),
        derivative(softplus ? 1 / (1 + std::exp(-raw)) : 1) {}
};

// [decay]; `derivative` is by delta' A
struct Decay {
  Complex value, derivative;

  Decay(Complex exponent, bool two_exp)
      : value(two_exp ? 2.0 * std::exp(exponent) - 1.0 : std::exp(exponent)),
        derivative(two_exp ? value + 1.0 : value) {}
};

bool run(const Case& c, std::mt19937& random) {
  std::normal_distribution<double> normal;
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, c.dtype, c.dtype, c.dtype, c.dtype};
  const auto some_dtype = [&] { return c.dtype == DType::kFloat64 ? c.dtype : dtypes[random() % 7]; };
  const auto coin = [&] { return random() % 2 == 1; };
  const DType type = accumulator(c.dtype);
  const int64_t parts = c.complex ? 2 : 1, D = c.D, N = c.N;
  const double k = c.complex ? 2 : 1;

  const naive::Batch batch(c.packing, c.B, c.L, c.reverse, random);
  const int64_t rows = batch.sequences.count, chunks = num_chunks(batch.sequences);
  Tokens u(c.dtype, c, coin()), delta(some_dtype(), c, coin()), z(some_dtype(), c, coin()), dy(c.dtype, c, coin());
  Tokens y(c.dtype, c, coin()), du(c.dtype, c, coin()), ddelta(delta.array.dtype, c, coin()),
      dz(z.array.dtype, c, coin());
  Buffer A(some_dtype(), D * N * parts), dA(A.array.dtype, A.size);
  Parameter B(some_dtype(), c, c.groups_B, coin()), C(some_dtype(), c, c.groups_C, coin());
  Parameter dB(B.array.dtype, c, c.groups_B, false), dC(C.array.dtype, c, c.groups_C, false);
  Buffer skip(some_dtype(), D), bias(some_dtype(), D), dskip(skip.array.dtype, D), dbias(bias.array.dtype, D);
  Buffer initial(some_dtype(), rows * D * N * parts), dinitial(initial.array.dtype, initial.size);
  Buffer last(type, initial.size), dlast(type, initial.size), checkpoints(type, c.B * chunks * N * parts * D);

  // Some decays grow, slowly: 2 exp - 1 turns faster than it shrinks.
  const double turn = c.two_exp ? 0.2 : 2;
  A.fill([&](int64_t i) { return i % parts == 1 ? turn * normal(random) : 0.1 - std::exp(0.7 * normal(random)); });
  for (Buffer* buffer : {static_cast<Buffer*>(&u), static_cast<Buffer*>(&z), static_cast<Buffer*>(&dy),
                         static_cast<Buffer*>(&B), static_cast<Buffer*>(&C), &skip, &initial, &dlast}) {
    buffer->fill([&](int64_t) { return normal(random); });
  }
  delta.fill([&](int64_t) { return c.softplus ? normal(random) - 1 : 0.1 + 0.2 * std::abs(normal(random)); });
  bias.fill([&](int64_t) { return 0.1 * std::abs(normal(random)); });
  dinitial.fill([](int64_t) { return 0; });  // as the operator allocates it

  // Padding holds NaN: nothing may depend on it.
  for (int64_t b = 0; b < c.B; ++b) {
    for (int64_t t = 0; t < c.L; ++t) {
      if (!batch.padding(b, t)) continue;
      for (int64_t d = 0; d < D; ++d) {
        for (Tokens* tokens : {&u, &delta, &z, &dy}) tokens->set(tokens->place(b, d, t), NAN);
        for (Parameter* parameter : {&B, &C}) {
          for (int64_t n = 0; n < N && !parameter->p.constant(); ++n) parameter->set(parameter->place(b, d, n, t), NAN);
        }
      }
    }
  }

  Wanted y_want(y), du_want(du), ddelta_want(ddelta), dz_want(dz), dA_want(dA), dB_want(dB), dC_want(dC);
  Wanted dskip_want(dskip), dbias_want(dbias), last_want(last), dinitial_want(dinitial);
  Wanted checkpoints_want(checkpoints.size, NAN);
  for (const Sequence& s : batch.all) {
    const int64_t length = static_cast<int64_t>(s.tokens.size());
    for (int64_t d = 0; d < D; ++d) {
      std::vector<Complexes> h(length + 1, Complexes(N));  // h[i + 1] follows token i
      for (int64_t n = 0; n < N && c.states && s.initial >= 0; ++n)
        h[0][n] = initial.at((s.initial * D + d) * N + n, c.complex);
      std::vector<double> out(length);
      const auto delta_at = [&](int64_t t) { return Delta(delta.at(s.b, d, t) + (c.bias ? bias[d] : 0), c.softplus); };
      const auto decay = [&](int64_t n, double by) { return Decay(by * A.at(d * N + n, c.complex), c.two_exp); };
      for (int64_t i = 0; i < length; ++i) {
        const int64_t t = s.tokens[i], tau = c.reverse ? c.L - 1 - t : t;
        const double by = delta_at(t).value, x = u.at(s.b, d, t);
        if (c.skip) out[i] = skip[d] * x;
        for (int64_t n = 0; n < N; ++n) {
          h[i + 1][n] = decay(n, by).value * h[i][n] + by * x * B.at(s.b, d, n, t);
          out[i] += k * (C.at(s.b, d, n, t) * h[i + 1][n]).real();
          for (int64_t part = 0; part < parts && i > 0 && tau % kChunk == 0; ++part) {
            const double value = part ? h[i][n].imag() : h[i][n].real();
            checkpoints_want[(((s.b * chunks + tau / kChunk) * N + n) * parts + part) * D + d] = value;
          }
        }
        const double gate = c.gate ? z.at(s.b, d, t) : 0;
        y_want[y.place(s.b, d, t)] = c.gate ? out[i] * gate / (1 + std::exp(-gate)) : out[i];
      }

      Complexes carry(N);  // conj(a_{t+1}) g_{t+1}
      for (int64_t n = 0; n < N && c.states && s.final >= 0; ++n) {
        const int64_t i = (s.final * D + d) * N + n;
        last_want.add(i, h[length][n], c.complex);
        carry[n] = dlast.at(i, c.complex);
      }
      for (int64_t i = length - 1; i >= 0; --i) {
        const int64_t t = s.tokens[i];
        const Delta delta_t = delta_at(t);
        const double by = delta_t.value, x = u.at(s.b, d, t);
        double dout = dy.at(s.b, d, t);
        if (c.gate) {
          const double gate = z.at(s.b, d, t), sigmoid = 1 / (1 + std::exp(-gate));
          dz_want[dz.place(s.b, d, t)] = dout * out[i] * sigmoid * (1 + gate * (1 - sigmoid));
          dout *= gate * sigmoid;
        }
        double dx = 0, dby = 0, terms = 0;  // of delta' u and of delta' in the decay
        for (int64_t n = 0; n < N; ++n) {
          const Decay a = decay(n, by);
          const Complex g = k * std::conj(C.at(s.b, d, n, t)) * dout + carry[n];
          const Complex e = std::conj(a.derivative * h[i][n]) * g;
          dC_want.add(dC, s.b, d, n, t, k * dout * std::conj(h[i + 1][n]));
          dB_want.add(dB, s.b, d, n, t, by * x * g);
          dA_want.add(d * N + n, by * e, c.complex);
          dx += (std::conj(B.at(s.b, d, n, t)) * g).real();
          dby += (std::conj(A.at(d * N + n, c.complex)) * e).real();
          terms += std::abs(A.at(d * N + n, c.complex) * e) + std::abs(x * B.at(s.b, d, n, t) * g);
          carry[n] = std::conj(a.value) * g;
        }
        du_want[du.place(s.b, d, t)] = by * dx + (c.skip ? skip[d] * dout : 0);
        dskip_want[d] += dout * x, dskip_want.largest_term = std::max(dskip_want.largest_term, std::abs(dout * x));
        const double draw = (x * dx + dby) * delta_t.derivative;
        ddelta_want[ddelta.place(s.b, d, t)] = draw;
        dbias_want[d] += draw;
        dbias_want.largest_term = std::max(dbias_want.largest_term, terms);
      }
      for (int64_t n = 0; n < N && c.states && s.initial >= 0; ++n)
        dinitial_want.add((s.initial * D + d) * N + n, carry[n], c.complex);
    }
  }

  Inputs in{};
  in.sequences = batch.sequences, in.channels = D, in.states = N;
  in.complex = c.complex, in.softplus = c.softplus, in.two_exp = c.two_exp, in.accumulator = type;
  in.u = u.data(), in.delta = delta.data(), in.A = A.array, in.B = B.p, in.C = C.p, in.split_time = c.split;
  if (c.gate) in.z = z.data();
  if (c.skip) in.D = skip.array;
  if (c.bias) in.delta_bias = bias.array;
  if (c.states) in.initial_state = initial.array;

  FwdParams fwd{in, y.data()};
  fwd.checkpoints = checkpoints.array.data;
  if (c.states) fwd.last_state = last.array;
  const Buffer fwd_workspace = naive::workspace(cuda::fwd_workspace_bytes(fwd));
  fwd.workspace = fwd_workspace.array.data;
  cuda::fwd(fwd, {});

  // The error of a phase grows with its angle.
  const double terms = c.complex ? 128 : 64, many_terms = terms + 8 * std::sqrt(c.B * c.L + 1.0);
  const auto check = [&](const char* name, const Buffer& got, const Wanted& want, double terms) {
    return passes(c.text(), name, difference(got, want, type, terms));
  };
  bool ok = check("y", y, y_want, terms) & check("checkpoints", checkpoints, checkpoints_want, terms);
  if (c.states) ok &= check("last_state", last, last_want, terms);

  for (int64_t i = 0; i < checkpoints.size; ++i) {
    if (std::isnan(checkpoints_want[i])) checkpoints.set(i, NAN);  // is not to be read
  }
  BwdParams bwd{};
  static_cast<Inputs&>(bwd) = in;
  bwd.dy = dy.data(), bwd.checkpoints = checkpoints.array.data;
  bwd.du = du.data(), bwd.ddelta = ddelta.data(), bwd.dA = dA.array, bwd.dB = dB.p, bwd.dC = dC.p;
  if (c.gate) bwd.dz = dz.data();
  if (c.skip) bwd.dD = dskip.array;
  if (c.bias) bwd.ddelta_bias = dbias.array;
  if (c.states) bwd.dlast_state = dlast.array, bwd.dinitial_state = dinitial.array;
  const Buffer bwd_workspace = naive::workspace(cuda::bwd_workspace_bytes(bwd));
  bwd.workspace = bwd_workspace.array.data;
  cuda::bwd(bwd, {});

  ok &= check("du", du, du_want, terms) & check("ddelta", ddelta, ddelta_want, terms);
  ok &= check("dA", dA, dA_want, many_terms) & check("dB", dB, dB_want, many_terms) &
        check("dC", dC, dC_want, many_terms);
  if (c.gate) ok &= check("dz", dz, dz_want, terms);
  if (c.skip) ok &= check("dD", dskip, dskip_want, many_terms);
  if (c.bias) ok &= check("ddelta_bias", dbias, dbias_want, many_terms);
  if (c.states) ok &= check("dinitial_state", dinitial, dinitial_want, terms);
  return ok;
}

// One token for each row, whose states are rows of a pool.
bool run_step(DType dtype, int64_t H, int64_t P, int64_t N, bool complex, bool gate, std::mt19937& random) {
  std::normal_distribution<double> normal;
  const int64_t B = 4, G = H % 2 == 0 ? 2 : 1, R = 5, parts = complex ? 2 : 1;
  const std::vector<int32_t> indices = {2, -1, 0, 7};
  const bool softplus = random() % 2, two_exp = random() % 2;
  const DType type = accumulator(dtype);
  Buffer state(random() % 2 ? dtype : type, R * H * P * N * parts), A(type, H * P * N * parts);
  Buffer u(dtype, B * H * P), delta(dtype, u.size), z(dtype, u.size), y(dtype, u.size), skip(type, H), bias(type, H);
  Buffer b(dtype, B * G * N * parts), c(dtype, b.size);
  for (Buffer* buffer : {&state, &u, &z, &skip, &b, &c}) {
    buffer->fill([&](int64_t) { return normal(random); });
  }
  for (Buffer* buffer : {&delta, &bias}) {
    buffer->fill([&](int64_t) { return std::abs(normal(random)); });
  }
  A.fill([&](int64_t i) { return i % parts == 1 ? normal(random) : -std::exp(normal(random)); });

  Wanted y_want(y), state_want(state);
  for (int64_t i = 0; i < state.size; ++i) state_want[i] = state[i];
  for (int64_t row = 0; row < B; ++row) {
    const int64_t r = indices[row];
    if (r < 0 || r >= R) continue;
    for (int64_t channel = 0; channel < H * P; ++channel) {
      const int64_t h = channel / P, i = row * H * P + channel;
      const double by = Delta(delta[i] + bias[h], softplus).value;
      double out = skip[h] * u[i];
      for (int64_t n = 0; n < N; ++n) {
        const int64_t s = (r * H * P + channel) * N + n, projection = (row * G + h / (H / G)) * N + n;
        const Complex value = Decay(by * A.at(channel * N + n, complex), two_exp).value * state.at(s, complex) +
                              by * u[i] * b.at(projection, complex);
        out += (complex ? 2 : 1) * (c.at(projection, complex) * value).real();
        for (int64_t part = 0; part < parts; ++part) state_want[s * parts + part] = part ? value.imag() : value.real();
      }
      y_want[i] = gate ? out * z[i] / (1 + std::exp(-z[i])) : out;
    }
  }

  StepParams p{};
  p.batch = B, p.heads = H, p.size = P, p.states = N, p.rows = R;
  p.complex = complex, p.softplus = softplus, p.two_exp = two_exp, p.accumulator = type;
  const auto per_channel = [&](const Buffer& of) -> StepParams::PerChannel {
    return {of.array.data, of.array.dtype, H * P, P, 1};
  };
  p.u = per_channel(u), p.delta = per_channel(delta), p.y = per_channel(y);
  if (gate) p.z = per_channel(z);
  p.D = {skip.array.data, skip.array.dtype, 0, 1, 0}, p.delta_bias = {bias.array.data, bias.array.dtype, 0, 1, 0};
  p.state = {state.array.data, state.array.dtype, H * P * N * parts, P * N * parts, N * parts, parts};
  p.A = {A.array.data, A.array.dtype, 0, P * N * parts, N * parts, parts};
  p.B = {b.array.data, b.array.dtype, G * N * parts, N * parts, 0, parts, H / G};
  p.C = {c.array.data, c.array.dtype, G * N * parts, N * parts, 0, parts, H / G};
  p.state_indices = indices.data();
  cuda::step(p, {});

  char text[128];
  std::snprintf(text, sizeof text, "step dtype=%d H=%ld P=%ld N=%ld%s%s", static_cast<int>(dtype), H, P, N,
                complex ? " complex" : "", gate ? " z" : "");
  return passes(text, "y", difference(y, y_want, type, 64)) &
         passes(text, "state", difference(state, state_want, type, 64));
}

// Values that no caller should pass: results are of no interest, only that nothing else is touched.
bool run_bad_cu_seqlens(bool split, std::mt19937& random) {
  std::normal_distribution<double> normal;
  const std::vector<std::vector<int64_t>> all = {
      {5, 3, -7, 100, 20}, {100, 100}, {-5, -3}, {1, 36}, {0, 50, 20, 37}, {INT64_MIN, INT64_MAX, 0}};
  bool ok = true;
  for (const std::vector<int64_t>& starts : all) {
    Case c{};
    c.B = 1, c.D = 4, c.L = 90, c.N = 5, c.groups_B = c.groups_C = 1;
    Tokens u(c.dtype, c, false), y(c.dtype, c, false), du(c.dtype, c, false), ddelta(c.dtype, c, false);
    Parameter B(c.dtype, c, 1, false), dB(c.dtype, c, 1, false), dC(c.dtype, c, 1, false);
    Inputs in{};
    in.sequences.batch = 1, in.sequences.length = c.L, in.sequences.count = static_cast<int64_t>(starts.size()) - 1;
    in.sequences.cu_seqlens = starts.data(), in.sequences.cu_seqlens_is_int64 = true;
    Buffer A(c.dtype, c.D * c.N), dA(c.dtype, A.size), states(c.dtype, in.sequences.count * A.size);
    Buffer out(c.dtype, states.size), checkpoints(c.dtype, num_chunks(in.sequences) * A.size);
    for (Buffer* buffer : {static_cast<Buffer*>(&u), static_cast<Buffer*>(&B), &states}) {
      buffer->fill([&](int64_t) { return normal(random); });
    }
    A.fill([&](int64_t) { return -1; }), out.fill([](int64_t) { return 0; });
    in.channels = c.D, in.states = c.N, in.softplus = true, in.split_time = split;
    in.u = in.delta = u.data(), in.A = A.array, in.B = in.C = B.p, in.initial_state = states.array;
    FwdParams fwd{in, y.data()};
    fwd.last_state = out.array, fwd.checkpoints = checkpoints.array.data;
    const Buffer fwd_workspace = naive::workspace(cuda::fwd_workspace_bytes(fwd));
    fwd.workspace = fwd_workspace.array.data;
    cuda::fwd(fwd, {});
    BwdParams bwd{};
    static_cast<Inputs&>(bwd) = in;
    bwd.dy = u.data(), bwd.checkpoints = checkpoints.array.data, bwd.dlast_state = states.array;
    bwd.du = du.data(), bwd.ddelta = ddelta.data(), bwd.dA = dA.array, bwd.dB = dB.p, bwd.dC = dC.p;
    bwd.dinitial_state = out.array;
    const Buffer bwd_workspace = naive::workspace(cuda::bwd_workspace_bytes(bwd));
    bwd.workspace = bwd_workspace.array.data;
    cuda::bwd(bwd, {});
    for (const Buffer* buffer : {static_cast<Buffer*>(&y), static_cast<Buffer*>(&du), static_cast<Buffer*>(&ddelta),
                                 &dA, static_cast<Buffer*>(&dB), static_cast<Buffer*>(&dC), &out}) {
      for (int64_t i = 0; i < buffer->size; ++i) ok &= std::isfinite((*buffer)[i]);
    }
  }
  if (!ok) std::printf("bad cu_seqlens%s: a result is not finite\n", split ? " split" : "");
  return ok;
}

// Infinity reaches all tokens that follow, also over segments whose decays have a product of 0.
bool run_infinite() {
  Case c{};
  c.B = 1, c.D = 4, c.L = 200, c.N = 5, c.groups_B = c.groups_C = 1;
  Tokens u(c.dtype, c, false), delta(c.dtype, c, false), y(c.dtype, c, false), dy(c.dtype, c, false);
  Tokens du(c.dtype, c, false), ddelta(c.dtype, c, false);
  Parameter B(c.dtype, c, 1, false), dB(c.dtype, c, 1, false), dC(c.dtype, c, 1, false);
  Inputs in{};
  in.sequences.batch = in.sequences.count = 1, in.sequences.length = c.L;
  Buffer A(c.dtype, c.D * c.N), dA(c.dtype, A.size), checkpoints(c.dtype, num_chunks(in.sequences) * A.size);
  for (Buffer* buffer : {static_cast<Buffer*>(&u), static_cast<Buffer*>(&dy), static_cast<Buffer*>(&B)}) {
    buffer->fill([](int64_t) { return 1; });
  }
  delta.fill([](int64_t) { return 10; }), A.fill([](int64_t) { return -1; });
  in.channels = c.D, in.states = c.N, in.split_time = true;
  in.u = u.data(), in.delta = delta.data(), in.A = A.array, in.B = in.C = B.p;
  FwdParams fwd{in, y.data()};
  fwd.checkpoints = checkpoints.array.data;
  const Buffer fwd_workspace = naive::workspace(cuda::fwd_workspace_bytes(fwd));
  fwd.workspace = fwd_workspace.array.data;
  cuda::fwd(fwd, {});
  BwdParams bwd{};
  static_cast<Inputs&>(bwd) = in;
  bwd.dy = dy.data(), bwd.checkpoints = checkpoints.array.data;
  bwd.du = du.data(), bwd.ddelta = ddelta.data(), bwd.dA = dA.array, bwd.dB = dB.p, bwd.dC = dC.p;
  const Buffer bwd_workspace = naive::workspace(cuda::bwd_workspace_bytes(bwd));
  bwd.workspace = bwd_workspace.array.data;
  for (int64_t d = 0; d < c.D; ++d) dy.set(dy.place(0, d, c.L - 1), INFINITY);
  cuda::bwd(bwd, {});
  for (int64_t d = 0; d < c.D; ++d) u.set(u.place(0, d, 0), INFINITY);
  cuda::fwd(fwd, {});
  int64_t finite = 0;
  for (const Tokens* tokens : {&y, &du}) {
    for (int64_t i = 0; i < tokens->size; ++i) finite += std::isfinite((*tokens)[i]);
  }
  if (finite > 0) std::printf("infinity: %ld results are finite\n", finite);
  return finite == 0;
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
    int64_t B, D, L, N, G;
  };
  const Size sizes[] = {{3, 6, 21, 4, 1}, {1, 70, 3, 7, 2}, {2, 20, 70, 16, 4}, {1, 1, 131, 21, 1}, {2, 3, 0, 5, 1}};
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
  for (const Size& size : sizes) {
    for (const DType dtype : dtypes) {
      for (const Packing packing : {Packing::kPlain, Packing::kCuSeqlens, Packing::kSeqIdx}) {
        for (const bool complex : {false, true}) {
          for (const bool plain : {true, false}) {  // variable B and C, exponential decay
            if (complex && (dtype == DType::kBFloat16 || dtype == DType::kFloat16) && plain) continue;
            Case c{};
            c.dtype = dtype, c.B = packing == Packing::kCuSeqlens ? 1 : size.B, c.packing = packing,
            c.complex = complex;
            c.D = size.D, c.L = size.L, c.N = size.N, c.groups_B = c.groups_C = size.G;
            if (!plain) {
              c.two_exp = random() % 2;
              if (random() % 2) c.groups_B = random() % 2;
              if (random() % 2) c.groups_C = 0;
            }
            c.softplus = random() % 2, c.skip = random() % 2, c.gate = random() % 2, c.bias = random() % 2;
            c.states = random() % 2, c.reverse = random() % 2, c.split = random() % 2;
            check([&] { return run(c, random); });
          }
        }
      }
    }
  }
  for (const DType dtype : dtypes) {
    for (const int64_t N : {1, 16, 37}) {
      for (const bool complex : {false, true}) {
        check([&] { return run_step(dtype, 3, 1, N, complex, true, random); });
        check([&] { return run_step(dtype, 2, 5, N, complex, false, random); });
      }
    }
  }
  for (const bool split : {false, true}) check([&] { return run_bad_cu_seqlens(split, random); });
  check(run_infinite);
  std::printf("%d of %d cases failed\n", failures, cases);
  return failures > 0;
}
