// Runs every CUDA kernel of linear_scan in the emulator against a naive loop in fp64; without torch, so that sanitizers
// see only our code. Exit status 1 and a line per case where they differ.
//
//   linear_scan [SEED [EVERY]]     runs each EVERY-th case; SEED draws what the list of cases leaves open
//
// EVERY should have no factor in common with 2, 3, 5 and 7, the lengths of the lists: then it reaches all their
// entries.
#include <cstdlib>
#include <random>

#include "buffer.h"
#include "common/simt/runtime.h"
#include "linear_scan/params.h"
#include "linear_scan/tile.h"
#include "sequences.h"

namespace {

using namespace seqkern;
using namespace seqkern::linear_scan;
using naive::Batch;
using naive::Buffer;
using naive::Complex;
using naive::Packing;
using naive::passes;
using naive::Sequence;
using naive::Wanted;

struct Case {
  DType dtype;  // of b; a and the initial state have this one or another
  int64_t B, L, D;
  Packing packing;
  time_scan::Path path;
  bool a_over_batch, a_over_time, a_over_channels;  // else constant
  bool complex, log_space, reset, states, reverse;
  bool only_adjoint;  // the backward is not told h, and gives no da

  int64_t parts() const { return complex ? 2 : 1; }
  std::string text() const {
    char line[256];
    std::snprintf(line, sizeof line, "%s B=%ld L=%ld D=%ld a=(%s, %s, %s) %s %s%s%s%s%s%s%s", naive::text(dtype), B, L,
                  D, a_over_batch ? "B" : "1", a_over_time ? "L" : "1", a_over_channels ? "D" : "1",
                  naive::text(packing), time_scan::name(path), complex ? " complex" : "", log_space ? " log_space" : "",
                  reset ? " reset" : "", states ? " states" : "", reverse ? " reverse" : "",
                  only_adjoint ? " only_adjoint" : "");
    return line;
  }
};

// A (B, L, D) tensor of numbers, time within batch rows or batch rows within time.
struct Tokens : Buffer {
  Strides stride;
  bool complex;

  Tokens(DType dtype, const Case& c, bool batch_within_time)
      : Buffer(dtype, c.B * c.L * c.D * c.parts()),
        stride(batch_within_time ? Strides{.b = c.D, .d = 1, .l = c.B * c.D}
                                 : Strides{.b = c.L * c.D, .d = 1, .l = c.D}),
        complex(c.complex) {}
  // a, constant along some dimensions.
  static Tokens decay(DType dtype, const Case& c) {
    const int64_t L = c.a_over_time ? c.L : 1, D = c.a_over_channels ? c.D : 1;
    const Strides stride = {
        .b = c.a_over_batch ? L * D : 0, .d = c.a_over_channels ? 1 : 0, .l = c.a_over_time ? D : 0};
    return Tokens(dtype, (c.a_over_batch ? c.B : 1) * L * D * c.parts(), stride, c.complex);
  }
  int64_t place(int64_t b, int64_t t, int64_t d) const { return b * stride.b + t * stride.l + d * stride.d; }
  Complex at(int64_t b, int64_t t, int64_t d) const { return Buffer::at(place(b, t, d), complex); }
  void put(int64_t b, int64_t t, int64_t d, double value) {
    const int64_t parts = complex ? 2 : 1;
    for (int64_t part = 0; part < parts; ++part) set(place(b, t, d) * parts + part, value);
  }
  Data data() const { return {array.data, array.dtype, stride}; }

 private:
  Tokens(DType dtype, int64_t elements, Strides stride_, bool complex_)
      : Buffer(dtype, elements), stride(stride_), complex(complex_) {}
};

bool run(const Case& c, std::mt19937& random) {
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform;
  const auto draw = [&](int64_t) { return normal(random); };
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, c.dtype, c.dtype, c.dtype, c.dtype};
  const auto some_dtype = [&] { return c.dtype == DType::kFloat64 ? c.dtype : dtypes[random() % 7]; };
  const auto coin = [&] { return random() % 2 == 1; };
  const DType type = accumulator(c.dtype);
  const int64_t D = c.D, parts = c.parts();

  const Batch batch(c.packing, c.B, c.L, c.reverse, random);
  const int64_t rows = batch.sequences.count;
  Tokens b(c.dtype, c, coin()), dh(c.dtype, c, coin()), h(c.dtype, c, false), db(c.dtype, c, false);
  Tokens a = Tokens::decay(some_dtype(), c), da = Tokens::decay(a.array.dtype, c);
  Buffer initial(some_dtype(), rows * D * parts), dinitial(initial.array.dtype, initial.size);
  Buffer final(type, initial.size), dfinal(type, initial.size);
  const std::unique_ptr<bool[]> reset(new bool[c.B * c.L]);

  b.fill(draw), dh.fill(draw), initial.fill(draw), dfinal.fill(draw);
  dinitial.fill([](int64_t) { return 0; });  // as the operator allocates it
  // Some decays are close to 1, some are 0, and complex ones turn.
  for (int64_t i = 0; i < a.size; i += parts) {
    const double size = random() % 16 == 0 ? 0 : 0.4 + 0.58 * uniform(random), angle = 2 * normal(random);
    if (c.log_space) {
      a.set(i, std::log(size));
      if (c.complex) a.set(i + 1, angle);
    } else {
      a.set(i, c.complex ? size * std::cos(angle) : angle > 0 ? size : -size);
      if (c.complex) a.set(i + 1, size * std::sin(angle));
    }
  }
  for (int64_t i = 0; i < c.B * c.L; ++i) reset[i] = c.reset && random() % 6 == 0;

  // Padding holds NaN: nothing may depend on it.
  for (int64_t row = 0; row < c.B; ++row) {
    for (int64_t t = 0; t < c.L; ++t) {
      if (!batch.padding(row, t)) continue;
      for (int64_t d = 0; d < D; ++d) {
        b.put(row, t, d, NAN), dh.put(row, t, d, NAN);
        if (c.a_over_time && c.a_over_batch) a.put(row, t, d, NAN);
      }
    }
  }
  // Nothing passes a reset, infinity neither: from the state or token before it, nor to them.
  for (const Sequence& s : batch.all) {
    for (size_t i = 0; i < s.tokens.size(); ++i) {
      if (!reset[s.b * c.L + s.tokens[i]]) continue;
      for (int64_t d = 0; d < D; ++d) {
        dh.put(s.b, s.tokens[i], d, INFINITY);
        if (i > 0) {
          b.put(s.b, s.tokens[i - 1], d, INFINITY);
        } else if (s.initial >= 0) {
          for (int64_t part = 0; part < parts; ++part) initial.set((s.initial * D + d) * parts + part, INFINITY);
        }
      }
    }
  }

  Inputs in{};
  in.sequences = batch.sequences, in.channels = D, in.complex = c.complex, in.log_space = c.log_space;
  in.accumulator = type, in.a = a.data();
  if (c.states) in.initial_state = initial.array;
  if (c.reset) in.reset = reset.get();
  FwdParams fwd{};
  static_cast<Inputs&>(fwd) = in;
  fwd.b = b.data(), fwd.h = h.data();
  if (c.states) fwd.final_state = final.array;
  const auto fwd_plan = cuda::plan_fwd(fwd, {c.path, "named"});
  const Buffer fwd_workspace = naive::workspace(fwd_plan.workspace_bytes);
  fwd.workspace = fwd_workspace.array.data;
  cuda::fwd(fwd, fwd_plan, {});

  BwdParams bwd{};
  static_cast<Inputs&>(bwd) = in;
  bwd.dh = dh.data(), bwd.db = db.data();
  if (!c.only_adjoint) bwd.h = h.data(), bwd.da = da.data();
  if (c.states) bwd.dfinal_state = dfinal.array, bwd.dinitial_state = dinitial.array;
  const auto bwd_plan = cuda::plan_bwd(bwd, {c.path, "named"});
  const Buffer bwd_workspace = naive::workspace(bwd_plan.workspace_bytes);
  bwd.workspace = bwd_workspace.array.data;
  cuda::bwd(bwd, bwd_plan, {});

  Wanted h_want(h), db_want(db), da_want(da), final_want(final), dinitial_want(dinitial);
  for (const Sequence& s : batch.all) {
    const int64_t length = static_cast<int64_t>(s.tokens.size());
    const auto is_reset = [&](int64_t i) { return reset[s.b * c.L + s.tokens[i]]; };
    for (int64_t d = 0; d < D; ++d) {
      const auto decay = [&](int64_t i) {  // [decay]
        const Complex value = a.at(s.b, s.tokens[i], d);
        if (!c.log_space) return value;
        return value.real() == -INFINITY ? Complex(0) : std::exp(value);
      };
      const Complex zero(0);
      const Complex entering = c.states && s.initial >= 0 ? initial.at(s.initial * D + d, c.complex) : zero;
      Complex state = entering;
      for (int64_t i = 0; i < length; ++i) {
        const Complex added = b.at(s.b, s.tokens[i], d);
        state = is_reset(i) ? added : decay(i) * state + added;  // [state]
        h_want.add(h.place(s.b, s.tokens[i], d), state, c.complex);
      }
      if (c.states && s.final >= 0) final_want.add(s.final * D + d, state, c.complex);

      Complex carry = c.states && s.final >= 0 ? dfinal.at(s.final * D + d, c.complex) : zero;  // c_{t+1}
      for (int64_t i = length - 1; i >= 0; --i) {
        const Complex g = dh.at(s.b, s.tokens[i], d) + carry;  // [dstate]
        db_want.add(db.place(s.b, s.tokens[i], d), g, c.complex);
        carry = is_reset(i) ? zero : std::conj(decay(i)) * g;
        if (is_reset(i)) continue;
        const Complex before = i > 0 ? h.at(s.b, s.tokens[i - 1], d) : entering;
        const Complex term = std::conj(before) * (c.log_space ? carry : g);  // [da]
        const int64_t place = da.place(s.b, s.tokens[i], d);
        da_want.add(place, term, c.complex);
        da_want.largest_term = std::max(da_want.largest_term, std::abs(term));
      }
      if (c.states && s.initial >= 0) dinitial_want.add(s.initial * D + d, carry, c.complex);
    }
  }

  // The error of a phase grows with its angle.
  const double terms = c.complex ? 128 : 64;
  const double many_terms = terms + 8 * std::sqrt(static_cast<double>(c.B * c.L * D));
  const auto check = [&](const char* name, const Buffer& got, const Wanted& want, double terms) {
    return passes(c.text(), name, naive::difference(got, want, type, terms));
  };
  bool ok = check("h", h, h_want, terms) & check("db", db, db_want, terms);
  if (!c.only_adjoint) ok &= check("da", da, da_want, many_terms);
  if (c.states)
    ok &= check("final_state", final, final_want, terms) & check("dinitial", dinitial, dinitial_want, terms);
  return ok;
}

// One token for each row, whose states are rows of a pool.
bool run_step(DType dtype, int64_t D, bool complex, bool log_space, std::mt19937& random) {
  std::normal_distribution<double> normal;
  const auto draw = [&](int64_t) { return normal(random); };
  const std::vector<int32_t> indices = {2, -1, 0, 7};
  const int64_t B = static_cast<int64_t>(indices.size()), R = 5, parts = complex ? 2 : 1;
  const DType type = accumulator(dtype);
  Buffer state(random() % 2 ? dtype : type, R * D * parts), a(type, D * parts);
  Buffer b(dtype, B * D * parts), h(dtype, b.size);
  state.fill(draw), b.fill(draw);
  a.fill([&](int64_t i) { return log_space && i % parts == 0 ? -std::abs(normal(random)) : normal(random); });

  Wanted h_want(h), state_want(state);
  for (int64_t i = 0; i < state.size; ++i) state_want[i] = state[i];
  for (int64_t row = 0; row < B; ++row) {
    const int64_t r = indices[row];
    if (r < 0 || r >= R) continue;
    for (int64_t d = 0; d < D; ++d) {
      const Complex given = a.at(d, complex), decay = log_space ? std::exp(given) : given;
      const Complex value = decay * state.at(r * D + d, complex) + b.at(row * D + d, complex);
      h_want.add(row * D + d, value, complex);
      for (int64_t part = 0; part < parts; ++part)
        state_want[(r * D + d) * parts + part] = part ? value.imag() : value.real();
    }
  }

  StepParams p{};
  p.batch = B, p.channels = D, p.rows = R, p.complex = complex, p.log_space = log_space, p.accumulator = type;
  const auto rows = [&](const Buffer& of, int64_t stride) -> StepParams::Rows {
    return {of.array.data, of.array.dtype, stride, 1};
  };
  p.state = rows(state, D), p.a = rows(a, 0), p.b = rows(b, D), p.h = rows(h, D);
  p.state_indices = indices.data();
  cuda::step(p, {});

  char text[128];
  std::snprintf(text, sizeof text, "step %s D=%ld%s%s", naive::text(dtype), D, complex ? " complex" : "",
                log_space ? " log_space" : "");
  return passes(text, "h", naive::difference(h, h_want, type, 64)) &
         passes(text, "state", naive::difference(state, state_want, type, 64));
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
    c.B = 1, c.L = 90, c.D = 4, c.a_over_batch = c.a_over_time = c.a_over_channels = true;
    Tokens a = Tokens::decay(c.dtype, c), da = Tokens::decay(c.dtype, c);
    Tokens b(c.dtype, c, false), h(c.dtype, c, false), db(c.dtype, c, false);
    Inputs in{};
    in.sequences.batch = 1, in.sequences.length = c.L, in.sequences.count = static_cast<int64_t>(starts.size()) - 1;
    in.sequences.cu_seqlens = starts.data(), in.sequences.cu_seqlens_is_int64 = true;
    Buffer state(c.dtype, in.sequences.count * c.D), out(c.dtype, state.size);
    for (Buffer* buffer : {static_cast<Buffer*>(&b), &state}) buffer->fill(draw);
    a.fill([](int64_t) { return 0.5; }), out.fill([](int64_t) { return 0; });
    in.channels = c.D, in.a = a.data(), in.initial_state = state.array;
    FwdParams fwd{};
    static_cast<Inputs&>(fwd) = in;
    fwd.b = b.data(), fwd.h = h.data(), fwd.final_state = out.array;
    const auto fwd_plan = cuda::plan_fwd(fwd, {path, "named"});
    const Buffer fwd_workspace = naive::workspace(fwd_plan.workspace_bytes);
    fwd.workspace = fwd_workspace.array.data;
    cuda::fwd(fwd, fwd_plan, {});
    BwdParams bwd{};
    static_cast<Inputs&>(bwd) = in;
    bwd.dh = b.data(), bwd.h = h.data(), bwd.dfinal_state = state.array;
    bwd.db = db.data(), bwd.da = da.data(), bwd.dinitial_state = out.array;
    const auto bwd_plan = cuda::plan_bwd(bwd, {path, "named"});
    const Buffer bwd_workspace = naive::workspace(bwd_plan.workspace_bytes);
    bwd.workspace = bwd_workspace.array.data;
    cuda::bwd(bwd, bwd_plan, {});
    for (const Buffer* buffer :
         {static_cast<Buffer*>(&h), static_cast<Buffer*>(&db), static_cast<Buffer*>(&da), &out}) {
      for (int64_t i = 0; i < buffer->size; ++i) ok &= std::isfinite((*buffer)[i]);
    }
  }
  if (!ok) std::printf("bad cu_seqlens %s: a result is not finite\n", time_scan::name(path));
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
  const Size sizes[] = {{3, 21, 6}, {1, 3, 70}, {2, 290, 20}, {1, 131, 1}, {2, 0, 3}};
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
  const time_scan::Path paths[] = {time_scan::Path::kSerial, time_scan::Path::kTwoPass, time_scan::Path::kLookBack};
  for (const Size& size : sizes) {
    for (const DType dtype : dtypes) {
      for (const Packing packing : {Packing::kPlain, Packing::kCuSeqlens, Packing::kSeqIdx}) {
        for (const time_scan::Path path : paths) {
          for (const bool complex : {false, true}) {
            Case c{};
            c.dtype = dtype, c.B = packing == Packing::kCuSeqlens ? 1 : size.B, c.L = size.L, c.D = size.D;
            c.packing = packing, c.path = path, c.complex = complex;
            c.a_over_batch = random() % 4, c.a_over_time = random() % 4, c.a_over_channels = random() % 4;
            c.log_space = random() % 2, c.reset = random() % 2, c.states = random() % 2, c.reverse = random() % 2;
            c.only_adjoint = random() % 4 == 0;
            check([&] { return run(c, random); });
          }
        }
      }
    }
  }
  for (const time_scan::Path path : paths) {  // more tiles than a warp looks at at once
    Case c{};
    c.dtype = DType::kFloat64, c.B = c.D = 1, c.L = 2400, c.path = path, c.states = true;
    c.a_over_time = true;
    check([&] { return run(c, random); });
  }
  for (const DType dtype : dtypes) {
    for (const int64_t D : {1, 37}) {
      for (const bool complex : {false, true}) {
        for (const bool log_space : {false, true})
          check([&] { return run_step(dtype, D, complex, log_space, random); });
      }
    }
  }
  for (const time_scan::Path path : paths) check([&] { return run_bad_cu_seqlens(path, random); });
  std::printf("%d of %d cases failed\n", failures, cases);
  return failures > 0;
}
