// The backward where a head fits a block: R^T stays on the chip for all tokens, and nothing waits for another block.
#include "common/launch.h"
#include "common/limits.cuh"
#include "rnn/rnn.cuh"
#include "rnn/tile_bwd.h"

namespace seqkern::rnn::cuda {
namespace {

// Chunks of R^T (H, Q, G P), whose depth is padded to whole strips of P: elements k, k + 1.. of the rows of a thread's
// units.
template <typename T, int kGates>
struct RowsOfTransposedR {
  const Inputs& in;
  const Place& place;
  int padded;  // units of a gate

  __device__ __forceinline__ void operator()(int, int k, Chunk (&chunks)[2]) const {
    const int gate = k / padded, first = k % padded;
    const int exist = gate < kGates ? static_cast<int>(clamp(in.units - first, 0, kPerChunk<T>)) : 0;
    visit(ArrayFor<float>{in.R}, [&](const auto* R) {
      const auto* from = R + ((int64_t{place.head} * kGates + gate) * in.units + first) * in.outputs + place.unit;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        Vector<T, kPerChunk<T>> elements;
#pragma unroll
        for (int i = 0; i < kPerChunk<T>; ++i)
          elements[i] = i < exist && e < place.exist ? to<T>(load(from + i * in.outputs + e)) : to<T>(0.0f);
        chunks[e] = chunk_of(elements);
      }
    });
  }
};

// What a thread reads of a token of one of its rows.
template <int kCell, typename T>
struct Given {
  Pair<T> x[CellOf<kCell>::kGates], u[CellOf<kCell>::kGates], dh, h;  // x_t, u_t, dh_t, h_{t-1}
  Pair<float> c[kNumbers<kCell>];                                     // c_{t-1}
};

// Such tokens on their way, in places of each thread's own in shared memory: nobody waits for anybody. The pairs of a
// warp lie side by side: (warps, ahead, 2, pairs of a token, 32).
template <int kCell, typename T>
struct Ring {
  static constexpr int kGates = CellOf<kCell>::kGates, kCarried = CellOf<kCell>::kCarried;
  enum Which { kX, kU = kGates, kDh = 2 * kGates, kH, kPairs };  // c_{t-1} follows
  static constexpr int kBytes = kPairs * sizeof(Pair<T>) + kCarried * sizeof(Pair<float>);
  static_assert(2 * kBytes == token_bytes_bwd(kGates, kCarried, sizeof(T)));

  const BwdParams& p;
  const Place& place;
  const Shared<T>& shared;
  int ahead;  // 1, 2 or 4 tokens
  bool paired;
  Track<T, GateData> x{p.x, place, 0}, u{p.u, place, 1};
  Track<T, TokenData> dh{p.dh, place, 2}, h{p.h, place, 3};
  Track<float, CarriedData> c{p.c, place, 4};

  __device__ __forceinline__ void fetch(int i) const {
#pragma unroll 1
    for (int j = 0; j < 2; ++j) {
      if (i >= 0 && i < place.rows[j].tokens) fetch(i, j);
    }
    commit_copies();
  }
  // For the token that was fetched `ahead` calls ago.
  __device__ __forceinline__ void wait() const {
    if (ahead == 1)
      wait_copies<0>();
    else if (ahead == 2)
      wait_copies<1>();
    else
      wait_copies<3>();
  }
  __device__ __forceinline__ Given<kCell, T> take(int i, int j) const {
    Given<kCell, T> given = {};
#pragma unroll
    for (int g = 0; g < kGates; ++g) given.x[g] = *pair(i, j, kX + g), given.u[g] = *pair(i, j, kU + g);
    given.dh = *pair(i, j, kDh), given.h = *pair(i, j, kH);
#pragma unroll
    for (int number = 0; number < kCarried; ++number) given.c[number] = *carried(i, j, number);
    return given;
  }

 private:
  template <typename U>
  __device__ __forceinline__ Pair<U>* at(int i, int j, int bytes) const {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, token = i & (ahead - 1);
    auto* const of_token =
        reinterpret_cast<unsigned char*>(shared.ring) + (warp * ahead + token) * 2 * kBytes * kWarpSize;
    return reinterpret_cast<Pair<U>*>(of_token + (j * kBytes + bytes) * kWarpSize) + lane;
  }
  __device__ __forceinline__ Pair<T>* pair(int i, int j, int which) const {
    return at<T>(i, j, which * sizeof(Pair<T>));
  }
  __device__ __forceinline__ Pair<float>* carried(int i, int j, int number) const {
    return at<float>(i, j, kPairs * sizeof(Pair<T>) + number * sizeof(Pair<float>));
  }

  __device__ __forceinline__ void fetch(int i, int j) const {
    const T *from_x = x.at(j, i), *from_u = u.at(j, i);
    if (paired) {
#pragma unroll
      for (int g = 0; g < kGates; ++g, from_x += p.x.g, from_u += p.u.g) {
        fetch_pair(pair(i, j, kX + g), from_x, place.exist, true);
        fetch_pair(pair(i, j, kU + g), from_u, place.exist, true);
      }
    } else {
#pragma unroll 1
      for (int g = 0; g < kGates; ++g, from_x += p.x.g, from_u += p.u.g) {
        fetch_pair(pair(i, j, kX + g), from_x, place.exist, false);
        fetch_pair(pair(i, j, kU + g), from_u, place.exist, false);
      }
    }
    fetch_pair(pair(i, j, kDh), dh.at(j, i), place.exist, paired);
    if (i > 0) {
      fetch_pair(pair(i, j, kH), h.at(j, i - 1), place.exist, paired);
      const float* from_c = c.at(j, i - 1);
#pragma unroll
      for (int number = 0; number < kCarried; ++number, from_c += p.c.c)
        fetch_pair(carried(i, j, number), from_c, place.exist, paired);
    } else {
      State<kCell> state;
      state.begin(p, place, j);
      *pair(i, j, kH) = {{to<T>(state.h[0]), to<T>(state.h[1])}};
      state.each_number([&](int number, const float(&of_c)[2]) { *carried(i, j, number) = {{of_c[0], of_c[1]}}; });
    }
  }
};

__device__ __forceinline__ float clamped(float x, float limit) {
  return x > limit ? limit : x < -limit ? -limit : x;
}

// [adjoint] [return]
// block    8 sequences of a head, all their tokens, from the last to the first
// warp     16 units of all gates, and of h_{t-1}
// thread   two units of two sequences
// shared   du_t as an operand, and that of the token before; tokens on their way, what registers cannot hold of R^T
// bytes    what is given and what is asked for, once; R once for each block
// limits   units <= 16 warps
template <int kCell, typename T, int kMostWarps>
__global__ void __launch_bounds__(kMostWarps* kWarpSize, 1)
    bwd_kernel(const __grid_constant__ BwdParams p, const __grid_constant__ Fused fused) {
  using Cell = CellOf<kCell>;
  constexpr int kGates = Cell::kGates, kNumbersOfC = kNumbers<kCell>, kChains = 4;
  constexpr int kHeld = held_blocks_bwd(kGates, sizeof(T), kMostWarps);
  constexpr int kMost = most_blocks_bwd(kGates, sizeof(T), kMostWarps);
  const Shared<T> shared(fused);
  const Place place(p, fused, shared.rows);
  const int padded = fused.warps * kStrip;
  Stationary<T, 1, kHeld, (kHeld < kMost)> transposed_R(fused, shared.ring, shared.rest,
                                                        RowsOfTransposedR<T, kGates>{p, place, padded});
  shared.operand(0).clear(), shared.operand(1).clear();

  const auto *dfinal_h = static_cast<const float*>(p.dfinal_h.data),
             *dfinal_c = static_cast<const float*>(p.dfinal_c.data);
  State<kCell> gradient[2];  // of h_t and c_t: what later tokens send, and of the final state
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    gradient[j] = {};
    gradient[j].load(dfinal_h, dfinal_c, p, place, j);
  }
  const uint32_t never_read = dropped(p, place);  // of h, by products
  const float scale = fused.dropout_scale, share = fused.zoneout_share;
  const float limit = p.grad_clip < 0 ? __builtin_inff() : static_cast<float>(p.grad_clip);
  const bool paired = cuda::paired<T>(p.x, p.x.g) && cuda::paired<T>(p.u, p.u.g) && cuda::paired<T>(p.dh) &&
                      cuda::paired<T>(p.h) && cuda::paired<float>(p.c, p.c.c) && cuda::paired<T>(p.dx, p.dx.g) &&
                      cuda::paired<T>(p.du_last) && cuda::paired<T>(p.operand);
  const Ring<kCell, T> ring{p, place, shared, fused.ahead, paired};
  const Track<T, GateData> dx_t(p.dx, place, 5);
  const Track<T, TokenData> du_last(p.du_last, place, 6), operand(p.operand, place, 7);
  __syncthreads();
#pragma unroll 1
  for (int i = place.longest - 1 + fused.ahead; i >= 0; --i) {
    const bool first_copies = i >= place.longest;
    float direct[2][2];  // to h_{t-1}, beside the product
    bool anew[2];
    if (!first_copies) {
      ring.wait();
      const uint32_t stays = kept(p, place, i);  // of h
      float h[2][2], dx[2][2][kGates], du[2][2][kGates];
#pragma unroll
      for (int j = 0; j < 2; ++j) {  // [adjoint]
        const bool active = i < place.rows[j].tokens;
        anew[j] = active && starts_anew(p, place, j, i);
        const Given<kCell, T> given = ring.take(i, j);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float x[kGates], u[kGates], c[kNumbersOfC], dc[kNumbersOfC];
          h[j][e] = anew[j] ? 0.0f : to<float>(given.h[e]);
#pragma unroll
          for (int g = 0; g < kGates; ++g) x[g] = to<float>(given.x[g][e]), u[g] = to<float>(given.u[g][e]);
#pragma unroll
          for (int number = 0; number < kNumbersOfC; ++number)
            c[number] = given.c[number][e], dc[number] = gradient[j].c[e][number];
          if (anew[j]) Cell::empty(c);
          const float dh = gradient[j].h[e] + to<float>(given.dh[e]);
          const float dm = happened(stays, e, j) ? 0.0f : (1.0f - share) * dh;
          direct[j][e] = happened(stays, e, j) ? dh : share > 0.0f ? share * dh : 0.0f;
          direct[j][e] += with_cell<kCell>(
              p.cell, [&](auto cell) { return cell.adjoint(x, u, h[j][e], c, dm, dc, dx[j][e], du[j][e]); });
#pragma unroll
          for (int number = 0; number < kNumbersOfC; ++number) {
            if (active) gradient[j].c[e][number] = anew[j] ? 0.0f : dc[number];
          }
        }
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          const auto& of_u = Cell::kTwoSides ? du[j] : dx[j];
          shared.operand(i).put(place.row + j, g * padded + place.unit, of_u[0][g], of_u[1][g]);
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (i >= place.rows[j].tokens) continue;
        if (p.operand) {
          const auto read = [&](int e) { return happened(never_read, e, j) ? 0.0f : h[j][e] * scale; };
          put_pair(operand.at(j, i), read(0), read(1), place.exist, paired);
        }
        T* to = dx_t.at(j, i);
#pragma unroll
        for (int g = 0; g < kGates; ++g, to += p.dx.g) put_pair(to, dx[j][0][g], dx[j][1][g], place.exist, paired);
        if (Cell::kTwoSides && p.du_last)
          put_pair(du_last.at(j, i), du[j][0][kGates - 1], du[j][1][kGates - 1], place.exist, paired);
      }
    }
    ring.fetch(i - fused.ahead);
    if (first_copies) continue;
    __syncthreads();

    float sum[1][kChains][4] = {};  // [return]
    transposed_R.template multiply<kChains>(sum, shared.operand(i));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (i >= place.rows[j].tokens) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float returned = happened(never_read, e, j) ? 0.0f : sum_of(sum[0], e, j) * scale;
        const float sent = anew[j] ? 0.0f : direct[j][e] + returned;
        gradient[j].h[e] = clamped(sent, limit);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) gradient[j].store(p.dinitial_h, p.dinitial_c, p, place, j);
}

struct Instance {
  Cell cell;
  DType dtype;
  int most_warps;
  void (*kernel)(BwdParams, Fused);
};
template <Cell kCell, typename T, int kMostWarps>
constexpr Instance kInstance = {kCell, kDType<T>, kMostWarps, bwd_kernel<static_cast<int>(kCell), T, kMostWarps>};

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
static_assert(std::size(kInstances) == kFusedBwdKernels);

}  // namespace

Plan plan_bwd(const Inputs& in) {
  return plan_bwd(in, limits_of_device());
}

void fused_bwd(const BwdParams& p, Stream stream) {
  const Plan plan = plan_bwd(p);
  const Cell cell = p.cell == Cell::kElmanRelu ? Cell::kElmanTanh : p.cell;
  const Instance& instance = find_instance(kInstances, "rnn_bwd", [&](const Instance& i) {
    return i.cell == cell && i.dtype == p.x.dtype && i.most_warps == plan.fused.most_warps;
  });
  launch({.name = "rnn_fused_bwd",
          .grid = {plan.blocks},
          .threads = plan.fused.warps * kThreadsOfWarp,
          .smem_bytes = plan.smem_bytes,
          .stream = stream},
         instance.kernel, p, plan.fused);
}

}  // namespace seqkern::rnn::cuda
