// Runs every CUDA kernel of softmax_scan in the emulator against softmax attention in fp64, all pairs of tokens at a
// time; without torch, so that sanitizers see only our code. Exit status 1 and a line per case where they differ.
//
//   softmax_scan [SEED [EVERY]]     runs each EVERY-th case; SEED draws what the list of cases leaves open
//
// EVERY should have no factor in common with 2, 3, 5 and 7, the lengths of the lists: then it reaches all their
// entries.
#include <cstdlib>
#include <functional>
#include <random>

#include "buffer.h"
#include "common/simt/runtime.h"
#include "sequences.h"
#include "softmax_scan/params.h"
#include "softmax_scan/tile.h"

namespace {

using namespace seqkern;
using namespace seqkern::softmax_scan;
using naive::Batch;
using naive::Buffer;
using naive::Packing;
using naive::passes;
using naive::Sequence;
using naive::Wanted;

struct Case {
  DType dtype;  // of v; other tensors have this one or another
  int64_t B, L, H, V;
  Packing packing;
  time_scan::Path path;
  bool states, masked, reverse;

  std::string text() const {
    char line[256];
    std::snprintf(line, sizeof line, "%s B=%ld L=%ld H=%ld V=%ld %s %s%s%s%s", naive::text(dtype), B, L, H, V,
                  naive::text(packing), time_scan::name(path), states ? " states" : "", masked ? " masked" : "",
                  reverse ? " reverse" : "");
    return line;
  }
};

// A (B, L, H) or (B, L, H, V) tensor in one of three memory orders.
struct Tokens : Buffer {
  Data data;

  Tokens(DType dtype, const Case& c, int64_t size, uint32_t order) : Buffer(dtype, c.B * c.L * c.H * size) {
    data.data = array.data, data.dtype = dtype;
    if (order == 0)
      data.b = c.L * c.H * size, data.l = c.H * size, data.h = size;
    else if (order == 1)
      data.b = c.H * c.L * size, data.h = c.L * size, data.l = size;
    else
      data.l = c.B * c.H * size, data.b = c.H * size, data.h = size;
  }
  int64_t place(int64_t b, int64_t t, int64_t h, int64_t v = 0) const {
    return b * data.b + t * data.l + h * data.h + v;
  }
  double at(int64_t b, int64_t t, int64_t h, int64_t v = 0) const { return (*this)[place(b, t, h, v)]; }
};

struct States {
  Buffer m, n, w;

  States(const std::function<DType()>& dtype, int64_t rows, const Case& c)
      : m(dtype(), rows * c.H), n(dtype(), rows * c.H), w(dtype(), rows * c.H * c.V) {}
  States(const States& like, int64_t rows, const Case& c)
      : m(like.m.array.dtype, rows * c.H), n(like.n.array.dtype, rows * c.H), w(like.w.array.dtype, rows * c.H * c.V) {}
  State state() const { return {m.array, n.array, w.array}; }
};

struct WantedState {
  Wanted m, n, w;

  explicit WantedState(const States& of) : m(of.m), n(of.n), w(of.w) {}
};

// exp(s - m), of a token that a sum to m has
double weight(double s, double m) {
  return s == -INFINITY ? 0 : std::exp(s - m);
}

bool run(const Case& c, std::mt19937& random) {
  std::normal_distribution<double> normal;
  const auto draw = [&](int64_t) { return normal(random); };
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, c.dtype, c.dtype, c.dtype, c.dtype};
  const auto some_dtype = [&] { return c.dtype == DType::kFloat64 ? c.dtype : dtypes[random() % 7]; };
  const DType type = accumulator(c.dtype);
  const auto accumulators = [&] { return type; };
  const int64_t H = c.H, V = c.V;

  const Batch batch(c.packing, c.B, c.L, c.reverse, random);
  const int64_t rows = batch.sequences.count;
  Tokens s(some_dtype(), c, 1, random() % 3), v(c.dtype, c, V, random() % 3), do_(c.dtype, c, V, random() % 3);
  Tokens o(c.dtype, c, V, 0), ds(s.array.dtype, c, 1, 0), dv(c.dtype, c, V, 0);
  Buffer normalizers(type, c.B * c.L * H * 2);
  States initial(some_dtype, rows, c), dinitial(initial, rows, c);
  States final(accumulators, rows, c), dfinal(accumulators, rows, c);

  v.fill(draw), do_.fill(draw);
  const double rise = random() % 2 ? 0 : 40.0 / (c.L + 1);  // later tokens may outweigh all earlier ones
  for (int64_t b = 0; b < c.B; ++b) {
    for (int64_t t = 0; t < c.L; ++t) {
      for (int64_t h = 0; h < H; ++h) {
        const bool masked = c.masked && (random() % 3 == 0 || (h % 2 == 0 && t < c.L / 2));
        s.set(s.place(b, t, h), masked ? -INFINITY : 2 * normal(random) + rise * t);
        // Nothing may depend on a value that has no weight, nor on padding.
        for (int64_t i = 0; masked && i < V; ++i) v.set(v.place(b, t, h, i), NAN);
        if (!batch.padding(b, t)) continue;
        s.set(s.place(b, t, h), NAN);
        for (int64_t i = 0; i < V; ++i) v.set(v.place(b, t, h, i), NAN), do_.set(do_.place(b, t, h, i), NAN);
      }
    }
  }
  initial.m.fill([&](int64_t i) { return i % 5 == 1 ? -INFINITY : 3 * normal(random); });
  initial.n.fill([&](int64_t i) { return initial.m[i] == -INFINITY ? NAN : 1 + std::abs(normal(random)); });
  initial.w.fill([&](int64_t i) { return initial.m[i / V] == -INFINITY ? NAN : normal(random); });
  for (Buffer* buffer : {&dfinal.m, &dfinal.n, &dfinal.w}) buffer->fill(draw);
  for (Buffer* buffer : {&dinitial.m, &dinitial.n, &dinitial.w}) buffer->fill([](int64_t) { return 0; });

  Inputs in{};
  in.sequences = batch.sequences, in.heads = H, in.size = V, in.accumulator = type;
  in.s = s.data, in.v = v.data;
  if (c.states) in.initial_state = initial.state();
  FwdParams fwd{};
  static_cast<Inputs&>(fwd) = in;
  fwd.o = o.data, fwd.normalizers = normalizers.array.data;
  if (c.states) fwd.final_state = final.state();
  const auto fwd_plan = cuda::plan_fwd(fwd, {c.path, "named"});
  const Buffer fwd_workspace = naive::workspace(fwd_plan.workspace_bytes);
  fwd.workspace = fwd_workspace.array.data;
  cuda::fwd(fwd, fwd_plan, {});

  BwdParams bwd{};
  static_cast<Inputs&>(bwd) = in;
  bwd.do_ = do_.data, bwd.o = o.data, bwd.normalizers = normalizers.array.data, bwd.ds = ds.data, bwd.dv = dv.data;
  if (c.states) bwd.dfinal_state = dfinal.state(), bwd.dinitial_state = dinitial.state();
  const auto bwd_plan = cuda::plan_bwd(bwd, {c.path, "named"});
  const Buffer bwd_workspace = naive::workspace(bwd_plan.workspace_bytes);
  bwd.workspace = bwd_workspace.array.data;
  cuda::bwd(bwd, bwd_plan, {});

  Wanted o_want(o), ds_want(ds), dv_want(dv), normalizers_want(normalizers);
  for (int64_t i = 0; i < normalizers.size; ++i) normalizers_want[i] = NAN;  // of padding: anything
  WantedState final_want(final), dinitial_want(dinitial);
  for (const Sequence& sequence : batch.all) {
    const int64_t b = sequence.b, length = static_cast<int64_t>(sequence.tokens.size());
    const bool enters = c.states && sequence.initial >= 0, leaves = c.states && sequence.final >= 0;
    for (int64_t h = 0; h < H; ++h) {
      const int64_t in_row = sequence.initial * H + h, out_row = sequence.final * H + h;
      const auto t_of = [&](int64_t j) { return sequence.tokens[j]; };
      const auto s_at = [&](int64_t j) { return s.at(b, t_of(j), h); };
      const double m_0 = enters ? initial.m[in_row] : -INFINITY, n_0 = m_0 == -INFINITY ? 0 : initial.n[in_row];
      const auto w_0 = [&](int64_t i) { return m_0 == -INFINITY ? 0 : initial.w[in_row * V + i]; };

      // What a sum over the first `count` tokens passes to them: dn and dw of its numbers, which are relative to m.
      const auto pass_back = [&](int64_t count, double m, double dn, const std::vector<double>& dw) {
        for (int64_t j = 0; j < count; ++j) {
          const double p = weight(s_at(j), m);
          if (p == 0) continue;
          ds_want.add(ds.place(b, t_of(j), h), p * dn);
          for (int64_t i = 0; i < V; ++i) {
            dv_want.add(dv.place(b, t_of(j), h, i), p * dw[i]);
            ds_want.add(ds.place(b, t_of(j), h), p * v.at(b, t_of(j), h, i) * dw[i]);
          }
        }
        const double q = weight(m_0, m);
        if (!enters || q == 0) return;
        for (int64_t i = 0; i < V; ++i) {
          dinitial_want.w.add(in_row * V + i, q * dw[i]);
          dinitial_want.m.add(in_row, q * w_0(i) * dw[i]);
        }
        dinitial_want.n.add(in_row, q * dn);
        dinitial_want.m.add(in_row, q * n_0 * dn);
      };

      double m = m_0;
      int64_t first = -1;  // the token that m comes from
      for (int64_t count = 0; count <= length; ++count) {
        if (count > 0 && s_at(count - 1) > m) m = s_at(count - 1), first = count - 1;
        double n = n_0 * weight(m_0, m);
        for (int64_t j = 0; j < count; ++j) n += weight(s_at(j), m);
        std::vector<double> w(V), dw(V);
        for (int64_t i = 0; i < V; ++i) {
          w[i] = w_0(i) * weight(m_0, m);
          for (int64_t j = 0; j < count; ++j) {
            const double p = weight(s_at(j), m);
            if (p > 0) w[i] += p * v.at(b, t_of(j), h, i);
          }
        }

        if (count > 0) {
          const int64_t t = t_of(count - 1);
          double dn = 0;
          for (int64_t i = 0; i < V; ++i) {
            o_want[o.place(b, t, h, i)] = m == -INFINITY ? 0 : w[i] / n;
            dw[i] = m == -INFINITY ? 0 : do_.at(b, t, h, i) / n;
            dn -= dw[i] * o.at(b, t, h, i);  // the backward is told o as it was rounded
          }
          const int64_t place = ((b * c.L + t) * H + h) * 2;
          normalizers_want[place] = m, normalizers_want[place + 1] = n;
          pass_back(count, m, dn, dw);
        }
        if (count == length && leaves) {
          final_want.m[out_row] = m, final_want.n[out_row] = n;
          const auto pass_to_maximum = [&](double term) {
            if (first >= 0)
              ds_want.add(ds.place(b, t_of(first), h), term);
            else if (enters)
              dinitial_want.m.add(in_row, term);
          };
          pass_to_maximum(dfinal.m[out_row]), pass_to_maximum(-n * dfinal.n[out_row]);
          for (int64_t i = 0; i < V; ++i) {
            final_want.w[out_row * V + i] = w[i];
            dw[i] = dfinal.w[out_row * V + i];
            pass_to_maximum(-dw[i] * (count > 0 ? n * o.at(b, t_of(count - 1), h, i) : w[i]));
          }
          pass_back(count, m, dfinal.n[out_row], dw);
        }
      }
    }
  }

  const double terms = 64;
  const auto check = [&](const char* name, const Buffer& got, const Wanted& want, double terms) {
    return passes(c.text(), name, naive::difference(got, want, type, terms));
  };
  const double many_terms = terms + 8 * std::sqrt(c.L * V + 1.0);
  bool ok = check("o", o, o_want, terms) & check("normalizers", normalizers, normalizers_want, terms);
  ok &= check("ds", ds, ds_want, many_terms) & check("dv", dv, dv_want, terms);
  if (c.states) {
    ok &= check("m", final.m, final_want.m, terms) & check("n", final.n, final_want.n, terms) &
          check("w", final.w, final_want.w, terms);
    ok &= check("dm", dinitial.m, dinitial_want.m, many_terms) & check("dn", dinitial.n, dinitial_want.n, many_terms) &
          check("dw", dinitial.w, dinitial_want.w, terms);
  }
  return ok;
}

// One token for each row, whose states are rows of a pool.
bool run_step(DType dtype, int64_t H, int64_t V, std::mt19937& random) {
  std::normal_distribution<double> normal;
  const auto draw = [&](int64_t) { return normal(random); };
  const std::vector<int32_t> indices = {2, -1, 0, 7};
  const int64_t R = 5, values = H * V;
  const DType type = accumulator(dtype);
  Case c{};
  c.B = static_cast<int64_t>(indices.size()), c.H = H, c.V = V;
  States state([&] { return random() % 2 ? dtype : type; }, R, c);
  Buffer s(type, c.B * H), v(dtype, c.B * values), o(dtype, c.B * values);
  state.m.fill([&](int64_t i) { return i % 3 == 1 ? -INFINITY : normal(random); });
  state.n.fill([&](int64_t i) { return state.m[i] == -INFINITY ? NAN : 1 + std::abs(normal(random)); });
  state.w.fill([&](int64_t i) { return state.m[i / V] == -INFINITY ? NAN : normal(random); });
  s.fill([&](int64_t i) { return i % 4 == 3 ? -INFINITY : normal(random); });
  v.fill(draw);

  Wanted o_want(o);
  WantedState state_want(state);
  for (int64_t i = 0; i < R * H; ++i) state_want.m[i] = state.m[i], state_want.n[i] = state.n[i];
  for (int64_t i = 0; i < R * values; ++i) state_want.w[i] = state.w[i];
  for (int64_t b = 0; b < c.B; ++b) {
    const int64_t row = indices[b];
    if (row < 0 || row >= R) continue;
    for (int64_t h = 0; h < H; ++h) {
      const int64_t at = row * H + h;
      const double m_0 = state.m[at], score = s[b * H + h], m = std::max(m_0, score);
      const double q = weight(m_0, m), p = weight(score, m), n = q == 0 ? p : q * state.n[at] + p;
      Buffer kept(state.m.array.dtype, 1);  // m as the state holds it, which n and w are relative to
      kept.set(0, m);
      const double unit = n == 0 ? 1 : std::exp(m - kept[0]);
      state_want.m[at] = kept[0], state_want.n[at] = unit * n;
      for (int64_t i = 0; i < V; ++i) {
        const double before = q == 0 ? 0 : q * state.w[at * V + i], value = v[(b * H + h) * V + i];
        state_want.w[at * V + i] = unit * (before + p * value);
        o_want[(b * H + h) * V + i] = n == 0 ? 0 : (before + p * value) / n;
      }
    }
  }

  StepParams p{};
  p.batch = c.B, p.heads = H, p.size = V, p.rows = R, p.accumulator = type;
  const auto per_head = [&](const Buffer& of) -> StepParams::Rows { return {of.array.data, of.array.dtype, H, 1, 0}; };
  const auto per_value = [&](const Buffer& of) -> StepParams::Rows {
    return {of.array.data, of.array.dtype, values, V, 1};
  };
  p.m = per_head(state.m), p.n = per_head(state.n), p.w = per_value(state.w);
  p.s = per_head(s), p.v = per_value(v), p.o = per_value(o);
  p.state_indices = indices.data();
  cuda::step(p, {});

  char text[128];
  std::snprintf(text, sizeof text, "step %s H=%ld V=%ld", naive::text(dtype), H, V);
  return passes(text, "o", naive::difference(o, o_want, type, 64)) &
         passes(text, "m", naive::difference(state.m, state_want.m, type, 64)) &
         passes(text, "n", naive::difference(state.n, state_want.n, type, 64)) &
         passes(text, "w", naive::difference(state.w, state_want.w, type, 64));
}

// Values that no caller should pass: results are of no interest, only that nothing else is touched.
bool run_bad_cu_seqlens(time_scan::Path path, std::mt19937& random) {
  std::normal_distribution<double> normal;
  const auto draw = [&](int64_t) { return normal(random); };
  const std::vector<std::vector<int64_t>> all = {
      {5, 3, -7, 100, 20}, {100, 100}, {-5, -3}, {1, 36}, {0, 50, 20, 37}, {INT64_MIN, INT64_MAX, 0}};
  bool ok = true;
  for (const std::vector<int64_t>& starts : all) {
    Case c{};
    c.B = 1, c.L = 90, c.H = 2, c.V = 3;
    Tokens s(c.dtype, c, 1, 0), v(c.dtype, c, c.V, 0), o(c.dtype, c, c.V, 0), ds(c.dtype, c, 1, 0),
        dv(c.dtype, c, c.V, 0);
    Inputs in{};
    in.sequences.batch = 1, in.sequences.length = c.L, in.sequences.count = static_cast<int64_t>(starts.size()) - 1;
    in.sequences.cu_seqlens = starts.data(), in.sequences.cu_seqlens_is_int64 = true;
    const auto dtype = [&] { return c.dtype; };
    States state(dtype, in.sequences.count, c), out(dtype, in.sequences.count, c);
    Buffer normalizers(c.dtype, c.L * c.H * 2);
    for (Buffer* buffer : {static_cast<Buffer*>(&s), static_cast<Buffer*>(&v), &state.m, &state.w}) buffer->fill(draw);
    state.n.fill([](int64_t) { return 1; });
    for (Buffer* buffer : {&out.m, &out.n, &out.w}) buffer->fill([](int64_t) { return 0; });
    in.heads = c.H, in.size = c.V, in.s = s.data, in.v = v.data, in.initial_state = state.state();
    FwdParams fwd{};
    static_cast<Inputs&>(fwd) = in;
    fwd.o = o.data, fwd.normalizers = normalizers.array.data, fwd.final_state = out.state();
    const auto fwd_plan = cuda::plan_fwd(fwd, {path, "named"});
    const Buffer fwd_workspace = naive::workspace(fwd_plan.workspace_bytes);
    fwd.workspace = fwd_workspace.array.data;
    cuda::fwd(fwd, fwd_plan, {});
    BwdParams bwd{};
    static_cast<Inputs&>(bwd) = in;
    bwd.do_ = v.data, bwd.o = o.data, bwd.normalizers = normalizers.array.data, bwd.dfinal_state = state.state();
    bwd.ds = ds.data, bwd.dv = dv.data, bwd.dinitial_state = out.state();
    const auto bwd_plan = cuda::plan_bwd(bwd, {path, "named"});
    const Buffer bwd_workspace = naive::workspace(bwd_plan.workspace_bytes);
    bwd.workspace = bwd_workspace.array.data;
    cuda::bwd(bwd, bwd_plan, {});
    for (const Buffer* buffer :
         {static_cast<Buffer*>(&o), static_cast<Buffer*>(&ds), static_cast<Buffer*>(&dv), &out.m, &out.n, &out.w}) {
      for (int64_t i = 0; i < buffer->size; ++i) ok &= std::isfinite((*buffer)[i]);
    }
  }
  if (!ok) std::printf("bad cu_seqlens %s: a result is not finite\n", time_scan::name(path));
  return ok;
}

// A score of +inf or NaN reaches the tokens that follow in its head, and no bit of anything else.
bool run_infinite(time_scan::Path path, double score, std::mt19937& random) {
  std::normal_distribution<double> normal;
  const auto draw = [&](int64_t) { return normal(random); };
  Case c{};
  c.B = 2, c.L = 300, c.H = 2, c.V = 3;
  const int64_t at = 137;
  Tokens s(c.dtype, c, 1, 0), v(c.dtype, c, c.V, 0), before(c.dtype, c, c.V, 0), after(c.dtype, c, c.V, 0);
  s.fill(draw), v.fill(draw);
  for (Tokens* o : {&before, &after}) {
    if (o == &after) s.set(s.place(1, at, 0), score);
    FwdParams p{};
    p.sequences.batch = p.sequences.count = c.B, p.sequences.length = c.L;
    p.heads = c.H, p.size = c.V, p.s = s.data, p.v = v.data, p.o = o->data;
    const auto plan = cuda::plan_fwd(p, {path, "named"});
    const Buffer workspace = naive::workspace(plan.workspace_bytes);
    p.workspace = workspace.array.data;
    cuda::fwd(p, plan, {});
  }
  int64_t wrong = 0;
  for (int64_t b = 0; b < c.B; ++b) {
    for (int64_t t = 0; t < c.L; ++t) {
      for (int64_t h = 0; h < c.H; ++h) {
        for (int64_t i = 0; i < c.V; ++i) {
          const double got = after.at(b, t, h, i);
          const bool reached = b == 1 && h == 0 && t >= at;
          wrong += reached ? std::isfinite(got) : got != before.at(b, t, h, i);
        }
      }
    }
  }
  if (wrong > 0) std::printf("a score of %g, %s: %ld results are wrong\n", score, time_scan::name(path), wrong);
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
    int64_t B, L, H, V;
  };
  const Size sizes[] = {{3, 21, 2, 3},  {1, 150, 5, 7}, {2, 290, 3, 1}, {1, 40, 1, 70},
                        {2, 33, 2, 16}, {2, 0, 2, 3},   {2, 3, 0, 4}};
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
  const time_scan::Path paths[] = {time_scan::Path::kSerial, time_scan::Path::kTwoPass, time_scan::Path::kLookBack};
  for (const Size& size : sizes) {
    for (const DType dtype : dtypes) {
      for (const Packing packing : {Packing::kPlain, Packing::kCuSeqlens, Packing::kSeqIdx}) {
        for (const time_scan::Path path : paths) {
          Case c{};
          c.dtype = dtype, c.B = packing == Packing::kCuSeqlens ? 1 : size.B, c.L = size.L, c.H = size.H;
          c.V = size.V, c.packing = packing, c.path = path;
          c.states = random() % 2, c.masked = random() % 3 == 0, c.reverse = random() % 2;
          check([&] { return run(c, random); });
        }
      }
    }
  }
  for (const time_scan::Path path : paths) {  // more tiles than a warp looks at at once
    Case c{};
    c.dtype = DType::kFloat64, c.B = c.H = c.V = 1, c.L = 1200, c.path = path, c.states = true;
    check([&] { return run(c, random); });
  }
  for (const DType dtype : dtypes) {
    for (const int64_t V : {1, 16, 37}) check([&] { return run_step(dtype, 3, V, random); });
  }
  for (const time_scan::Path path : paths) {
    check([&] { return run_bad_cu_seqlens(path, random); });
    for (const double score : {static_cast<double>(INFINITY), static_cast<double>(NAN)})
      check([&] { return run_infinite(path, score, random); });
  }
  std::printf("%d of %d cases failed\n", failures, cases);
  return failures > 0;
}
