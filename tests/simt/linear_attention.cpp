// Runs every CUDA kernel of linear_attention in the emulator against its token form in fp64; without torch, so that
// sanitizers see only our code. Exit status 1 and a line per case where they differ.
//
//   linear_attention [SEED [EVERY]]     runs each EVERY-th case; SEED draws what the list of cases leaves open
//
// EVERY should have no factor in common with 2, 3, 5 and 7, the lengths of the lists: then it reaches all their
// entries.
#include <cstdlib>
#include <random>

#include "buffer.h"
#include "common/simt/runtime.h"
#include "linear_attention/params.h"
#include "linear_attention/tile.h"
#include "linear_attention/tile_bwd.h"
#include "sequences.h"
#include "tokens.h"

namespace {

using namespace seqkern;
using namespace seqkern::linear_attention;
using naive::Batch;
using naive::Buffer;
using naive::Packing;
using naive::passes;
using naive::Sequence;
using naive::Tokens;
using naive::Wanted;

// What the equations leave open.
struct Options {
  Form form;
  Normalizer normalizer;
  bool read_previous, bonus, constant, softplus, bias, skip, skip_per_head, gate, value_major;

  std::string text() const {
    const char* forms[] = {"none", "token", "key", "delta", "exp"};
    const char* normalizers[] = {"", " sum", " max"};
    const auto flag = [](bool on, const char* name) { return on ? name : ""; };
    return std::string(forms[static_cast<int>(form)]) + normalizers[static_cast<int>(normalizer)] +
           flag(read_previous, " previous") + flag(bonus, " bonus") + flag(constant, " constant") +
           flag(softplus, " softplus") + flag(bias, " bias") + flag(skip, skip_per_head ? " D(HV)" : " D") +
           flag(gate, " gate") + flag(value_major, " value_major");
  }
};

// Of a form, what may come with it.
Options draw_options(Form form, std::mt19937& random) {
  const auto coin = [&] { return random() % 2 == 1; };
  Options o{};
  o.form = form, o.value_major = coin();
  if (form == Form::kExp) {
    o.normalizer = Normalizer::kMax;
  } else if (form == Form::kDelta) {
    o.softplus = coin(), o.bias = coin(), o.skip = coin(), o.skip_per_head = coin(), o.gate = coin();
  } else {
    o.normalizer = coin() ? Normalizer::kSum : Normalizer::kNone;
    o.read_previous = coin(), o.bonus = o.read_previous && coin(), o.constant = form == Form::kToken && coin();
  }
  return o;
}

constexpr double kLow = 0.01, kHigh = 1.5, kEps = 1e-3;  // limits of delta

// Gates of one head and token: what enters, what they come to [gate], and the way back.
struct Gate {
  double f = 0, raw = 0, delta = 0;  // log sigmoid(decay); delta before and after its limits
  double w = 1, m = 0;
  bool kept = false;      // the maximum is f + the one before
  std::vector<double> g;  // of each key
};

double log_sigmoid(double x) {
  return x > 0 ? -std::log1p(std::exp(-x)) : x - std::log1p(std::exp(x));
}
double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

Gate gate_of(const Options& o, int64_t K, const std::vector<double>& decay, double input, double A, double bias,
             double m) {
  Gate gate;
  gate.g.assign(K, 0);
  if (o.form == Form::kToken) gate.g.assign(K, decay[0]);
  if (o.form == Form::kKey) gate.g = decay;
  if (o.form == Form::kDelta) {
    gate.raw = decay[0] + bias;
    gate.delta = o.softplus ? -log_sigmoid(-gate.raw) : gate.raw;
    gate.w = std::min(std::max(gate.delta, kLow), kHigh);
    gate.g.assign(K, gate.w * A);
  }
  if (o.form == Form::kExp) {
    gate.f = log_sigmoid(decay[0]), gate.kept = !(input > gate.f + m);
    gate.m = std::max(gate.f + m, input);
    const bool empty = gate.m == -INFINITY;
    gate.g.assign(K, empty ? -INFINITY : gate.f + m - gate.m);
    gate.w = empty ? 0 : std::exp(input - gate.m);
  }
  return gate;
}

struct Case {
  DType dtype;  // of q, k and v; other tensors have this one or another
  int64_t B, L, H, HV, K, V;
  Packing packing;
  Options options;
  bool states, reverse, extreme;
  int64_t segments;  // of a sequence, as the plan is forced to; 0: as it chooses

  std::string text() const {
    char line[256];
    std::snprintf(line, sizeof line, "%s B=%ld L=%ld H=%ld HV=%ld K=%ld V=%ld %s%s%s%s segments=%ld, ",
                  naive::text(dtype), B, L, H, HV, K, V, naive::text(packing), states ? " states" : "",
                  reverse ? " reverse" : "", extreme ? " extreme" : "", segments);
    return line + options.text();
  }
};

struct States {
  Buffer S, z, m;

  template <typename DrawDType>
  States(DrawDType&& dtype, int64_t rows, const Case& c)
      : S(dtype(), rows * c.HV * c.K * c.V), z(dtype(), rows * c.HV * c.K), m(dtype(), rows * c.HV) {}
  State state(const Options& o) const {
    State state{S.array, {}, {}};
    if (o.normalizer != Normalizer::kNone) state.z = z.array;
    if (o.normalizer == Normalizer::kMax) state.m = m.array;
    return state;
  }
};

// What an empty state holds counts as zero, whatever it is.
void forget_empty(States& states, const Case& c) {
  for (int64_t i = 0; i < states.m.size; ++i) {
    if (states.m[i] != -INFINITY) continue;
    for (int64_t j = 0; j < c.K * c.V; ++j) states.S.set(i * c.K * c.V + j, NAN);
    for (int64_t j = 0; j < c.K; ++j) states.z.set(i * c.K + j, NAN);
  }
}

// A state of one head, and its place in States.
struct HeadState {
  std::vector<double> S, z;  // (K, V), (K,)
  double m;

  HeadState(int64_t K, int64_t V) : S(K * V), z(K), m(-INFINITY) {}

  template <typename Visit>  // f(number, index) of S and z
  void visit(const Options& o, int64_t row, int64_t K, int64_t V, Visit&& f) {
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t v = 0; v < V; ++v) f(S[k * V + v], 0, row * K * V + (o.value_major ? v * K + k : k * V + v));
      f(z[k], 1, row * K + k);
    }
  }
};

// `segments` of a sequence, or as many as the plan chooses if 0.
void run_fwd(FwdParams& p, int64_t segments) {
  const auto plan = cuda::plan_fwd(p, segments);
  const Buffer workspace = naive::workspace(plan.workspace_bytes);
  p.workspace = workspace.array.data;
  cuda::fwd(p, plan, {});
}
void run_bwd(BwdParams& p, int64_t segments) {
  const auto plan = cuda::plan_bwd(p, segments);
  const Buffer workspace = naive::workspace(plan.workspace.bytes);
  p.workspace = workspace.array.data;
  cuda::bwd(p, plan, {});
}

bool run(const Case& c, std::mt19937& random) {
  std::normal_distribution<double> normal;
  const auto draw = [&](int64_t) { return normal(random); };
  const auto coin = [&] { return random() % 2 == 1; };
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, c.dtype, c.dtype, c.dtype, c.dtype};
  const auto some_dtype = [&] { return c.dtype == DType::kFloat64 ? c.dtype : dtypes[random() % 7]; };
  const DType type = accumulator(c.dtype);
  const auto accumulators = [&] { return type; };
  const int64_t H = c.H, HV = c.HV, K = c.K, V = c.V;
  const Options& o = c.options;
  const bool normalized = o.normalizer != Normalizer::kNone;
  const double scale = o.normalizer == Normalizer::kSum ? 1 : 1 / std::sqrt(static_cast<double>(K));

  const Batch batch(c.packing, c.B, c.L, c.reverse, random);
  const int64_t rows = batch.sequences.count;
  Tokens q(c.dtype, c, H, K, coin()), k(c.dtype, c, H, K, coin()), v(c.dtype, c, HV, V, coin());
  Tokens gate(some_dtype(), c, HV, V, coin()), dy(c.dtype, c, HV, V, coin());
  const int64_t decays = o.form == Form::kKey ? K : 1;
  Tokens decay(some_dtype(), c, HV, decays), input(some_dtype(), c, HV, 1);
  if (o.constant) decay.data.b = decay.data.l = 0;
  Case one_token = c;
  one_token.B = one_token.L = 1;
  Tokens y(c.dtype, c, HV, V), out(c.dtype, c, HV, V), dq(c.dtype, c, H, K), dk(c.dtype, c, H, K),
      dv(c.dtype, c, HV, V), dgate(gate.array.dtype, c, HV, V),
      ddecay(decay.array.dtype, o.constant ? one_token : c, HV, decays), dinput(input.array.dtype, c, HV, 1);
  ddecay.data.b = decay.data.b, ddecay.data.l = decay.data.l;
  Buffer A(some_dtype(), HV), bias(some_dtype(), HV), bonus(some_dtype(), H * K),
      skip(some_dtype(), o.skip_per_head ? HV : HV * V);
  Buffer dA(A.array.dtype, HV), dbias(bias.array.dtype, HV), dbonus(bonus.array.dtype, H * K),
      dskip(skip.array.dtype, skip.size);
  Buffer denominators(type, c.B * c.L * HV), maxima(type, denominators.size);
  States initial(some_dtype, rows, c), final(accumulators, rows, c), dfinal(accumulators, rows, c);
  States dinitial(accumulators, rows, c);
  dinitial.S = Buffer(initial.S.array.dtype, initial.S.size), dinitial.z = Buffer(initial.z.array.dtype, rows * HV * K),
  dinitial.m = Buffer(initial.m.array.dtype, rows * HV);

  // With a normalizer all terms of z . q have one sign, with kSum a positive one: it stays away from 0.
  const auto positive = [&](int64_t) { return 0.1 + std::abs(normal(random)); };
  double sign = 1;
  const auto of_one_sign = [&](int64_t i) {
    if (i % K == 0) sign = o.normalizer == Normalizer::kMax && coin() ? -1 : 1;
    return sign * positive(i);
  };
  for (Buffer* buffer : {static_cast<Buffer*>(&k), &initial.z, &bonus}) {
    normalized ? buffer->fill(positive) : buffer->fill(draw);
  }
  normalized ? q.fill(of_one_sign) : q.fill(draw);
  for (Buffer* buffer : {static_cast<Buffer*>(&v), static_cast<Buffer*>(&gate), static_cast<Buffer*>(&dy),
                         static_cast<Buffer*>(&input), &bias, &skip, &initial.S, &dfinal.S, &dfinal.z, &dfinal.m}) {
    buffer->fill(draw);
  }
  A.fill([&](int64_t) { return -std::exp(normal(random)); });
  initial.m.fill([&](int64_t i) { return i % 5 == 1 ? -INFINITY : normal(random); });
  if (o.normalizer == Normalizer::kMax) forget_empty(initial, c);
  for (Buffer* buffer : {&dinitial.S, &dinitial.z, &dinitial.m}) buffer->fill([](int64_t) { return 0; });
  const auto draw_decay = [&](int64_t) {
    const unsigned kind = c.extreme ? random() % 8 : 8;
    if (o.form == Form::kDelta) return o.softplus ? normal(random) : 0.5 + 0.5 * normal(random);
    if (o.form == Form::kExp) return kind == 0 ? -INFINITY : kind == 1 ? 1000.0 : 2 + 2 * normal(random);
    const double large = o.constant ? 0 : -200 * std::abs(normal(random));  // a gradient may vanish beside others
    return kind == 0 ? -INFINITY : kind == 1 ? large : kind < 4 ? 0 : -0.2 * positive(0);
  };
  decay.fill(draw_decay);
  for (int64_t i = 0; i < input.size && c.extreme && o.form == Form::kExp; ++i) {
    const bool forgets = decay[i] == -INFINITY;  // and without an input leaves an empty state
    if (forgets || random() % 4 == 0) input.set(i, random() % 3 == 0 ? -INFINITY : 10 * normal(random));
  }
  // Padding holds NaN: nothing may depend on it.
  for (int64_t b = 0; b < c.B; ++b) {
    for (int64_t t = 0; t < c.L; ++t) {
      for (Tokens* x : {&q, &k, &v, &gate, &dy, &decay, &input}) {
        if (!batch.padding(b, t) || (x == &decay && o.constant)) continue;
        for (int64_t h = 0; h < x->heads; ++h) {
          for (int64_t i = 0; i < x->width; ++i) x->set(x->place(b, t, h, i), NAN);
        }
      }
    }
  }

  Inputs in{};
  in.sequences = batch.sequences;
  in.heads = H, in.value_heads = HV, in.keys = K, in.size = V, in.accumulator = type;
  in.q = q.data, in.k = k.data, in.v = v.data;
  in.gates.form = o.form, in.gates.softplus = o.softplus, in.gates.low = kLow, in.gates.high = kHigh;
  if (o.form != Form::kNone) in.gates.decay = decay.data;
  if (o.form == Form::kExp) in.gates.input = input.data;
  if (o.form == Form::kDelta) in.gates.A = A.array;
  if (o.bias) in.gates.bias = bias.array;
  if (o.bonus) in.bonus = bonus.array;
  if (o.skip) in.skip = skip.array, in.skip_h = o.skip_per_head ? 1 : V, in.skip_v = o.skip_per_head ? 0 : 1;
  if (o.gate) in.gate = gate.data;
  in.normalizer = o.normalizer, in.read_previous = o.read_previous, in.value_major = o.value_major;
  in.scale = scale, in.eps = kEps, in.split_time = c.segments != 1;
  if (c.states) in.initial_state = initial.state(o);

  FwdParams fwd{in};
  const bool keeps_o = o.gate || (o.skip && normalized);
  const Tokens& kept_o = keeps_o ? out : y;
  fwd.y = y.data;
  if (keeps_o) fwd.o = out.data;
  if (normalized) fwd.denominators = denominators.array.data;
  if (o.normalizer == Normalizer::kMax) fwd.maxima = maxima.array.data;
  if (c.states) fwd.final_state = final.state(o);
  run_fwd(fwd, c.segments);

  BwdParams bwd{};
  static_cast<Inputs&>(bwd) = in;
  bwd.dy = dy.data;
  if (o.gate || normalized) bwd.o = kept_o.data;
  bwd.denominators = fwd.denominators, bwd.maxima = fwd.maxima;
  bwd.dq = dq.data, bwd.dk = dk.data, bwd.dv = dv.data;
  if (o.gate) bwd.dgate = dgate.data;
  if (o.form != Form::kNone) bwd.ddecay = ddecay.data;
  if (o.form == Form::kExp) bwd.dinput = dinput.data;
  if (o.form == Form::kDelta) bwd.dA = dA.array;
  if (o.bias) bwd.dbias = dbias.array;
  if (o.bonus) bwd.dbonus = dbonus.array;
  if (o.skip) bwd.dskip = dskip.array;
  if (c.states) bwd.dfinal_state = dfinal.state(o), bwd.dinitial_state = dinitial.state(o);
  run_bwd(bwd, c.segments);

  Wanted y_want(y), o_want(out), dq_want(dq), dk_want(dk), dv_want(dv), dgate_want(dgate), ddecay_want(ddecay),
      dinput_want(dinput);
  Wanted dA_want(dA), dbias_want(dbias), dbonus_want(dbonus), dskip_want(dskip), maxima_want(maxima);
  Wanted denominators_want(denominators), m_want(final.m), dm_want(dinitial.m);
  Wanted final_want[] = {Wanted(final.S), Wanted(final.z)};
  Wanted dinitial_want[] = {Wanted(dinitial.S), Wanted(dinitial.z)};
  for (Wanted* kept : {&denominators_want, &maxima_want}) kept->assign(kept->size(), NAN);  // of padding: anything

  for (const Sequence& sequence : batch.all) {
    const int64_t b = sequence.b, length = static_cast<int64_t>(sequence.tokens.size());
    const bool enters = c.states && sequence.initial >= 0, leaves = c.states && sequence.final >= 0;
    for (int64_t hv = 0; hv < HV; ++hv) {
      const int64_t h = hv / (HV / H), in_row = sequence.initial * HV + hv, out_row = sequence.final * HV + hv;
      const auto number = [](const Buffer& of, int64_t i) { return i < of.size ? of[i] : 0; };
      std::vector<HeadState> state(length + 1, HeadState(K, V));  // state[j + 1] follows token j
      std::vector<Gate> gates(length);
      std::vector<double> d(length), e(length), token(length);  // token: q . (bonus * k)
      std::vector<std::vector<double>> o_of(length, std::vector<double>(V));
      HeadState& start = state[0];
      if (enters) {
        if (o.normalizer == Normalizer::kMax) start.m = initial.m[in_row];
        const bool empty = o.normalizer == Normalizer::kMax && start.m == -INFINITY;
        start.visit(o, in_row, K, V,
                    [&](double& x, int part, int64_t i) { x = empty ? 0 : (part == 0 ? initial.S : initial.z)[i]; });
      }
      const auto skip_at = [&](int64_t i) { return o.skip_per_head ? hv : hv * V + i; };
      const auto bonus_at = [&](int64_t i) { return o.bonus ? bonus[h * K + i] : 0; };
      const auto silu = [&](int64_t t, int64_t i) {
        const double x = gate.at(b, t, hv, i);
        return o.gate ? x * sigmoid(x) : 1;
      };

      for (int64_t j = 0; j < length; ++j) {
        const int64_t t = sequence.tokens[j];
        const HeadState& before = state[j];
        HeadState& after = state[j + 1];
        std::vector<double> decays_of(decays);
        for (int64_t i = 0; i < decays; ++i) decays_of[i] = number(decay, decay.place(b, t, hv, i));
        const Gate& g = gates[j] = gate_of(o, K, decays_of, input.at(b, t, hv), A[hv], o.bias ? bias[hv] : 0, before.m);
        after.m = g.m;
        const HeadState& read = o.read_previous ? before : after;
        for (int64_t i = 0; i < K; ++i) {
          const double a = std::exp(g.g[i]), write = g.w * k.at(b, t, h, i), q_i = q.at(b, t, h, i);
          for (int64_t u = 0; u < V; ++u) after.S[i * V + u] = a * before.S[i * V + u] + write * v.at(b, t, hv, u);
          after.z[i] = a * before.z[i] + write;
          if (o.read_previous) token[j] += q_i * bonus_at(i) * k.at(b, t, h, i);
          for (int64_t u = 0; u < V; ++u) o_of[j][u] += scale * q_i * read.S[i * V + u];
          e[j] += q_i * read.z[i];
        }
        e[j] += token[j];
        d[j] = 1;
        if (o.normalizer == Normalizer::kSum) d[j] = e[j] + kEps;
        if (o.normalizer == Normalizer::kMax) d[j] = std::max(std::abs(scale * e[j]), std::exp(-g.m)) + kEps;
        const int64_t place = (b * c.L + t) * HV + hv;
        denominators_want[place] = g.m == -INFINITY ? NAN : e[j], maxima_want[place] = g.m;
        for (int64_t u = 0; u < V; ++u) {
          o_of[j][u] = (o_of[j][u] + scale * token[j] * v.at(b, t, hv, u)) / d[j];
          const double skipped = o.skip ? skip[skip_at(u)] * v.at(b, t, hv, u) : 0;
          o_want[out.place(b, t, hv, u)] = o_of[j][u];
          y_want[y.place(b, t, hv, u)] = (o_of[j][u] + skipped) * silu(t, u);
        }
      }

      HeadState ds(K, V);  // gradient of the state after token j; ds.m: of its m
      ds.m = 0;
      if (leaves) {
        state[length].visit(o, out_row, K, V, [&](double& x, int part, int64_t i) { final_want[part][i] = x; });
        m_want[out_row] = state[length].m;
        ds.visit(o, out_row, K, V, [&](double& x, int part, int64_t i) { x = (part == 0 ? dfinal.S : dfinal.z)[i]; });
        if (!normalized) ds.z.assign(K, 0);
        if (o.normalizer == Normalizer::kMax) ds.m = dfinal.m[out_row];
      }
      for (int64_t j = length - 1; j >= 0; --j) {
        const int64_t t = sequence.tokens[j];
        const HeadState &before = state[j], &read = o.read_previous ? before : state[j + 1];
        const Gate& g = gates[j];
        if (o.normalizer == Normalizer::kMax && g.m == -INFINITY) {  // nothing has come yet
          ds = HeadState(K, V), ds.m = 0;
          for (int64_t u = 0; u < V && o.gate; ++u) dgate_want[dgate.place(b, t, hv, u)] = 0;
          continue;
        }
        std::vector<double> dn(V);
        // dd_kept: of o as the forward has stored it, since do . o may cancel.
        double dd = 0, dd_kept = 0, of_token = 0, dm = ds.m;
        for (int64_t u = 0; u < V; ++u) {  // [dout]
          const double value = v.at(b, t, hv, u), D = o.skip ? skip[skip_at(u)] : 0, dy_u = dy.at(b, t, hv, u);
          const double do_ = dy_u * silu(t, u), x = gate.at(b, t, hv, u);
          if (o.gate) {
            dgate_want[dgate.place(b, t, hv, u)] =
                dy_u * (o_of[j][u] + D * value) * sigmoid(x) * (1 + x * (1 - sigmoid(x)));
          }
          if (o.skip) dskip_want.add(skip_at(u), do_ * value);
          dv_want.add(dv.place(b, t, hv, u), D * do_);
          dn[u] = scale * do_ / d[j];
          dd -= do_ * o_of[j][u] / d[j], dd_kept -= do_ * kept_o.at(b, t, hv, u) / d[j];
          of_token += dn[u] * value;
        }
        double de = 0;
        if (o.normalizer == Normalizer::kSum) de = dd_kept;
        if (o.normalizer == Normalizer::kMax) {
          if (std::abs(scale * e[j]) > std::exp(-g.m)) {
            de = dd_kept * scale * (e[j] > 0 ? 1 : -1);
            dm += (dd_kept - dd) * std::abs(scale * e[j]);  // what dz . z will take too much
          } else {
            dm -= dd * std::exp(-g.m);
          }
        }
        HeadState of_read(K, V);  // gradient of what is read
        for (int64_t i = 0; i < K; ++i) {
          const double q_i = q.at(b, t, h, i);
          double dq_i = 0;
          for (int64_t u = 0; u < V; ++u) {
            dq_i += read.S[i * V + u] * dn[u];
            of_read.S[i * V + u] = q_i * dn[u];
          }
          of_read.z[i] = q_i * de;
          dq_want.add(dq.place(b, t, h, i), dq_i), dq_want.add(dq.place(b, t, h, i), read.z[i] * de);  // may cancel
        }
        if (o.read_previous) {
          const double d_token = of_token + de;
          for (int64_t i = 0; i < K; ++i) {
            const double q_i = q.at(b, t, h, i), k_i = k.at(b, t, h, i);
            dq_want.add(dq.place(b, t, h, i), bonus_at(i) * k_i * d_token);
            dk_want.add(dk.place(b, t, h, i), bonus_at(i) * q_i * d_token);
            if (o.bonus) dbonus_want.add(h * K + i, q_i * k_i * d_token);
          }
          for (int64_t u = 0; u < V; ++u) dv_want.add(dv.place(b, t, hv, u), token[j] * dn[u]);
        } else {
          for (int64_t i = 0; i < K * V; ++i) ds.S[i] += of_read.S[i];
          for (int64_t i = 0; i < K; ++i) ds.z[i] += of_read.z[i];
        }

        double dw = 0;
        std::vector<double> dg(K), of_v(V);
        for (int64_t i = 0; i < K; ++i) {
          const double k_i = k.at(b, t, h, i), a = std::exp(g.g[i]), dz_i = ds.z[i];
          double dk_i = 0;
          dg[i] = a * ds.z[i] * before.z[i];
          for (int64_t u = 0; u < V; ++u) {
            double& dS = ds.S[i * V + u];
            dk_i += dS * v.at(b, t, hv, u), of_v[u] += g.w * k_i * dS;
            dg[i] += a * dS * before.S[i * V + u];
            dS *= a;
            if (o.read_previous) dS += of_read.S[i * V + u];
          }
          ds.z[i] *= a;
          if (o.read_previous) ds.z[i] += of_read.z[i];
          dk_want.add(dk.place(b, t, h, i), g.w * dk_i), dk_want.add(dk.place(b, t, h, i), g.w * dz_i);
          dw += k_i * (dk_i + dz_i);
        }
        for (int64_t u = 0; u < V; ++u) dv_want.add(dv.place(b, t, hv, u), of_v[u]);

        double all = 0;
        for (const double x : dg) all += x;
        const int64_t at = o.constant ? decay.place(0, 0, hv) : ddecay.place(b, t, hv);
        if (o.form == Form::kToken) ddecay_want.add(at, all);
        for (int64_t i = 0; i < K && o.form == Form::kKey; ++i) ddecay_want[at + i] = dg[i];
        if (o.form == Form::kDelta) {
          dA_want.add(hv, all * g.w);
          const bool inside = kLow <= g.delta && g.delta <= kHigh;
          const double draw = inside ? (A[hv] * all + dw) * (o.softplus ? sigmoid(g.raw) : 1) : 0;
          ddecay_want[at] = draw;
          if (o.bias) dbias_want.add(hv, draw);
        }
        if (o.form == Form::kExp) {
          dm -= all + g.w * dw;
          const double x = decay.at(b, t, hv);
          ddecay_want[at] = (all + (g.kept ? dm : 0)) * sigmoid(-x);
          dinput_want[dinput.place(b, t, hv)] = g.w * dw + (g.kept ? 0 : dm);
          ds.m = all + (g.kept ? dm : 0);
          dm_want.largest_term = std::max(dm_want.largest_term, std::abs(all));  // sums of such cancel
        }
      }
      if (enters && !(o.normalizer == Normalizer::kMax && start.m == -INFINITY)) {
        ds.visit(o, in_row, K, V, [&](double& x, int part, int64_t i) { dinitial_want[part][i] = x; });
        dm_want[in_row] = ds.m;
      }
    }
  }

  // Operands of 16-bit data are rounded to 16 bits where they enter a matrix product. The sum of f and a large m loses
  // digits, and so does its exponential.
  const DType rounded = size_of(c.dtype) == 2 ? c.dtype : type;
  const double terms = size_of(c.dtype) == 2 ? 12 : c.extreme && o.form == Form::kExp ? 1024 : 64;
  const auto check = [&](const char* name, const Buffer& got, const Wanted& want, double more = 1) {
    return passes(c.text(), name, naive::difference(got, want, rounded, more * terms));
  };
  const double sums = 1 + std::sqrt(c.B * c.L) / 8, products = 1 + std::sqrt(K * V) / 8;  // that many terms
  bool ok = check("y", y, y_want);
  if (keeps_o) ok &= check("o", out, o_want);
  if (normalized) ok &= check("denominators", denominators, denominators_want);
  if (o.normalizer == Normalizer::kMax) ok &= check("maxima", maxima, maxima_want);
  if (c.states) {
    ok &= check("final S", final.S, final_want[0]) & check("dinitial S", dinitial.S, dinitial_want[0]);
    if (normalized) ok &= check("final z", final.z, final_want[1]) & check("dinitial z", dinitial.z, dinitial_want[1]);
    if (o.normalizer == Normalizer::kMax)
      ok &= check("final m", final.m, m_want) & check("dinitial m", dinitial.m, dm_want, products);
  }
  ok &= check("dq", dq, dq_want) & check("dk", dk, dk_want) & check("dv", dv, dv_want);
  if (o.gate) ok &= check("dgate", dgate, dgate_want);
  const double of_decay = o.form == Form::kExp ? std::max(sums, products) : sums;  // dg and dm cancel
  if (o.form != Form::kNone) ok &= check("ddecay", ddecay, ddecay_want, of_decay);
  if (o.form == Form::kExp) ok &= check("dinput", dinput, dinput_want, products);
  if (o.form == Form::kDelta) ok &= check("dA", dA, dA_want, sums);
  if (o.bias) ok &= check("dbias", dbias, dbias_want, sums);
  if (o.bonus) ok &= check("dbonus", dbonus, dbonus_want, sums);
  if (o.skip) ok &= check("dskip", dskip, dskip_want, sums);
  return ok;
}

// One token for each row, whose states are rows of a pool.
bool run_step(DType dtype, int64_t H, int64_t HV, int64_t K, int64_t V, const Options& o, std::mt19937& random) {
  std::normal_distribution<double> normal;
  const auto draw = [&](int64_t) { return normal(random); };
  const std::vector<int32_t> indices = {2, -1, 0, 7};
  const int64_t R = 5;
  const DType type = accumulator(dtype);
  Case c{};
  c.B = static_cast<int64_t>(indices.size()), c.L = 1, c.H = H, c.HV = HV, c.K = K, c.V = V;
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, dtype};
  const auto some_dtype = [&] { return dtype == DType::kFloat64 ? dtype : dtypes[random() % 4]; };
  const int64_t decays = o.form == Form::kKey ? K : 1;
  States state([&] { return random() % 2 ? dtype : type; }, R, c);
  Tokens q(dtype, c, H, K), k(dtype, c, H, K), v(dtype, c, HV, V), gate(some_dtype(), c, HV, V), y(dtype, c, HV, V);
  Tokens decay(some_dtype(), c, HV, decays), input(some_dtype(), c, HV, 1);
  Buffer A(some_dtype(), HV), bias(some_dtype(), HV), bonus(some_dtype(), H * K),
      skip(some_dtype(), o.skip_per_head ? HV : HV * V);
  const auto positive = [&](int64_t) { return 0.1 + std::abs(normal(random)); };
  for (Buffer* buffer : {static_cast<Buffer*>(&q), static_cast<Buffer*>(&k), &state.z, &bonus}) {
    o.normalizer == Normalizer::kSum ? buffer->fill(positive) : buffer->fill(draw);
  }
  for (Buffer* buffer : {static_cast<Buffer*>(&v), static_cast<Buffer*>(&gate), &bias, &skip, &state.S}) {
    buffer->fill(draw);
  }
  A.fill([&](int64_t) { return -std::exp(normal(random)); });
  state.m.fill([&](int64_t i) { return i % 5 == 1 ? -INFINITY : normal(random); });
  input.fill([&](int64_t i) { return i % 3 == 1 ? -INFINITY : normal(random); });
  decay.fill([&](int64_t i) {
    if (o.form == Form::kDelta) return normal(random);
    if (o.form == Form::kExp) return i % 4 == 0 ? -INFINITY : normal(random);  // with an input of -inf: leaves nothing
    return i % 7 == 3 ? -INFINITY : i % 7 == 5 ? 0 : -positive(i);
  });
  if (o.normalizer == Normalizer::kMax) forget_empty(state, c);

  Wanted y_want(y), m_want(state.m), want[] = {Wanted(state.S), Wanted(state.z)};
  for (int64_t i = 0; i < state.S.size; ++i) want[0][i] = state.S[i];
  for (int64_t i = 0; i < state.z.size; ++i) want[1][i] = state.z[i];
  for (int64_t i = 0; i < state.m.size; ++i) m_want[i] = state.m[i];
  const double scale = o.normalizer == Normalizer::kSum ? 1 : 1 / std::sqrt(static_cast<double>(K));
  for (int64_t b = 0; b < c.B; ++b) {
    const int64_t row = indices[b];
    if (row < 0 || row >= R) continue;
    for (int64_t hv = 0; hv < HV; ++hv) {
      const int64_t h = hv / (HV / H), at = row * HV + hv;
      const bool empty = o.normalizer == Normalizer::kMax && state.m[at] == -INFINITY;
      std::vector<double> decays_of(decays), n(V);
      for (int64_t i = 0; i < decays; ++i) decays_of[i] = decay.at(b, 0, hv, i);
      Gate g = gate_of(o, K, decays_of, input.at(b, 0, hv), A[hv], o.bias ? bias[hv] : 0, state.m[at]);
      if (o.normalizer == Normalizer::kMax) {
        Buffer kept(state.m.array.dtype, 1);  // m as the state holds it, which S and z are relative to
        kept.set(0, g.m), m_want[at] = kept[0];
        if (g.m != -INFINITY) {
          for (double& x : g.g) x += g.m - kept[0];
          g.w *= std::exp(g.m - kept[0]);
        }
        g.m = kept[0];
      }
      double e = 0, token = 0;
      for (int64_t i = 0; i < K; ++i) {
        const double q_i = q.at(b, 0, h, i), k_i = k.at(b, 0, h, i), a = std::exp(g.g[i]), write = g.w * k_i;
        if (o.bonus) token += q_i * bonus[h * K + i] * k_i;
        const auto advance = [&](double& x, double value) {
          const double before = empty ? 0 : x;
          x = a * before + write * value;
          return q_i * (o.read_previous ? before : x);
        };
        for (int64_t u = 0; u < V; ++u) {
          double& x = want[0][at * K * V + (o.value_major ? u * K + i : i * V + u)];
          n[u] += advance(x, v.at(b, 0, hv, u));
        }
        e += advance(want[1][at * K + i], 1);
      }
      e += token;
      double d = 1;
      if (o.normalizer == Normalizer::kSum) d = e + kEps;
      if (o.normalizer == Normalizer::kMax) d = std::max(std::abs(scale * e), std::exp(-g.m)) + kEps;
      for (int64_t u = 0; u < V; ++u) {
        const double value = v.at(b, 0, hv, u), x = gate.at(b, 0, hv, u);
        const double skipped = o.skip ? skip[o.skip_per_head ? hv : hv * V + u] * value : 0;
        y_want[y.place(b, 0, hv, u)] = (scale * (n[u] + token * value) / d + skipped) * (o.gate ? x * sigmoid(x) : 1);
      }
    }
  }

  const auto per_token = [](const Tokens& x, bool present = true) -> StepParams::Rows {
    if (!present) return {};
    return {x.array.data, x.array.dtype, x.data.b, x.data.h, 1};
  };
  StepParams p{};
  p.batch = c.B, p.heads = H, p.value_heads = HV, p.keys = K, p.size = V, p.rows = R, p.accumulator = type;
  p.S = {{state.S.array.data, state.S.array.dtype, HV * K * V, K * V, o.value_major ? 1 : V}, o.value_major ? K : 1};
  if (o.normalizer != Normalizer::kNone) p.z = {state.z.array.data, state.z.array.dtype, HV * K, K, 1};
  if (o.normalizer == Normalizer::kMax) p.m = {state.m.array.data, state.m.array.dtype, HV, 1, 0};
  p.q = per_token(q), p.k = per_token(k), p.v = per_token(v), p.y = per_token(y), p.gate = per_token(gate, o.gate);
  p.form = o.form, p.softplus = o.softplus, p.low = kLow, p.high = kHigh;
  p.decay = per_token(decay, o.form != Form::kNone), p.input = per_token(input, o.form == Form::kExp);
  if (o.form == Form::kDelta) p.A = A.array;
  if (o.bias) p.bias = bias.array;
  if (o.bonus) p.bonus = bonus.array;
  if (o.skip) p.skip = skip.array, p.skip_h = o.skip_per_head ? 1 : V, p.skip_v = o.skip_per_head ? 0 : 1;
  p.normalizer = o.normalizer, p.read_previous = o.read_previous, p.scale = scale, p.eps = kEps;
  p.state_indices = indices.data();
  cuda::step(p, {});

  char text[128];
  std::snprintf(text, sizeof text, "step %s H=%ld HV=%ld K=%ld V=%ld, ", naive::text(dtype), H, HV, K, V);
  const std::string name = text + o.text();
  return passes(name, "y", naive::difference(y, y_want, type, 64)) &
         passes(name, "S", naive::difference(state.S, want[0], type, 64)) &
         (o.normalizer == Normalizer::kNone || passes(name, "z", naive::difference(state.z, want[1], type, 64))) &
         (o.normalizer != Normalizer::kMax || passes(name, "m", naive::difference(state.m, m_want, type, 64)));
}

// Tensors of the right size for a call without options, of fp32.
struct Call {
  Case c;
  Tokens q, k, v, decay, input, y, dq, dk, dv, ddecay, dinput;
  Buffer denominators, maxima, A, dA;
  States initial, out;

  Call(Form form, int64_t B, int64_t L, int64_t rows, int64_t K, int64_t V, std::mt19937& random)
      : c(case_of(form, B, L, K, V)),
        q(c.dtype, c, 1, K),
        k(c.dtype, c, 1, K),
        v(c.dtype, c, 1, V),
        decay(c.dtype, c, 1, form == Form::kKey ? K : 1),
        input(c.dtype, c, 1, 1),
        y(c.dtype, c, 1, V),
        dq(c.dtype, c, 1, K),
        dk(c.dtype, c, 1, K),
        dv(c.dtype, c, 1, V),
        ddecay(c.dtype, c, 1, decay.width),
        dinput(c.dtype, c, 1, 1),
        denominators(c.dtype, B * L),
        maxima(c.dtype, B * L),
        A(c.dtype, 1),
        dA(c.dtype, 1),
        initial([] { return DType::kFloat32; }, rows, c),
        out([] { return DType::kFloat32; }, rows, c) {
    std::normal_distribution<double> normal;
    for (Buffer* x : {static_cast<Buffer*>(&q), static_cast<Buffer*>(&k), static_cast<Buffer*>(&v),
                      static_cast<Buffer*>(&input), &initial.S, &initial.z, &initial.m}) {
      x->fill([&](int64_t) { return normal(random); });
    }
    decay.fill([&](int64_t) { return form == Form::kDelta ? 0.3 : -0.1 * std::abs(normal(random)); });
    A.fill([](int64_t) { return -1; });
    for (Buffer* x : {&out.S, &out.z, &out.m}) x->fill([](int64_t) { return 0; });
  }

  static Case case_of(Form form, int64_t B, int64_t L, int64_t K, int64_t V) {
    Case c{};
    c.B = B, c.L = L, c.H = c.HV = 1, c.K = K, c.V = V, c.options.form = form;
    if (form == Form::kExp) c.options.normalizer = Normalizer::kMax;
    return c;
  }
  Inputs inputs() const {
    Inputs in{};
    in.sequences.batch = in.sequences.count = c.B, in.sequences.length = c.L;
    in.heads = in.value_heads = 1, in.keys = c.K, in.size = c.V, in.scale = 1, in.split_time = true;
    in.q = q.data, in.k = k.data, in.v = v.data;
    in.normalizer = c.options.normalizer, in.gates.form = c.options.form, in.gates.high = INFINITY;
    if (in.gates.form != Form::kNone) in.gates.decay = decay.data;
    if (in.gates.form == Form::kDelta) in.gates.A = A.array;
    if (in.gates.form == Form::kExp) in.gates.input = input.data;
    return in;
  }
  FwdParams fwd(const Inputs& in) const {
    FwdParams p{in};
    p.y = y.data;
    if (in.gates.form == Form::kExp) p.denominators = denominators.array.data, p.maxima = maxima.array.data;
    return p;
  }
  BwdParams bwd(const Inputs& in) const {
    BwdParams p{};
    static_cast<Inputs&>(p) = in;
    p.dy = v.data, p.dq = dq.data, p.dk = dk.data, p.dv = dv.data;
    if (in.gates.form != Form::kNone) p.ddecay = ddecay.data;
    if (in.gates.form == Form::kDelta) p.dA = dA.array;
    if (in.gates.form == Form::kExp) {
      p.o = y.data, p.denominators = denominators.array.data, p.maxima = maxima.array.data, p.dinput = dinput.data;
    }
    return p;
  }
};

// Values that no caller should pass: results are of no interest, only that nothing else is touched.
bool run_bad_cu_seqlens(Form form, std::mt19937& random) {
  const std::vector<std::vector<int64_t>> all = {
      {5, 3, -7, 100, 20}, {100, 100}, {-5, -3}, {1, 36}, {0, 50, 20, 37}, {INT64_MIN, INT64_MAX, 0}};
  bool ok = true;
  for (const std::vector<int64_t>& starts : all) {
    const Call call(form, 1, 90, static_cast<int64_t>(starts.size()) - 1, 3, 5, random);
    Inputs in = call.inputs();
    in.sequences.cu_seqlens = starts.data(), in.sequences.cu_seqlens_is_int64 = true;
    in.sequences.count = static_cast<int64_t>(starts.size()) - 1;
    in.initial_state = call.initial.state(call.c.options);
    FwdParams fwd = call.fwd(in);
    fwd.final_state = call.out.state(call.c.options);
    run_fwd(fwd, random() % 3);
    for (const Buffer* x : {&call.out.S, &call.out.z}) {
      for (int64_t i = 0; i < x->size; ++i) ok &= std::isfinite((*x)[i]);
    }
    BwdParams bwd = call.bwd(in);
    bwd.dfinal_state = call.initial.state(call.c.options), bwd.dinitial_state = call.out.state(call.c.options);
    run_bwd(bwd, random() % 3);
  }
  if (!ok) std::printf("bad cu_seqlens, form %d: a result is not finite\n", static_cast<int>(form));
  return ok;
}

// NaN and infinity in a token reach the tokens from its chunk on, and no bit of anything else.
bool run_infinite(Form form, std::mt19937& random) {
  const int64_t at = 137, length = 170;
  int64_t wrong = 0;
  for (const double value : {static_cast<double>(INFINITY), static_cast<double>(NAN)}) {
    Call call(form, 2, length, 2, 16, 20, random);
    FwdParams p = call.fwd(call.inputs());
    run_fwd(p, 1);
    std::vector<double> before(call.y.size);
    for (int64_t i = 0; i < call.y.size; ++i) before[i] = call.y[i];
    call.k.set(call.k.place(1, at, 0, 3), value);
    run_fwd(p, 1);
    const int64_t tokens = cuda::plan_fwd(p, 1).tile.tokens;
    for (int64_t b = 0; b < 2; ++b) {
      for (int64_t t = 0; t < length; ++t) {
        if (b == 1 && t >= at / tokens * tokens && t < at) continue;  // may be NaN, and nothing that is wrong
        for (int64_t i = 0; i < call.y.width; ++i) {
          const int64_t place = call.y.place(b, t, 0, i);
          wrong += b == 1 && t >= at ? std::isfinite(call.y[place]) : call.y[place] != before[place];
        }
      }
    }
  }
  if (wrong > 0) std::printf("NaN or infinity, form %d: %ld results are wrong\n", static_cast<int>(form), wrong);
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

  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
  const Form forms[] = {Form::kNone, Form::kToken, Form::kKey, Form::kDelta, Form::kExp};
  struct StepSize {
    int64_t H, HV, K, V;
  };
  const Packing packings[] = {Packing::kPlain, Packing::kCuSeqlens, Packing::kSeqIdx};
  struct Size {
    int64_t B, L, H, HV, K, V;
  };
  for (const Size& size : {Size{3, 21, 2, 2, 3, 5},
                           {1, 150, 1, 1, 70, 20},
                           {2, 70, 1, 1, 40, 70},
                           {1, 70, 1, 1, 130, 33},
                           {1, 33, 1, 3, 64, 64},
                           {1, 70, 1, 2, 100, 90},
                           {2, 0, 2, 2, 3, 4},
                           {1, 40, 1, 1, 256, 9}}) {
    for (const DType dtype : dtypes) {
      for (const Form form : forms) {
        Case c{};
        c.dtype = dtype, c.L = size.L, c.H = size.H, c.HV = size.HV, c.K = size.K, c.V = size.V;
        if (dtype == DType::kFloat64) c.V = std::min<int64_t>(c.V, 16);  // two of its tiles
        c.packing = packings[random() % 3], c.B = c.packing == Packing::kCuSeqlens ? 1 : size.B;
        c.options = draw_options(form, random);
        c.states = random() % 4 != 0, c.reverse = random() % 2, c.extreme = random() % 3 == 0;
        c.segments = c.packing == Packing::kSeqIdx ? 1 : random() % 4;
        check([&] { return run(c, random); });
      }
    }
  }
  for (const Form form : forms) {
    check([&] { return run_bad_cu_seqlens(form, random); });
    check([&] { return run_infinite(form, random); });
  }
  for (const StepSize& size : {StepSize{2, 2, 3, 5},
                               {1, 3, 64, 40},
                               {2, 4, 33, 16},
                               {1, 1, 200, 130},
                               {1, 2, 0, 3},
                               {1, 1, 4, 300},
                               {3, 3, 16, 0}}) {
    for (const DType dtype : dtypes) {
      for (const Form form : forms) {
        const Options o = draw_options(form, random);
        check([&] { return run_step(dtype, size.H, size.HV, size.K, size.V, o, random); });
      }
    }
  }
  std::printf("%d of %d cases failed\n", failures, cases);
  return failures > 0;
}
