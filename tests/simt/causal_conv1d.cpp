// Runs every CUDA kernel of causal_conv1d in the emulator against a naive loop in fp64; without torch, so that
// sanitizers see only our code. Exit status 1 and a line per case where they differ.
//
//   causal_conv1d [SEED [EVERY]]     runs each EVERY-th case; SEED draws what the list of cases leaves open
//
// EVERY should have no factor in common with 2, 3, 5 and 7, the lengths of the lists: then it reaches all their
// entries.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "causal_conv1d/params.h"
#include "causal_conv1d/tile.h"
#include "common/array.cuh"
#include "common/simt/runtime.h"

namespace {

using namespace seqkern;
using namespace seqkern::causal_conv1d;

enum class Packing { kPlain, kCuSeqlens, kSeqIdx };

struct Case {
  const char* dtype;
  int64_t B, D, L, W, dilation;
  Packing packing;
  bool channels_first, silu, bias, states, reverse;
  int offset;  // elements by which x and y miss their alignment

  std::string text() const {
    const char* packings[] = {"plain", "cu_seqlens", "seq_idx"};
    char line[256];
    std::snprintf(line, sizeof line, "%s B=%ld D=%ld L=%ld W=%ld dilation=%ld %s%s%s%s%s%s offset=%d", dtype, B, D, L,
                  W, dilation, packings[static_cast<int>(packing)], channels_first ? " channels" : " time",
                  silu ? " silu" : "", bias ? " bias" : "", states ? " states" : "", reverse ? " reverse" : "", offset);
    return line;
  }
};

// Memory of exactly this many elements, filled with NaN: address checks see one element too far, results one too few.
template <typename T>
struct Buffer {
  std::unique_ptr<unsigned char[]> bytes;
  T* data;
  int64_t size;

  explicit Buffer(int64_t n, int offset = 0)
      : bytes(new unsigned char[(n + offset) * sizeof(T)]), data(reinterpret_cast<T*>(bytes.get()) + offset), size(n) {
    for (int64_t i = 0; i < n; ++i) data[i] = static_cast<T>(NAN);
  }
  Array array() const { return {data, kDType<T>}; }
  double operator[](int64_t i) const { return to<double>(data[i]); }

  template <typename Random>
  void fill(Random& random) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < size; ++i) data[i] = static_cast<T>(normal(random));
  }
};

// A sequence as the mathematics sees it: tokens in processing order.
struct Sequence {
  int64_t b;
  std::vector<int64_t> tokens;  // positions in memory
  int64_t initial, final;       // rows of states, -1: none
};

std::vector<Sequence> sequences_of(const Case& c, const std::vector<int64_t>& starts, const std::vector<int32_t>& ids) {
  std::vector<Sequence> all;
  const auto add = [&](int64_t b, int64_t begin, int64_t end, int64_t initial, int64_t final) {
    Sequence s{b, {}, initial, final};
    for (int64_t t = begin; t < end; ++t) s.tokens.push_back(c.reverse ? begin + end - 1 - t : t);
    all.push_back(s);
  };
  if (c.packing == Packing::kCuSeqlens) {
    for (size_t n = 0; n + 1 < starts.size(); ++n) {
      add(0, starts[n], starts[n + 1], static_cast<int64_t>(n), static_cast<int64_t>(n));
    }
    return all;
  }
  for (int64_t b = 0; b < c.B; ++b) {
    if (c.packing == Packing::kPlain) {
      add(b, 0, c.L, b, b);
      continue;
    }
    const size_t row = all.size();
    const int32_t* id = ids.data() + b * c.L;
    for (int64_t begin = 0, end; begin < c.L; begin = end) {
      for (end = begin + 1; end < c.L && id[end] == id[begin]; ++end) {
      }
      if (id[begin] >= 0) add(b, begin, end, -1, -1);
    }
    if (all.size() == row) add(b, 0, 0, -1, -1);
    (c.reverse ? all.back() : all[row]).initial = b;
    (c.reverse ? all[row] : all.back()).final = b;
  }
  return all;
}

// Largest difference, in units of what rounding to T and sums in fp32 allow.
template <typename T>
double difference(const Buffer<T>& got, const std::vector<double>& want, double scale) {
  const double epsilon = sizeof(T) == 2   ? (kDType<T> == DType::kFloat16 ? 0x1p-11 : 0x1p-8)
                         : sizeof(T) == 4 ? 0x1p-24
                                          : 0x1p-53;
  double worst = 0;
  for (int64_t i = 0; i < got.size; ++i) {
    const double allowed = epsilon * (1.5 * std::abs(want[i]) + 16 * (sizeof(T) == 2 ? 0x1p-13 : 1) * scale);
    const double difference = got[i] == want[i] ? 0 : std::abs(got[i] - want[i]) / allowed;
    if (!(difference <= worst)) worst = std::isnan(difference) ? INFINITY : difference;
  }
  return worst;
}

template <typename T>
bool run(const Case& c, std::mt19937& random) {
  using A = Accumulator<T>;
  const int64_t S = (c.W - 1) * c.dilation, elements = c.B * c.D * c.L;

  std::vector<int64_t> starts;
  std::vector<int32_t> starts32, ids;
  int64_t N = c.B;
  if (c.packing == Packing::kCuSeqlens) {
    starts = {0, 0};  // begins and ends with an empty sequence
    for (int64_t t = 0; t < c.L;) {
      t = std::min(c.L, t + static_cast<int64_t>(random() % 3 == 0 ? random() % 4 : random() % (c.L / 2 + 2)));
      starts.push_back(t);
    }
    starts.push_back(c.L);
    starts32.assign(starts.begin(), starts.end());
    N = static_cast<int64_t>(starts.size()) - 1;
  }
  if (c.packing == Packing::kSeqIdx) {
    for (int64_t b = 0; b < c.B; ++b) {
      const bool only_padding = c.B > 2 && b == 1;
      int32_t id = random() % 2 ? -1 : 0;
      for (int64_t t = 0; t < c.L; ++t) {
        if (random() % (c.L / 4 + 2) == 0) id = static_cast<int32_t>(random() % 4) - 1;
        ids.push_back(only_padding ? -1 : id);
      }
    }
  }

  Buffer<T> x(elements, c.offset), dy(elements, c.offset), y(elements, c.offset), dx(elements);
  Buffer<T> weight(c.D * c.W), dweight(c.D * c.W);
  Buffer<float> bias(c.D), dbias(c.D);
  Buffer<A> initial(N * c.D * S), final(N * c.D * S), dinitial(N * c.D * S), dfinal(N * c.D * S);
  for (Buffer<T>* buffer : {&x, &dy, &weight}) buffer->fill(random);
  bias.fill(random);
  initial.fill(random), dfinal.fill(random);

  const Strides stride = c.channels_first ? Strides{c.D * c.L, 1, c.D} : Strides{c.D * c.L, c.L, 1};
  const auto at = [&](int64_t b, int64_t d, int64_t t) { return b * stride.b + d * stride.d + t * stride.l; };

  // x of padding holds NaN: nothing may depend on it.
  for (int64_t i = 0; i < static_cast<int64_t>(ids.size()); ++i) {
    for (int64_t d = 0; d < c.D && ids[i] < 0; ++d) x.data[at(i / c.L, d, i % c.L)] = static_cast<T>(NAN);
  }

  std::vector<double> y_want(elements), dx_want(elements), dweight_want(c.D * c.W), dbias_want(c.D);
  std::vector<double> final_want(N * c.D * S), dinitial_want(N * c.D * S);
  for (const Sequence& s : sequences_of(c, starts, ids)) {
    const int64_t length = static_cast<int64_t>(s.tokens.size());
    for (int64_t d = 0; d < c.D; ++d) {
      std::vector<double> past(S + length), dpast(S + length);  // the initial state, then the tokens
      for (int64_t i = 0; i < S; ++i) past[i] = c.states && s.initial >= 0 ? initial[(s.initial * c.D + d) * S + i] : 0;
      for (int64_t i = 0; i < length; ++i) past[S + i] = x[at(s.b, d, s.tokens[i])];
      for (int64_t i = 0; i < length; ++i) {
        double pre = c.bias ? bias[d] : 0;
        for (int64_t j = 0; j < c.W; ++j) pre += weight[d * c.W + j] * past[i + j * c.dilation];
        const double sigmoid = 1 / (1 + std::exp(-pre));
        const int64_t token = at(s.b, d, s.tokens[i]);
        y_want[token] = c.silu ? pre * sigmoid : pre;
        const double dpre = dy[token] * (c.silu ? sigmoid * (1 + pre * (1 - sigmoid)) : 1);
        for (int64_t j = 0; j < c.W; ++j) {
          dpast[i + j * c.dilation] += weight[d * c.W + j] * dpre;
          dweight_want[d * c.W + j] += dpre * past[i + j * c.dilation];
        }
        dbias_want[d] += dpre;
      }
      for (int64_t i = 0; i < S && c.states && s.final >= 0; ++i) {
        final_want[(s.final * c.D + d) * S + i] = past[length + i];
        dpast[length + i] += dfinal[(s.final * c.D + d) * S + i];
      }
      for (int64_t i = 0; i < S && c.states && s.initial >= 0; ++i)
        dinitial_want[(s.initial * c.D + d) * S + i] = dpast[i];
      for (int64_t i = 0; i < length; ++i) dx_want[at(s.b, d, s.tokens[i])] = dpast[S + i];
    }
  }

  Inputs in{};
  in.sequences.batch = c.B, in.sequences.length = c.L, in.sequences.count = N, in.sequences.reverse = c.reverse;
  if (c.packing == Packing::kCuSeqlens) {
    in.sequences.cu_seqlens_is_int64 = c.silu;
    in.sequences.cu_seqlens = c.silu ? static_cast<const void*>(starts.data()) : starts32.data();
  }
  if (c.packing == Packing::kSeqIdx) in.sequences.seq_idx = ids.data();
  in.channels = c.D, in.width = c.W, in.dilation = c.dilation, in.silu = c.silu, in.dtype = kDType<T>;
  in.x = x.data, in.x_stride = stride, in.weight = weight.array();
  if (c.bias) in.bias = bias.array();
  if (c.states) in.initial_state = initial.array();

  FwdParams fwd{in};
  fwd.y = y.data, fwd.y_stride = stride;
  if (c.states) fwd.final_state = final.array();
  const int64_t launched = simt::counters().launches;
  cuda::fwd(fwd, {});
  const int64_t fwd_launches = simt::counters().launches - launched;

  BwdParams bwd{in};
  bwd.dy = dy.data, bwd.dy_stride = stride, bwd.dx = dx.data, bwd.dx_stride = stride, bwd.dweight = dweight.array();
  if (c.bias) bwd.dbias = dbias.array();
  if (c.states) bwd.dfinal_state = dfinal.array(), bwd.dinitial_state = dinitial.array();
  const Buffer<double> workspace((cuda::workspace_bytes(bwd) + 7) / 8);
  bwd.workspace = workspace.data;
  cuda::bwd(bwd, {});
  const int64_t bwd_launches = simt::counters().launches - launched - fwd_launches;

  // Sums of many products err by more than one product does.
  const double past_scale = std::sqrt(static_cast<double>(c.W)) * 4, sum_scale = std::sqrt(c.B * c.L + 1.0) * 8;
  double worst = difference(y, y_want, past_scale);
  const auto check = [&](const char* name, double difference) {
    if (difference <= 1) return true;
    std::printf("%s: %s is off by %.3g times the tolerance\n", c.text().c_str(), name, difference);
    return false;
  };
  bool ok = check("y", worst) & check("dx", difference(dx, dx_want, past_scale)) &
            check("dweight", difference(dweight, dweight_want, sum_scale));
  if (c.bias) ok &= check("dbias", difference(dbias, dbias_want, sum_scale));
  if (c.states) {
    ok &= check("final_state", difference(final, final_want, 0));
    ok &= check("dinitial_state", difference(dinitial, dinitial_want, past_scale));
  }
  if (c.L > 0 && (fwd_launches != cuda::plan_fwd(fwd).launches || bwd_launches != cuda::plan_bwd(bwd).launches)) {
    std::printf("%s: %ld and %ld launches\n", c.text().c_str(), fwd_launches, bwd_launches);
    ok = false;
  }
  return ok;
}

// A few tokens at a time: the outputs of the whole sequence, and the state that follows it.
template <typename T>
bool run_step(const char* dtype, int64_t W, int64_t dilation, int64_t state_size, std::mt19937& random) {
  const int64_t B = 3, D = 5, R = 4, S = (W - 1) * dilation;
  const std::vector<int32_t> rows = {2, -1, 0};
  Buffer<T> weight(D * W), state(R * D * state_size);
  weight.fill(random), state.fill(random);
  std::vector<double> past(R * D * state_size);
  for (int64_t i = 0; i < state.size; ++i) past[i] = state[i];

  bool ok = true;
  for (const int64_t T_new : {1, 2, 7, 1}) {
    Buffer<T> x(B * D * T_new), y(B * D * T_new);
    x.fill(random);
    StepParams p{};
    p.batch = B, p.channels = D, p.tokens = T_new, p.width = W, p.dilation = dilation;
    p.rows = R, p.state_size = state_size, p.silu = true, p.dtype = kDType<T>;
    p.x = x.data, p.x_stride = {D * T_new, T_new, 1}, p.y = y.data, p.y_stride = p.x_stride;
    p.weight = weight.array(), p.conv_state = state.array(), p.conv_state_stride = {D * state_size, state_size, 1};
    p.state_indices = rows.data();
    cuda::step(p, {});

    std::vector<double> y_want(y.size);
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t d = 0; d < D && rows[b] >= 0; ++d) {
        const int64_t base = (rows[b] * D + d) * state_size;
        std::vector<double> all(past.begin() + base, past.begin() + base + state_size);
        for (int64_t t = 0; t < T_new; ++t) all.push_back(x[(b * D + d) * T_new + t]);
        for (int64_t t = 0; t < T_new; ++t) {
          double pre = 0;
          for (int64_t j = 0; j < W; ++j) pre += weight[d * W + j] * all[state_size + t - S + j * dilation];
          y_want[(b * D + d) * T_new + t] = pre / (1 + std::exp(-pre));
        }
        for (int64_t i = 0; i < state_size; ++i) past[base + i] = all[T_new + i];
      }
    }
    const double y_error = difference(y, y_want, 4 * std::sqrt(static_cast<double>(W))),
                 state_error = difference(state, past, 0);
    if (y_error <= 1 && state_error == 0) continue;
    std::printf("step %s W=%ld dilation=%ld: y is off by %.3g, the state by %.3g times the tolerance\n", dtype, W,
                dilation, y_error, state_error);
    ok = false;
  }
  return ok;
}

// Values that no caller should pass: results are of no interest, only that nothing else is touched.
bool run_bad_cu_seqlens(bool channels_first, int64_t W, std::mt19937& random) {
  const int64_t D = 4, L = 37;
  const std::vector<std::vector<int64_t>> all = {
      {5, 3, -7, 100, 20}, {100, 100}, {-5, -3}, {1, 36}, {0, 50, 20, 37}, {INT64_MIN, INT64_MAX, 0}};
  bool ok = true;
  for (const std::vector<int64_t>& starts : all) {
    const int64_t N = static_cast<int64_t>(starts.size()) - 1, S = W - 1;
    Buffer<float> x(D * L), y(D * L), dx(D * L), weight(D * W), dweight(D * W), states(N * D * S), out(N * D * S);
    for (Buffer<float>* buffer : {&x, &weight, &states}) buffer->fill(random);
    const Strides stride = channels_first ? Strides{D * L, 1, D} : Strides{D * L, L, 1};
    Inputs in{};
    in.sequences.batch = 1, in.sequences.length = L, in.sequences.count = N;
    in.sequences.cu_seqlens = starts.data(), in.sequences.cu_seqlens_is_int64 = true;
    in.channels = D, in.width = W, in.dilation = 1, in.silu = true;
    in.x = x.data, in.x_stride = stride, in.weight = weight.array(), in.initial_state = states.array();
    FwdParams fwd{in};
    fwd.y = y.data, fwd.y_stride = stride, fwd.final_state = out.array();
    cuda::fwd(fwd, {});
    BwdParams bwd{in};
    bwd.dy = x.data, bwd.dy_stride = stride, bwd.dx = dx.data, bwd.dx_stride = stride, bwd.dweight = dweight.array();
    bwd.dfinal_state = states.array(), bwd.dinitial_state = out.array();
    const Buffer<double> workspace((cuda::workspace_bytes(bwd) + 7) / 8);
    bwd.workspace = workspace.data;
    cuda::bwd(bwd, {});
    for (const Buffer<float>* buffer : {&y, &dx, &dweight, &out}) {
      for (int64_t i = 0; i < buffer->size; ++i) ok &= std::isfinite((*buffer)[i]);
    }
  }
  if (!ok) std::printf("bad cu_seqlens W=%ld%s: a result is not finite\n", W, channels_first ? " channels" : " time");
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
    int64_t B, D, L;
  };
  const Size sizes[] = {{3, 2, 21}, {1, 5, 3}, {2, 8, 64}, {1, 1, 550}, {3, 33, 7}};
  struct Filter {
    int64_t W, dilation;
  };
  const Filter filters[] = {{4, 1}, {3, 1}, {1, 1}, {2, 1}, {5, 1}, {3, 2}, {7, 5}};
  for (const Size& size : sizes) {
    for (const Filter& filter : filters) {
      for (const Packing packing : {Packing::kPlain, Packing::kCuSeqlens, Packing::kSeqIdx}) {
        for (const bool channels_first : {false, true}) {
          Case c{};
          c.B = size.B, c.D = size.D, c.L = size.L, c.W = filter.W, c.dilation = filter.dilation;
          c.dtype = "fp32", c.packing = packing, c.channels_first = channels_first;
          if (packing == Packing::kCuSeqlens) c.B = 1;
          const auto draw = [&] {
            c.silu = random() % 2, c.bias = random() % 2, c.states = random() % 2, c.reverse = random() % 2;
            c.offset = random() % 3 == 0 ? 1 + static_cast<int>(random() % 7) : 0;
          };
          draw(), check([&] { return run<float>(c, random); });
          c.dtype = "bf16", draw(), check([&] { return run<__nv_bfloat16>(c, random); });
          c.dtype = "fp16", draw(), check([&] { return run<__half>(c, random); });
          c.dtype = "fp64", draw(), check([&] { return run<double>(c, random); });
        }
      }
    }
  }
  for (const Filter& filter : filters) {
    const int64_t S = (filter.W - 1) * filter.dilation;
    for (const int64_t state_size : {S, S + 3}) {
      check([&] { return run_step<float>("fp32", filter.W, filter.dilation, state_size, random); });
      check([&] { return run_step<__nv_bfloat16>("bf16", filter.W, filter.dilation, state_size, random); });
      check([&] { return run_step<__half>("fp16", filter.W, filter.dilation, state_size, random); });
      check([&] { return run_step<double>("fp64", filter.W, filter.dilation, state_size, random); });
    }
  }
  for (const bool channels_first : {false, true}) {
    for (const int64_t W : {4, 6}) check([&] { return run_bad_cu_seqlens(channels_first, W, random); });
  }
  std::printf("%d of %d cases failed\n", failures, cases);
  return failures > 0;
}
