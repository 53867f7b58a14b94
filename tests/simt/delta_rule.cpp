// Runs every CUDA kernel of delta_rule in the emulator against its token form in fp64; without torch, so that
// sanitizers see only our code. Exit status 1 and a line per case where they differ.
//
//   delta_rule [SEED [EVERY]]     runs each EVERY-th case; SEED draws what the list of cases leaves open
//
// EVERY should have no factor in common with 2, 3 and 7, the lengths of the lists: then it reaches all their
// entries.
#include <cstdlib>
#include <random>

#include "buffer.h"
#include "common/simt/runtime.h"
#include "delta_rule/params.h"
#include "delta_rule/tile.h"
#include "delta_rule/tile_bwd.h"
#include "sequences.h"
#include "tokens.h"

namespace {

using namespace seqkern;
using namespace seqkern::delta_rule;
using naive::Batch;
using naive::Buffer;
using naive::Packing;
using naive::passes;
using naive::Sequence;
using naive::Tokens;
using naive::Wanted;
using Numbers = std::vector<double>;

struct Case {
  DType dtype;  // of q, k, v and the erase key; other tensors have this one or another
  int64_t B, L, H, HV, K, V;
  Packing packing;
  Decay form;
  bool erase, normalize, states, reverse;
  bool extreme;      // decays of any size, resets
  bool reflects;     // beta near 2: nothing is forgotten
  bool backward;     // else u is not kept either
  int64_t segments;  // of a sequence, as the plan is forced to; 0: as it chooses

  std::string text() const {
    const char* forms[] = {"none", "token", "key"};
    const auto flag = [](bool on, const char* name) { return on ? name : ""; };
    char line[256];
    std::snprintf(line, sizeof line, "%s B=%ld L=%ld H=%ld HV=%ld K=%ld V=%ld %s, decay %s%s%s%s%s%s%s%s segments=%ld",
                  naive::text(dtype), B, L, H, HV, K, V, naive::text(packing), forms[static_cast<int>(form)],
                  flag(erase, " erase"), flag(normalize, " normalize"), flag(states, " states"),
                  flag(reverse, " reverse"), flag(extreme, " extreme"), flag(reflects, " reflects"),
                  flag(!backward, " forward only"), segments);
    return line;
  }
  double scale() const { return 1 / std::sqrt(static_cast<double>(std::max<int64_t>(K, 1))); }
};

// Draws the inputs of a case. An erase key that differs from the key lets the state grow: it stays near.
struct Draw {
  const Case& c;
  std::mt19937& random;
  std::normal_distribution<double> normal;

  double operator()(int64_t) { return normal(random); }
  bool coin() { return random() % 2 == 1; }
  double uniform() { return std::uniform_real_distribution<double>()(random); }

  // Of the tensors whose dtype is free.
  DType dtype() {
    const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, c.dtype, c.dtype, c.dtype};
    return c.dtype == DType::kFloat64 ? c.dtype : dtypes[random() % 6];
  }
  double beta() {
    const unsigned kind = random() % 8;
    if (c.reflects) return kind == 0 ? 2 : 1.95 + 0.05 * uniform();
    return kind == 0 ? 0 : kind == 1 ? 2 : 2 * uniform();
  }
  double decay() {
    const unsigned kind = c.extreme ? random() % 8 : 8;
    return kind == 0   ? -INFINITY
           : kind == 1 ? -200 * std::abs(normal(random))
           : kind < 4  ? 0
                       : -0.02 - 0.2 * std::abs(normal(random));
  }
  void keys(Tokens& k, Tokens& erase, int64_t B, int64_t L) {
    Numbers x(k.width);
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t t = 0; t < L; ++t) {
        for (int64_t h = 0; h < k.heads; ++h) {
          double squares = 1e-3;
          for (double& x_i : x) x_i = normal(random), squares += x_i * x_i;
          const double size = c.normalize ? 0.5 + 2 * uniform() : 1;
          for (int64_t i = 0; i < k.width; ++i) {
            const double unit = x[i] / std::sqrt(squares);
            k.set(k.place(b, t, h, i), size * unit);
            erase.set(erase.place(b, t, h, i), 0.9 * unit + 0.2 * normal(random) / std::sqrt(k.width));
          }
        }
      }
    }
  }
};

// All tensors of a call.
struct Call {
  Case c;
  Sequences sequences;
  Draw draw;
  DType type;  // of accumulators
  Tokens q, k, erase, v, beta, decay, dO;
  Tokens o, u, dq, dk, derase, dv, dbeta, ddecay;
  Buffer initial, final, dfinal, dinitial;

  Call(const Case& c_in, const Sequences& s, std::mt19937& random)
      : c(c_in),
        sequences(s),
        draw{c, random, {}},
        type(accumulator(c.dtype)),
        q(tokens(c.dtype, c.H, c.K, draw.coin())),
        k(tokens(c.dtype, c.H, c.K, draw.coin())),
        erase(tokens(c.dtype, c.H, c.K, draw.coin())),
        v(tokens(c.dtype, c.HV, c.V, draw.coin())),
        beta(tokens(draw.dtype(), c.HV, 1, draw.coin())),
        decay(tokens(draw.dtype(), c.HV, c.form == Decay::kKey ? c.K : 1, draw.coin())),
        dO(tokens(c.dtype, c.HV, c.V, draw.coin())),
        o(tokens(c.dtype, c.HV, c.V)),
        u(tokens(operand_of(c.dtype), c.HV, c.V)),
        dq(tokens(c.dtype, c.H, c.K)),
        dk(tokens(c.dtype, c.H, c.K)),
        derase(tokens(c.dtype, c.H, c.K)),
        dv(tokens(c.dtype, c.HV, c.V)),
        dbeta(tokens(beta.array.dtype, c.HV, 1)),
        ddecay(tokens(decay.array.dtype, c.HV, decay.width)),
        initial(draw.dtype(), s.count * c.HV * c.K * c.V),
        final(type, initial.size),
        dfinal(type, initial.size),
        dinitial(initial.array.dtype, initial.size) {
    draw.keys(k, erase, c.B, c.L);
    for (Buffer* x : {static_cast<Buffer*>(&q), static_cast<Buffer*>(&v), static_cast<Buffer*>(&dO), &initial, &dfinal})
      x->fill(draw);
    beta.fill([&](int64_t) { return draw.beta(); });
    decay.fill([&](int64_t) { return draw.decay(); });
    dinitial.fill([](int64_t) { return 0; });
  }
  Call(const Call&) = delete;  // `draw` points into it

  Tokens tokens(DType dtype, int64_t heads, int64_t width, bool heads_first = false) const {
    return Tokens(dtype, c, heads, width, heads_first);
  }
  Inputs inputs() const {
    Inputs in{};
    in.sequences = sequences;
    in.heads = c.H, in.value_heads = c.HV, in.keys = c.K, in.size = c.V, in.accumulator = type;
    in.q = q.data, in.k = k.data, in.v = v.data, in.beta = beta.data;
    if (c.erase) in.erase = erase.data;
    in.form = c.form;
    if (c.form != Decay::kNone) in.decay = decay.data;
    in.normalize = c.normalize, in.scale = c.scale(), in.split_time = c.segments != 1;
    if (c.states) in.initial_state = initial.array;
    return in;
  }
  void fwd() const {
    FwdParams p{inputs()};
    p.o = o.data;
    if (c.backward) p.u = u.data;
    if (c.states) p.final_state = final.array;
    const auto plan = cuda::plan_fwd(p, c.segments);
    const Buffer workspace = naive::workspace(plan.workspace_bytes);
    p.workspace = workspace.array.data;
    cuda::fwd(p, plan, {});
  }
  void bwd() const {
    BwdParams p{};
    static_cast<Inputs&>(p) = inputs();
    p.u = u.data, p.dO = dO.data;
    p.dq = dq.data, p.dk = dk.data, p.dv = dv.data, p.dbeta = dbeta.data;
    if (c.erase) p.derase = derase.data;
    if (c.form != Decay::kNone) p.ddecay = ddecay.data;
    if (c.states) p.dfinal_state = dfinal.array, p.dinitial_state = dinitial.array;
    const auto plan = cuda::plan_bwd(p, c.segments);
    const Buffer workspace = naive::workspace(plan.workspace_bytes);
    p.workspace = workspace.array.data;
    cuda::bwd(p, plan, {});
  }
};

// Vectors of keys, contiguous as their gradient is, divided by their length where asked for [norm].
struct Keys {
  int64_t L, H, K;
  Numbers x, factor;  // (B, L, H, K), (B, L, H)
  Wanted d;           // gradient of x

  Keys(const Tokens& from, int64_t B, int64_t L_in, bool normalize)
      : L(L_in), H(from.heads), K(from.width), x(from.size), factor(B * L * H, 1), d(from) {
    for (int64_t row = 0; row < B * L * H; ++row) {
      double squares = kNormEps;
      for (int64_t i = 0; i < K; ++i) {
        x[row * K + i] = from.at(row / (L * H), row / H % L, row % H, i);
        squares += x[row * K + i] * x[row * K + i];
      }
      if (normalize) factor[row] = 1 / std::sqrt(squares);
      for (int64_t i = 0; i < K; ++i) x[row * K + i] *= factor[row];
    }
  }
  int64_t place(int64_t b, int64_t t, int64_t h) const { return ((b * L + t) * H + h) * K; }

  // [dnorm]
  Wanted gradient(bool normalize) const {
    Wanted dx(d);
    if (!normalize) return dx;
    dx.assign(dx.size(), 0), dx.largest_term = 0;
    for (size_t row = 0; row < factor.size(); ++row) {
      double along = 0;
      for (int64_t i = 0; i < K; ++i) along += x[row * K + i] * d[row * K + i];
      for (int64_t i = 0; i < K; ++i) {
        dx.add(row * K + i, factor[row] * d[row * K + i]), dx.add(row * K + i, -factor[row] * along * x[row * K + i]);
      }
    }
    return dx;
  }
};

// What the equations give, token by token in fp64.
struct Reference {
  const Call& call;
  const Case& c;
  Keys q, k, e;
  Wanted o, u, dv, dbeta, ddecay, final, dinitial;

  Reference(const Call& call_in, const Batch& batch)
      : call(call_in),
        c(call.c),
        q(call.q, c.B, c.L, c.normalize),
        k(call.k, c.B, c.L, c.normalize),
        e(call.erase, c.B, c.L, false),
        o(call.o),
        u(call.u),
        dv(call.dv),
        dbeta(call.dbeta),
        ddecay(call.ddecay),
        final(call.final),
        dinitial(call.dinitial) {
    for (const Sequence& sequence : batch.all) {
      for (int64_t hv = 0; hv < c.HV; ++hv) run(sequence, hv);
    }
  }

  double decay_of(int64_t b, int64_t t, int64_t hv, int64_t i) const {
    if (c.form == Decay::kNone) return 1;
    return std::exp(call.decay.at(b, t, hv, c.form == Decay::kKey ? i : 0));
  }

  // One head of a sequence, and its gradient.
  void run(const Sequence& sequence, int64_t hv) {
    const int64_t b = sequence.b, h = hv / (c.HV / c.H), K = c.K, V = c.V;
    const int64_t length = static_cast<int64_t>(sequence.tokens.size());
    const double scale = c.scale();
    Keys& erase = c.erase ? e : k;
    std::vector<Numbers> S(length + 1, Numbers(K * V)), old(length, Numbers(V));  // before each token; S'^T e
    for (int64_t i = 0; i < K * V && c.states; ++i) S[0][i] = call.initial[(sequence.initial * c.HV + hv) * K * V + i];

    for (int64_t j = 0; j < length; ++j) {
      const int64_t t = sequence.tokens[j], of_v = o.size() ? call.o.place(b, t, hv) : 0, of_k = k.place(b, t, h);
      for (int64_t i = 0; i < K; ++i) {
        const double a = decay_of(b, t, hv, i);
        for (int64_t n = 0; n < V; ++n) {
          S[j + 1][i * V + n] = a * S[j][i * V + n];  // [decay]
          old[j][n] += erase.x[of_k + i] * S[j + 1][i * V + n];
        }
      }
      for (int64_t n = 0; n < V; ++n)
        u[of_v + n] = call.beta.at(b, t, hv) * (call.v.at(b, t, hv, n) - old[j][n]);  // [erase]
      for (int64_t i = 0; i < K; ++i) {
        for (int64_t n = 0; n < V; ++n) {
          S[j + 1][i * V + n] += k.x[of_k + i] * u[of_v + n];          // [write]
          o[of_v + n] += scale * q.x[of_k + i] * S[j + 1][i * V + n];  // [read]
        }
      }
    }

    Numbers dS(K * V), dO(V), du(V);
    for (int64_t i = 0; i < K * V && c.states; ++i) {
      const int64_t at = (sequence.final * c.HV + hv) * K * V + i;
      final[at] = S[length][i], dS[i] = call.dfinal[at];
    }
    for (int64_t j = length - 1; j >= 0; --j) {
      const int64_t t = sequence.tokens[j], of_v = call.o.place(b, t, hv), of_k = k.place(b, t, h);
      const double beta = call.beta.at(b, t, hv);
      for (int64_t n = 0; n < V; ++n) dO[n] = scale * call.dO.at(b, t, hv, n), du[n] = 0;
      for (int64_t i = 0; i < K; ++i) {
        double dq_i = 0, dk_i = 0;
        for (int64_t n = 0; n < V; ++n) {
          dq_i += S[j + 1][i * V + n] * dO[n];
          dS[i * V + n] += q.x[of_k + i] * dO[n];
          dk_i += dS[i * V + n] * u[of_v + n];
          du[n] += dS[i * V + n] * k.x[of_k + i];
        }
        q.d.add(of_k + i, dq_i), k.d.add(of_k + i, dk_i);
      }
      const int64_t of_beta = call.dbeta.place(b, t, hv), of_decay = call.ddecay.place(b, t, hv);
      for (int64_t n = 0; n < V; ++n) {
        dbeta.add(of_beta, du[n] * (call.v.at(b, t, hv, n) - old[j][n]));
        dv[of_v + n] = beta * du[n];
      }
      for (int64_t i = 0; i < K; ++i) {
        const double a = decay_of(b, t, hv, i);
        double de_i = 0, dg_i = 0;
        for (int64_t n = 0; n < V; ++n) {
          de_i -= a * S[j][i * V + n] * dv[of_v + n];
          double& d = dS[i * V + n];  // of S', then of the state before
          d -= erase.x[of_k + i] * dv[of_v + n];
          d *= a;
          dg_i += S[j][i * V + n] * d;
        }
        erase.d.add(of_k + i, de_i);
        if (c.form != Decay::kNone) ddecay.add(of_decay + (c.form == Decay::kKey ? i : 0), dg_i);
      }
    }
    for (int64_t i = 0; i < K * V && c.states; ++i) dinitial[(sequence.initial * c.HV + hv) * K * V + i] = dS[i];
  }
};

bool run(const Case& c, std::mt19937& random) {
  const Batch batch(c.packing, c.B, c.L, c.reverse, random);
  const Call call(c, batch.sequences, random);
  const Reference want(call, batch);
  call.fwd();
  if (c.backward) call.bwd();

  // Operands of 16-bit data are rounded to 16 bits where they enter a matrix product.
  const bool narrow = size_of(c.dtype) == 2;
  const auto check = [&](const char* name, const Buffer& got, const Wanted& wanted, double terms = 1) {
    const double allowed = naive::difference(got, wanted, narrow ? c.dtype : call.type, (narrow ? 6 : 32) * terms);
    return passes(c.text(), name, allowed);
  };
  bool ok = check("o", call.o, want.o);
  if (c.states) ok &= check("final state", call.final, want.final);
  if (!c.backward) return ok;
  ok &= check("u", call.u, want.u) & check("dq", call.dq, want.q.gradient(c.normalize)) &
        check("dk", call.dk, want.k.gradient(c.normalize)) & check("dv", call.dv, want.dv);
  const double sums = 1 + std::sqrt(c.B * c.L) / 8;  // of that many terms
  ok &= check("dbeta", call.dbeta, want.dbeta, sums);
  if (c.erase) ok &= check("derase", call.derase, want.e.gradient(false));
  if (c.form != Decay::kNone) ok &= check("ddecay", call.ddecay, want.ddecay, sums);
  if (c.states) ok &= check("dinitial state", call.dinitial, want.dinitial);
  return ok;
}

// One token for each row, whose states are rows of a pool, values or keys being contiguous.
bool run_step(Case c, std::mt19937& random) {
  const std::vector<int32_t> indices = {2, -1, 0, 7};
  const int64_t R = 5, K = c.K, V = c.V, HV = c.HV;
  c.B = static_cast<int64_t>(indices.size()), c.L = 1;
  Sequences pool;
  pool.count = R;
  Call call(c, pool, random);
  const bool key_major = call.draw.coin();
  const DType dtype = call.draw.coin() ? c.dtype : call.type;
  Buffer S(dtype, R * HV * K * V);
  S.fill(call.draw);
  const auto place = [&](int64_t row, int64_t h, int64_t i, int64_t n) {
    return (row * HV + h) * K * V + (key_major ? i * V + n : n * K + i);
  };

  const Keys q(call.q, c.B, 1, c.normalize), k(call.k, c.B, 1, c.normalize), e(call.erase, c.B, 1, false);
  Wanted S_want(S), o_want(call.o);
  for (int64_t i = 0; i < S.size; ++i) S_want[i] = S[i];
  for (int64_t b = 0; b < c.B; ++b) {
    const int64_t row = indices[b];
    if (row < 0 || row >= R) continue;
    for (int64_t hv = 0; hv < HV; ++hv) {
      const int64_t h = hv / (HV / c.H), of_k = k.place(b, 0, h);
      for (int64_t n = 0; n < V; ++n) {
        double old = 0;
        for (int64_t i = 0; i < K; ++i) {
          double& x = S_want[place(row, hv, i, n)];
          if (c.form != Decay::kNone) x *= std::exp(call.decay.at(b, 0, hv, c.form == Decay::kKey ? i : 0));
          old += x * (c.erase ? e : k).x[of_k + i];
        }
        const double u = call.beta.at(b, 0, hv) * (call.v.at(b, 0, hv, n) - old);
        for (int64_t i = 0; i < K; ++i) {
          double& x = S_want[place(row, hv, i, n)];
          x += k.x[of_k + i] * u;
          o_want[call.o.place(b, 0, hv, n)] += c.scale() * x * q.x[of_k + i];
        }
      }
    }
  }

  const auto rows = [](const Tokens& x) -> StepParams::Rows {
    return {x.array.data, x.array.dtype, x.data.b, x.data.h, 1};
  };
  StepParams p{};
  p.batch = c.B, p.heads = c.H, p.value_heads = HV, p.keys = K, p.size = V, p.rows = R, p.accumulator = call.type;
  p.S = {S.array.data, dtype, HV * K * V, K * V, key_major ? V : 1}, p.S_v = key_major ? 1 : K;
  p.q = rows(call.q), p.k = rows(call.k), p.v = rows(call.v), p.beta = rows(call.beta), p.o = rows(call.o);
  if (c.erase) p.erase = rows(call.erase);
  p.form = c.form;
  if (c.form != Decay::kNone) p.decay = rows(call.decay);
  p.normalize = c.normalize, p.scale = c.scale(), p.state_indices = indices.data();
  cuda::step(p, {});
  const std::string name = "step " + c.text() + (key_major ? "" : " value major");
  return passes(name, "o", naive::difference(call.o, o_want, call.type, 64)) &
         passes(name, "S", naive::difference(S, S_want, call.type, 64));
}

// Values that no caller should pass: results are of no interest, only that nothing else is touched.
bool run_bad_cu_seqlens(Case c, std::mt19937& random) {
  const std::vector<std::vector<int64_t>> all = {{5, 3, -7, 100, 20},      {100, 100}, {-5, -3}, {1, 36}, {50, 20, 37},
                                                 {INT64_MIN, INT64_MAX, 0}};
  bool ok = true;
  for (const std::vector<int64_t>& starts : all) {
    c.B = 1, c.L = 40, c.segments = random() % 3, c.states = c.backward = true;
    Sequences s;
    s.batch = 1, s.length = c.L, s.count = static_cast<int64_t>(starts.size()) - 1;
    s.cu_seqlens = starts.data(), s.cu_seqlens_is_int64 = true;
    Call call(c, s, random);
    call.u.fill([](int64_t) { return 0; });  // of tokens of no sequence
    call.fwd(), call.bwd();
    for (int64_t i = 0; i < call.final.size; ++i) ok &= std::isfinite(call.final[i]);
  }
  if (!ok) std::printf("bad cu_seqlens, %s: a result is not finite\n", c.text().c_str());
  return ok;
}

// NaN and infinity in a token reach the tokens from its chunk on, and no bit of anything else.
bool run_infinite(Case c, std::mt19937& random) {
  const int64_t at = 41;
  c.B = 2, c.L = 70, c.segments = 1, c.backward = false;
  Sequences s;
  s.batch = s.count = c.B, s.length = c.L;
  int64_t wrong = 0;
  for (const double value : {static_cast<double>(INFINITY), static_cast<double>(NAN)}) {
    Call call(c, s, random);
    call.fwd();
    Numbers before(call.o.size);
    for (int64_t i = 0; i < call.o.size; ++i) before[i] = call.o[i];
    call.k.set(call.k.place(1, at, 0, 3), value);
    call.fwd();
    const int64_t tokens = cuda::plan_fwd(FwdParams{call.inputs()}, 1).tile.tokens;
    for (int64_t i = 0; i < call.o.size; ++i) {
      const int64_t t = i / c.V % c.L;
      const bool after = i / c.V / c.L == 1 && t >= at;
      if (i / c.V / c.L == 1 && t >= at / tokens * tokens && t < at) continue;  // may be NaN, and nothing that is wrong
      wrong += after ? std::isfinite(call.o[i]) : call.o[i] != before[i];
    }
  }
  if (wrong > 0) std::printf("NaN or infinity, %s: %ld results are wrong\n", c.text().c_str(), wrong);
  return wrong == 0;
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
    int64_t B, L, H, HV, K, V;
  };
  const auto case_of = [&](DType dtype, Decay form, const Size& size) {
    const auto one_of = [&](unsigned n) { return random() % n == 0; };
    Case c{};
    c.dtype = dtype, c.form = form;
    c.B = size.B, c.L = size.L, c.H = size.H, c.HV = size.HV, c.K = size.K, c.V = size.V;
    c.packing = one_of(2) ? Packing::kCuSeqlens : Packing::kPlain;
    if (c.packing == Packing::kCuSeqlens) c.B = 1;
    c.erase = one_of(3), c.normalize = one_of(2), c.states = !one_of(4), c.reverse = one_of(2), c.extreme = one_of(3);
    c.reflects = one_of(4), c.backward = !one_of(6), c.segments = random() % 4;
    return c;
  };

  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
  const Decay forms[] = {Decay::kKey, Decay::kToken, Decay::kNone};
  for (const Size& size : {Size{2, 21, 2, 2, 3, 5},
                           {1, 70, 1, 2, 16, 20},
                           {1, 40, 1, 1, 40, 70},
                           {1, 40, 1, 1, 100, 33},
                           {1, 20, 1, 3, 64, 24},
                           {2, 0, 2, 2, 3, 4},
                           {1, 20, 1, 1, 130, 9},
                           {1, 5, 1, 1, 0, 3},
                           {1, 5, 1, 1, 3, 0}}) {
    for (const DType dtype : dtypes) {
      for (const Decay form : {Decay::kKey, random() % 3 ? Decay::kToken : Decay::kNone}) {
        const Case c = case_of(dtype, form, size);
        check([&] { return run(c, random); });
      }
    }
  }
  for (const Decay form : forms) {
    const Case c = case_of(DType::kFloat32, form, {1, 1, 1, 1, 16, 20});
    check([&] { return run_bad_cu_seqlens(c, random); });
    check([&] { return run_infinite(c, random); });
  }
  for (const Size& size : {Size{1, 1, 2, 2, 3, 5},
                           {1, 1, 1, 3, 64, 40},
                           {1, 1, 2, 4, 33, 16},
                           {1, 1, 1, 1, 200, 130},
                           {1, 1, 1, 2, 0, 3},
                           {1, 1, 1, 1, 4, 300},
                           {1, 1, 3, 3, 16, 0}}) {
    for (const DType dtype : dtypes) {
      for (const Decay form : forms) {
        const Case c = case_of(dtype, form, size);
        check([&] { return run_step(c, random); });
      }
    }
  }
  std::printf("%d of %d cases failed\n", failures, cases);
  return failures > 0;
}
