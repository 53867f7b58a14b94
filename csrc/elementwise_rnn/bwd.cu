// The backward: the adjoint, a scan that runs from the last token to the first, on one of the three paths of
// common/time_tile.h.
#include "common/launch.h"
#include "elementwise_rnn/rnn.cuh"
#include "elementwise_rnn/tile_bwd.h"

namespace seqkern::elementwise_rnn::cuda {
namespace {

using time_scan::Cut;
using time_scan::Facts;
using time_scan::Pass;
using time_scan::Place;

// a b, where nothing comes of zero, times inf either.
template <typename R>
__device__ __forceinline__ R product(R a, R b) {
  return a == R(0) || b == R(0) ? R(0) : a * b;
}

// [adjoint] What is carried is ds_{t-1}, the gradient of the state before a token. Over several tokens it is an affine
// map of the gradient ds that enters; of one token with the Jacobian J, to which dh_t belongs, J^T (ds + dh_t). J may
// grow to inf over many tokens: what is zero stays zero then, as it would token by token.
//
// A chunk lies in shared memory, a column of numbers for each lane: gates, dh, and the states before the tokens. Those
// are computed again, from the checkpoint of the piece that the chunk is in. A lane reads what it wrote itself.
template <int kCell, typename R, bool kTiled>
struct Adjoint {
  using Cell = CellOf<kCell, R>;
  static constexpr int kGates = Cell::kGates, kWeights = Cell::kWeights, kStates = Cell::kStates;
  using Real = R;
  using Carry = State<R, kStates>;
  struct Element {
    R column[kStates + 1][kStates];  // of the matrix; the last one is added
  };
  struct Tokens {};
  static constexpr int kTokens = bwd_tokens(static_cast<elementwise_rnn::Cell>(kCell), kDType<R>, kTiled);
  static constexpr int kLanesOfBlock = (kTiled ? time_scan::kTileWarps : time_scan::kSerialWarps) * kWarpSize;
  static_assert(kKept % kTokens == 0 && kTokens % 8 == 0);
  struct Numbers {  // of all lanes of a block
    R gate[kGates][kTokens][kLanesOfBlock];
    R dh[kTokens][kLanesOfBlock];
    R state[kStates][kTokens][kLanesOfBlock];
  };

  // `sequences` are mirrored.
  __device__ __forceinline__ Adjoint(const BwdParams& params, const Sequences& sequences, const Place& place,
                                     Numbers& numbers)
      : p(params), s(sequences), place(place), numbers(numbers), time(sequences, params.reset, true, place.b) {
    load_weights(w, p, place);
  }

  __device__ __forceinline__ void fetch(int64_t tau) {
    const int64_t piece = tau / kKept;
    if (fetched < 0 || piece != fetched / kKept) time.fetch(piece * kKept);
    fetched = tau;
    if (!place.exists || tau >= s.length) return;
#pragma unroll
    for (int k = 0; k < kStates; ++k)
      checkpoint.s[k] = load(static_cast<const R*>(p.checkpoints.data) + checkpoint_at(p, place, k, piece));
  }

  // The forward through the piece, up to the chunk: from its last tokens to its first, as time is mirrored.
  __device__ __forceinline__ Tokens take() {
    chunk = fetched;
    const int64_t begin = chunk / kKept * kKept;
    const Facts facts = time.take(begin);
    Carry state = checkpoint;
#pragma unroll 1
    for (int64_t tau = begin + kKept - kTokens; tau >= chunk; tau -= kTokens) {
      load_tokens(tau);
      advance_states(state, facts, begin, static_cast<int>(tau - begin));
    }
#pragma unroll
    for (int k = 0; k < kWeights; ++k) dw[k] = R(0);
    return {};
  }
  __device__ __forceinline__ void store(const Tokens&, int64_t) {
#pragma unroll
    for (int k = 0; k < kWeights; ++k) total[k] += dw[k];
  }

  // [adjoint] of token i.
  __device__ __forceinline__ void differentiate(int i, R (&ds)[kStates], R (&dx)[kGates], R (&dw)[kWeights]) const {
    R x[kGates], before[kStates];
#pragma unroll
    for (int g = 0; g < kGates; ++g) x[g] = numbers.gate[g][i][threadIdx.x];
#pragma unroll
    for (int k = 0; k < kStates; ++k) before[k] = numbers.state[k][i][threadIdx.x];
    Cell::adjoint(w, x, before, ds, dx, dw);
  }
  __device__ __forceinline__ void emit(Carry& c, Tokens&, const time_scan::Token& t) {
    R dx[kGates];
    c.s[0] += numbers.dh[t.i][threadIdx.x];
    differentiate(t.i, c.s, dx, dw);
    put_dx(t.i, dx);
    if (t.reset) c = {};
  }
  __device__ __forceinline__ void pad(Tokens&, int i) const {
    const R none[kGates] = {};
    put_dx(i, none);
  }

  __device__ __forceinline__ void advance(Carry& c, const Tokens&, int i) const {
    R dx[kGates], unused[kWeights] = {};
    c.s[0] += numbers.dh[i][threadIdx.x];
    differentiate(i, c.s, dx, unused);
  }
  __device__ __forceinline__ void extend(Element& f, const Tokens&, int i) const {
    Element token{};
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      R dx[kGates], unused[kWeights] = {};
      token.column[k][k] = R(1);
      differentiate(i, token.column[k], dx, unused);
    }
    const R given = numbers.dh[i][threadIdx.x];
#pragma unroll
    for (int k = 0; k < kStates; ++k) token.column[kStates][k] = given * token.column[0][k];
    f = compose(token, f);
  }

  __device__ __forceinline__ static Element identity() {
    Element f{};
#pragma unroll
    for (int k = 0; k < kStates; ++k) f.column[k][k] = R(1);
    return f;
  }
  __device__ __forceinline__ static Carry apply(const Element& f, const Carry& c) {
    return sum(f, c.s, f.column[kStates]);
  }
  __device__ __forceinline__ static Element compose(const Element& later, const Element& earlier) {
    Element f;
    const R zero[kStates] = {};
#pragma unroll
    for (int k = 0; k <= kStates; ++k) {
      const Carry column = sum(later, earlier.column[k], k < kStates ? zero : later.column[kStates]);
#pragma unroll
      for (int j = 0; j < kStates; ++j) f.column[k][j] = column.s[j];
    }
    return f;
  }

  __device__ __forceinline__ bool reads_initial() const { return static_cast<bool>(p.dfinal_state); }
  __device__ __forceinline__ bool reads_final() const { return static_cast<bool>(p.dinitial_state); }
  __device__ __forceinline__ Carry initial(int64_t row, int64_t) const {
    Carry c{};
    if (row >= 0 && place.exists) load_state(c, p.dfinal_state, p, place, row);
    return c;
  }
  __device__ __forceinline__ void leave(const Carry& c, int64_t row) const {
    if (place.exists) store_state(c, p.dinitial_state, p, place, row);
  }

  // Sums over time, of a warp of the serial path or of a tile, to the rows (W, D) of the workspace.
  __device__ __forceinline__ void put_total(R* sums, int64_t row) const {
    if (!place.exists) return;
#pragma unroll
    for (int k = 0; k < kWeights; ++k)
      seqkern::store(sums + (row * kWeights + k) * p.channels + place.channel, total[k]);
  }

  R total[kWeights] = {};

 private:
  // f's matrix times a vector, and another one.
  __device__ __forceinline__ static Carry sum(const Element& f, const R (&v)[kStates], const R (&other)[kStates]) {
    Carry c;
#pragma unroll
    for (int j = 0; j < kStates; ++j) {
      c.s[j] = other[j];
#pragma unroll
      for (int k = 0; k < kStates; ++k) c.s[j] += product(f.column[k][j], v[k]);
    }
    return c;
  }

  // Gates and dh, which has the dtype of x. After the row comes its last token again: loads without conditions are
  // under way together.
  __device__ __forceinline__ void load_tokens(int64_t tau) {
    constexpr int kAtOnce = 8;
    if (!place.exists || tau >= s.length) return;
    const int last = static_cast<int>(min(s.length - tau, int64_t{kTokens})) - 1;
    const int64_t t = memory_place(s, tau), step = s.reverse ? -1 : 1;
    visit(ArrayFor<R>{{p.x.data, p.x.dtype}}, [&]<typename T>(const T* data) {
      const T* x = data + place.b * p.x.b + t * p.x.l + place.channel;
      const T* dh = static_cast<const T*>(p.dh.data) + place.b * p.dh.stride.b + t * p.dh.stride.l + place.channel;
#pragma unroll 1
      for (int first = 0; first < kTokens; first += kAtOnce) {
        T given[kAtOnce][kGates + 1];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
          for (int g = 0; g < kGates; ++g) given[i][g] = load(x + g * p.x.g);
          given[i][kGates] = load(dh);
          if (first + i < last) x += step * p.x.l, dh += step * p.dh.stride.l;
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
          for (int g = 0; g < kGates; ++g) numbers.gate[g][first + i][threadIdx.x] = to<R>(given[i][g]);
          numbers.dh[first + i][threadIdx.x] = to<R>(given[i][kGates]);
        }
      }
    });
  }

  // Through the tokens that were loaded, which begin with token `first` of the piece, and that at `begin`. Puts the
  // states before them.
  __device__ __forceinline__ void advance_states(Carry& state, const Facts& facts, int64_t begin, int first) {
#pragma unroll 1
    for (int i = min(facts.count, first + kTokens) - 1; i >= first; --i) {
      const uint32_t bit = 1u << i;
      if (facts.padding & bit) continue;
      if ((facts.last | facts.reset) & bit) {
        const int64_t row = p.initial_state ? time.final_row(facts, begin, i) : -1;
        Cell::empty(state.s);
        if (row >= 0 && place.exists && !(facts.reset & bit)) load_state(state, p.initial_state, p, place, row);
      }
      R x[kGates];
#pragma unroll
      for (int g = 0; g < kGates; ++g) x[g] = numbers.gate[g][i - first][threadIdx.x];
#pragma unroll
      for (int k = 0; k < kStates; ++k) numbers.state[k][i - first][threadIdx.x] = state.s[k];
      Cell::step(w, x, state.s);
    }
  }

  __device__ __forceinline__ void put_dx(int i, const R (&dx)[kGates]) const {
    if (!place.exists) return;
    visit(ArrayFor<R>{{p.dx.data, p.dx.dtype}}, [&]<typename T>(T* data) {
      T* to_token = data + place.b * p.dx.b + memory_place(s, chunk + i) * p.dx.l + place.channel;
#pragma unroll
      for (int g = 0; g < kGates; ++g) seqkern::store(to_token + g * p.dx.g, to<T>(dx[g]));
    });
  }

  const BwdParams& p;
  const Sequences& s;
  const Place& place;
  Numbers& numbers;
  time_scan::Timeline<kKept> time;   // of the piece
  int64_t fetched = -1, chunk = -1;  // where the tokens begin that were fetched and taken last
  Carry checkpoint{};
  R w[kWeights], dw[kWeights];
};

template <typename Adjoint>
struct TileMemory {
  time_scan::TileShared<Adjoint> scan;
  union {  // a lane's total lies where its tokens did
    typename Adjoint::Numbers numbers;
    typename Adjoint::Real total[Adjoint::kWeights][Adjoint::kLanesOfBlock];
  };
  static_assert(Adjoint::kWeights <= Adjoint::kTokens);
};
// The plan gives a block as much.
template <int kCell, typename R, bool kTiled, typename Memory>
constexpr bool kFits = [] {
  const int64_t bytes = bwd_smem_bytes(static_cast<Cell>(kCell), kDType<R>, kTiled);
  return sizeof(Memory) <= bytes && bytes <= kMaxSharedBytes;
}();

// ds_{t-1}, dx_t and what a row adds to dweights [adjoint]
// warp     32 channels of one batch row, from the last token to the first
// thread   one channel; a chunk of tokens in shared memory
// bytes    x, dh, checkpoints, dx once
// limits   B D / 128 < 2^31 blocks
template <int kCell, typename R>
__global__ void __launch_bounds__(time_scan::kSerialWarps* kWarpSize, bwd_tile(kDType<R>).serial_blocks)
    serial_kernel(const __grid_constant__ BwdParams p, const __grid_constant__ Cut cut, void* sums) {
  using OfLane = Adjoint<kCell, R, false>;
  static_assert(kFits<kCell, R, false, typename OfLane::Numbers>);
  const Place place(cut, p.channels);
  if (!place.chain_exists) return;
  const Sequences s = time_scan::mirrored(sequences_of(p));
  OfLane adjoint(p, s, place, shared_memory<typename OfLane::Numbers>());
  time_scan::serial_scan(adjoint, s, p.reset, true, place.b);
  if (sums) adjoint.put_total(static_cast<R*>(sums), place.b);
}

// The same with time cut.
// block    one tile: 32 channels of one batch row, 8 chunks of tokens
// warp     one chunk
// thread   one channel of it, in shared memory
// shared   the chunks, and what they do to a gradient; then their sums of dweights
// bytes    x, dh, checkpoints, dx once; in a pass that summarizes x, dh, checkpoints
// limits   tiles B D / 32 < 2^31 blocks
template <int kCell, typename R>
__global__ void __launch_bounds__(time_scan::kTileWarps* kWarpSize, bwd_tile(kDType<R>).tile_blocks)
    tile_kernel(const __grid_constant__ BwdParams p, const __grid_constant__ Cut cut, void* sums, const Pass pass) {
  using OfLane = Adjoint<kCell, R, true>;
  static_assert(kFits<kCell, R, true, TileMemory<OfLane>>);
  const Place place(cut, p.channels);
  const Sequences s = time_scan::mirrored(sequences_of(p));
  auto& memory = shared_memory<TileMemory<OfLane>>();
  OfLane adjoint(p, s, place, memory.numbers);
  time_scan::tile_scan(adjoint, s, p.reset, true, place, cut, p.workspace, pass);
  if (!sums || pass == Pass::kSummarize) return;

#pragma unroll
  for (int k = 0; k < OfLane::kWeights; ++k) memory.total[k][threadIdx.x] = adjoint.total[k];
  __syncthreads();
  if (time_scan::warp_of() > 0) return;
#pragma unroll 1
  for (int other = kWarpSize + threadIdx.x; other < OfLane::kLanesOfBlock; other += kWarpSize) {
#pragma unroll
    for (int k = 0; k < OfLane::kWeights; ++k) adjoint.total[k] += memory.total[k][other];
  }
  adjoint.put_total(static_cast<R*>(sums), place.b * cut.tiles + place.tile);
}

__global__ void __launch_bounds__(kSmallThreads, 4) clear_kernel(const __grid_constant__ Cut cut, void* workspace) {
  time_scan::clear_flags(cut, workspace);
}

struct Instance {
  DType accumulator;
  void (*serial)(BwdParams, Cut, void*);
  void (*tile)(BwdParams, Cut, void*, Pass);  // fp32 only
};

template <int kCell>
constexpr Instance kFloat = {DType::kFloat32, serial_kernel<kCell, float>, tile_kernel<kCell, float>};
template <int kCell>
constexpr Instance kDouble = {DType::kFloat64, serial_kernel<kCell, double>, nullptr};
constexpr Instance kInstances[kCells][2] = {{kFloat<0>, kDouble<0>},
                                            {kFloat<1>, kDouble<1>},
                                            {kFloat<2>, kDouble<2>},
                                            {kFloat<3>, kDouble<3>},
                                            {kFloat<4>, kDouble<4>}};
static_assert(3 * std::size(kInstances) + 1 == kBwdKernels);

}  // namespace

void bwd(const BwdParams& p, Stream stream) {
  bwd(p, plan_bwd(p), stream);
}

void bwd(const BwdParams& p, const BwdPlan& plan, Stream stream) {
  const Instance& instance = find_instance(kInstances[static_cast<int64_t>(p.cell)], "elementwise_rnn_bwd",
                                           [&](const Instance& i) { return i.accumulator == p.accumulator; });
  if (p.dinitial_state && may_be_empty(p.sequences)) pass_states(p, p.dfinal_state, p.dinitial_state, true, stream);

  const Launch scan{.name = "elementwise_rnn_bwd",
                    .grid = {plan.cut.blocks},
                    .threads = plan.cut.threads,
                    .smem_bytes = plan.smem_bytes,
                    .stream = stream};
  void* const sums = p.dweights ? partial_sums(p, plan).data : nullptr;
  time_scan::run_path(
      plan.cut, [&] { launch(scan, instance.serial, p, plan.cut, sums); },
      [&](Pass pass) { launch(scan, instance.tile, p, plan.cut, sums, pass); },
      [&] {
        launch({.name = "elementwise_rnn_clear",
                .grid = {ceil_div(plan.cut.blocks, kSmallThreads)},
                .threads = kSmallThreads,
                .stream = stream},
               clear_kernel, plan.cut, p.workspace);
      });
  if (p.dweights) bwd_reduce(p, plan, stream);
}

}  // namespace seqkern::elementwise_rnn::cuda
