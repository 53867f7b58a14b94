// The forward where a head fits a block: R stays on the chip for all tokens, and nothing waits for another block.
#include "common/launch.h"
#include "common/limits.cuh"
#include "rnn/rnn.cuh"

namespace seqkern::rnn::cuda {
namespace {

// Chunks of R (H, G, P, Q): elements k, k + 1.. of the rows of a thread's units.
template <typename T, int kGates>
struct RowsOfR {
  const Inputs& in;
  const Place& place;
  bool aligned;  // a chunk is one access

  __device__ __forceinline__ RowsOfR(const Inputs& in, const Place& place) : in(in), place(place) {
    const auto odd = reinterpret_cast<uintptr_t>(in.R.data) | static_cast<uintptr_t>(in.outputs) * sizeof(T);
    aligned = in.R.dtype == kDType<T> && odd % kChunkBytes == 0;
  }

  __device__ __forceinline__ void operator()(int gate, int k, Chunk (&chunks)[2]) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t row = (int64_t{place.head} * kGates + gate) * in.units + place.unit + e;
      const int exist = e < place.exist ? static_cast<int>(clamp(in.outputs - k, 0, kPerChunk<T>)) : 0;
      Vector<T, kPerChunk<T>> elements{};
      if (aligned && exist > 0) {
        elements = load<kPerChunk<T>>(static_cast<const T*>(in.R.data) + row * in.outputs + k);
      } else if (exist > 0) {
        visit(ArrayFor<float>{in.R}, [&](const auto* R) {
#pragma unroll
          for (int i = 0; i < kPerChunk<T>; ++i) {
            elements[i] = i < exist ? to<T>(load(R + row * in.outputs + k + i)) : to<T>(0.0f);
          }
        });
      }
      chunks[e] = chunk_of(elements);
    }
  }
};

// [recur] [cell] [zoneout] [dropout]
// block    8 sequences of a head, all their tokens
// warp     16 units of all gates
// thread   two units of two sequences
// shared   h_{t-1} and h_t as operands, x of tokens on their way, what registers cannot hold of R
// bytes    x and what is asked for, once; R once for each block
// limits   units <= 16 warps
template <int kCell, typename T, int kMostWarps>
__global__ void __launch_bounds__(kMostWarps* kWarpSize, 1)
    fwd_kernel(const __grid_constant__ FwdParams p, const __grid_constant__ Fused fused) {
  using Cell = CellOf<kCell>;
  constexpr int kGates = Cell::kGates, kChains = kGates == 1 ? 4 : 1;
  constexpr int kHeld = held_blocks(kGates, sizeof(T), kMostWarps);
  constexpr int kMost = most_blocks(sizeof(T), kMostWarps);
  const Shared<T> shared(fused);
  const Place place(p, fused, shared.rows);
  Stationary<T, kGates, kHeld, (kHeld < kMost)> R(fused, shared.ring, shared.rest, RowsOfR<T, kGates>(p, place));
  shared.operand(0).clear(), shared.operand(1).clear();
  shared.take_bias(p, place.head, kGates);

  const bool paired = cuda::paired<T>(p.x, p.x.g) && cuda::paired<T>(p.h) && cuda::paired<T>(p.u, p.u.g) &&
                      cuda::paired<float>(p.c, p.c.c);
  const Track<T, GateData> x(p.x, place, 0), u(p.u, place, 1);
  const Track<T, TokenData> h(p.h, place, 2);
  const Track<float, CarriedData> c(p.c, place, 3);

  // x of token `i` goes into this thread's own places: nobody waits for anybody.
  auto* const ring = reinterpret_cast<Pair<T>*>(shared.ring) + threadIdx.x;
  const auto slot = [&](int i, int j, int g) { return ring + ((i % kAhead * 2 + j) * kGates + g) * blockDim.x; };
  const auto fetch = [&](int i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (i >= place.rows[j].tokens) continue;
      const T* const from = x.at(j, i);
#pragma unroll
      for (int g = 0; g < kGates; ++g) fetch_pair(slot(i, j, g), from + g * p.x.g, place.exist, paired);
    }
    commit_copies();
  };

  State<kCell> state[2];
  state[0].begin(p, place, 0), state[1].begin(p, place, 1);
  const uint32_t unseen = dropped(p, place);
  // The state that token `i` is to see, and what its product reads.
  const auto hand_on = [&](int i, int j) {
    if (i < place.rows[j].tokens && starts_anew(p, place, j, i)) state[j].clear();
    const auto seen = [&](int e) { return happened(unseen, e, j) ? 0.0f : state[j].h[e] * fused.dropout_scale; };
    shared.operand(i).put(place.row + j, place.unit, seen(0), seen(1));
  };
  __syncthreads();
  hand_on(0, 0), hand_on(0, 1);
#pragma unroll 1
  for (int i = 0; i < kAhead; ++i) fetch(i);
  __syncthreads();

#pragma unroll 1
  for (int i = 0; i < place.longest; ++i) {
    float sum[kGates][kChains][4];  // [recur]
    shared.begin_sums(sum, place);
    R.template multiply<kChains>(sum, shared.operand(i));
    wait_copies<kAhead - 1>();
    const uint32_t old = kept(p, place, i);

    // Without branches, so that all that a thread owns goes on side by side: each step waits long for the one before.
    float u_t[2][2][kGates];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      State<kCell> next = state[j];
      Pair<T> given[kGates];
#pragma unroll
      for (int g = 0; g < kGates; ++g) given[g] = *slot(i, j, g);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float x_t[kGates];
#pragma unroll
        for (int g = 0; g < kGates; ++g) x_t[g] = to<float>(given[g][e]), u_t[j][e][g] = sum_of(sum[g], e, j);
        const float before = state[j].h[e], m = with_cell<kCell>(p.cell, [&](auto cell) {  // [cell]
                                              return decltype(cell)::step(x_t, u_t[j][e], before, next.c[e]);
                                            });
        const float mixed = fused.zoneout_share > 0.0f ? fmaf(fused.zoneout_share, before - m, m) : m;  // [zoneout]
        next.h[e] = happened(old, e, j) ? before : mixed;
      }
      if (i < place.rows[j].tokens) state[j] = next;
    }

#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (i < place.rows[j].tokens) {
        put_pair(h.at(j, i), state[j].h[0], state[j].h[1], place.exist, paired);
        if (p.u) {
          T* const to = u.at(j, i);
#pragma unroll
          for (int g = 0; g < kGates; ++g) put_pair(to + g * p.u.g, u_t[j][0][g], u_t[j][1][g], place.exist, paired);
        }
        if (p.c) {
          float* const to = c.at(j, i);
          state[j].each_number([&](int number, const float(&pair)[2]) {
            put_pair(to + number * p.c.c, pair[0], pair[1], place.exist, paired);
          });
        }
      }
      hand_on(i + 1, j);
    }
    fetch(i + kAhead);
    __syncthreads();
  }

#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (!place.rows[j].exists) continue;
    const int64_t row = place.rows[j].state;
    if (p.final_h) store_state(state[j].h, p.final_h, p, place, row, p.outputs);
    if (!p.final_c) continue;
    state[j].each_number([&](int number, const float(&pair)[2]) {
      store_state(pair, p.final_c, p, place, number * p.sequences.count + row, p.units);
    });
  }
}

struct Instance {
  Cell cell;
  DType dtype;
  int most_warps;
  void (*kernel)(FwdParams, Fused);
};
template <Cell kCell, typename T, int kMostWarps>
constexpr Instance kInstance = {kCell, kDType<T>, kMostWarps, fwd_kernel<static_cast<int>(kCell), T, kMostWarps>};

constexpr Instance kInstances[] = {
    kInstance<Cell::kLstm, __nv_bfloat16, kFewWarps>,  kInstance<Cell::kLstm, __nv_bfloat16, kManyWarps>,
    kInstance<Cell::kLstm, __half, kFewWarps>,         kInstance<Cell::kLstm, __half, kManyWarps>,
    kInstance<Cell::kLstm, float, kFewWarps>,          kInstance<Cell::kGru, __nv_bfloat16, kFewWarps>,
    kInstance<Cell::kGru, __nv_bfloat16, kManyWarps>,  kInstance<Cell::kGru, __half, kFewWarps>,
    kInstance<Cell::kGru, __half, kManyWarps>,         kInstance<Cell::kGru, float, kFewWarps>,
    kInstance<Cell::kSlstm, __nv_bfloat16, kFewWarps>, kInstance<Cell::kSlstm, __nv_bfloat16, kManyWarps>,
    kInstance<Cell::kSlstm, __half, kFewWarps>,        kInstance<Cell::kSlstm, __half, kManyWarps>,
    kInstance<Cell::kSlstm, float, kFewWarps>,         kInstance<Cell::kElmanTanh, __nv_bfloat16, kManyWarps>,
    kInstance<Cell::kElmanTanh, __half, kManyWarps>,   kInstance<Cell::kElmanTanh, float, kFewWarps>,
};
static_assert(std::size(kInstances) == kFusedFwdKernels);

}  // namespace

Plan plan_fwd(const Inputs& in) {
  return plan_fwd(in, limits_of_device());
}

void fused_fwd(const FwdParams& p, Stream stream) {
  const Plan plan = plan_fwd(p);
  const Cell cell = p.cell == Cell::kElmanRelu ? Cell::kElmanTanh : p.cell;
  const Instance& instance = find_instance(kInstances, "rnn_fwd", [&](const Instance& i) {
    return i.cell == cell && i.dtype == p.x.dtype && i.most_warps == plan.fused.most_warps;
  });
  launch({.name = "rnn_fused_fwd",
          .grid = {plan.blocks},
          .threads = plan.fused.warps * kThreadsOfWarp,
          .smem_bytes = plan.smem_bytes,
          .stream = stream},
         instance.kernel, p, plan.fused);
}

}  // namespace seqkern::rnn::cuda
