// The backward where a head fits a block: R^T stays on the chip for all tokens, and nothing waits for another block.
#include "common/launch.h"
#include "common/limits.cuh"
#include "rnn/rnn.cuh"
#include "rnn/tile_bwd.h"

namespace seqkern::rnn::cuda {
namespace {

// Chunks of R^T (H, Q, G P), whose depth is padded to whole strips of P: elements k, k + 1.. of the rows of a thread's
// units.
template <typename T>
struct RowsOfTransposedR {
  const Inputs& in;
  const Place& place;
  int padded;  // units of a gate

  __device__ __forceinline__ void operator()(int, int k, Chunk (&chunks)[2]) const {
    const int gate = k / padded, first = k % padded, gates = in.sizes().gates;
    const int exist = gate < gates ? static_cast<int>(clamp(in.units - first, 0, kPerChunk<T>)) : 0;
    visit(ArrayFor<float>{in.R}, [&](const auto* R) {
      const auto* from = R + ((place.head * gates + gate) * in.units + first) * in.outputs + place.unit;
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

// What a thread reads of tokens on their way, in places of its own in shared memory: nobody waits for anybody.
template <int kCell, typename T>
struct Ring {
  static constexpr int kGates = CellOf<kCell>::kGates, kCarried = CellOf<kCell>::kCarried;
  enum Which { kX, kU = kGates, kDh = 2 * kGates, kH, kPairs };  // x, u, dh_t, h_{t-1}; c_{t-1} follows
  static constexpr int kBytes = kPairs * sizeof(Pair<T>) + kCarried * sizeof(Pair<float>);
  static_assert(2 * kBytes == token_bytes_bwd(kGates, kCarried, sizeof(T)));

  const BwdParams& p;
  const Place& place;
  int ahead;  // 1, 2 or 4 tokens
  Chunk* memory;

  __device__ __forceinline__ void fetch(int64_t i) const {
#pragma unroll
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

  // Of unit e of row j.
  __device__ __forceinline__ void take(float (&x)[kGates], float (&u)[kGates], float& h, float (&c)[kNumbers<kCell>],
                                       int64_t i, int j, int e) const {
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      x[g] = to<float>((*pair(i, j, kX + g))[e]);
      u[g] = to<float>((*pair(i, j, kU + g))[e]);
    }
    h = to<float>((*pair(i, j, kH))[e]);
#pragma unroll
    for (int number = 0; number < kCarried; ++number) c[number] = (*carried(i, j, number))[e];
  }
  __device__ __forceinline__ float dh(int64_t i, int j, int e) const { return to<float>((*pair(i, j, kDh))[e]); }

 private:
  template <typename U>
  __device__ __forceinline__ Pair<U>* at(int64_t i, int j, int bytes) const {
    const int token = static_cast<int>(i) & (ahead - 1);
    auto* const of_block = reinterpret_cast<unsigned char*>(memory) + ((token * 2 + j) * kBytes + bytes) * blockDim.x;
    return reinterpret_cast<Pair<U>*>(of_block) + threadIdx.x;
  }
  __device__ __forceinline__ Pair<T>* pair(int64_t i, int j, int which) const {
    return at<T>(i, j, which * sizeof(Pair<T>));
  }
  __device__ __forceinline__ Pair<float>* carried(int64_t i, int j, int number) const {
    return at<float>(i, j, kPairs * sizeof(Pair<T>) + number * sizeof(Pair<float>));
  }

  __device__ __forceinline__ void fetch(int64_t i, int j) const {
    const Track<T> x(p.x, place, p.x.g), u(p.u, place, p.u.g), dh(p.dh, place);
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      x.fetch(pair(i, j, kX + g), x.token(j, i, g * p.x.g));
      u.fetch(pair(i, j, kU + g), u.token(j, i, g * p.u.g));
    }
    dh.fetch(pair(i, j, kDh), dh.token(j, i));
    if (i > 0) {
      const Track<T> h(p.h, place);
      const Track<float> c(p.c, place, p.c.c);
      h.fetch(pair(i, j, kH), h.token(j, i - 1));
#pragma unroll
      for (int number = 0; number < kCarried; ++number)
        c.fetch(carried(i, j, number), c.token(j, i - 1, number * p.c.c));
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
  using Rows = RowsOfTransposedR<T>;
  constexpr int kGates = Cell::kGates, kNumbersOfC = kNumbers<kCell>, kChains = 4;
  constexpr int kHeld = held_blocks_bwd(kGates, sizeof(T), kMostWarps);
  const Place place(p, fused);
  const Shared<T> shared(fused);
  const int padded = fused.warps * kStrip;
  const Stationary<T, 1, kHeld> transposed_R(fused, shared.ring, shared.rest, Rows{p, place, padded});
  shared.operand[0].clear(), shared.operand[1].clear();

  State<kCell> gradient[2];  // of h_t and c_t: what later tokens send, and of the final state
  float scale[2][2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    gradient[j] = {};
    gradient[j].load(p.dfinal_h, p.dfinal_c, p, place, j);
    dropout_scale(scale[j], p, place, j);
  }
  __syncthreads();
  const Ring<kCell, T> ring{p, place, fused.ahead, shared.ring};
#pragma unroll 1
  for (int i = 1; i <= fused.ahead; ++i) ring.fetch(place.longest - i);

#pragma unroll 1
  for (int64_t i = place.longest - 1; i >= 0; --i) {
    ring.wait();
    float direct[2][2];  // to h_{t-1}, beside the product
    bool anew[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {  // [adjoint]
      if (i >= place.rows[j].tokens) continue;
      anew[j] = starts_anew(p, place, j, i);
      float share[2] = {0.0f, 0.0f}, h[2], dx[2][kGates], du[2][kGates];
      if (p.zones()) zoneout_share(share, p, place, j, i);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float x[kGates], u[kGates], c[kNumbersOfC] = {};
        ring.take(x, u, h[e], c, i, j, e);
        if (anew[j]) h[e] = 0.0f, Cell::empty(c);
        const float dh = gradient[j].h[e] + ring.dh(i, j, e);
        const float sent = with_cell<kCell>(p.cell, [&](auto cell) {
          return cell.adjoint(x, u, h[e], c, zoned(share[e], 0.0f, dh), gradient[j].c[e], dx[e], du[e]);
        });
        direct[j][e] = sent + zoned(share[e], dh, 0.0f);
#pragma unroll
        for (int number = 0; number < kNumbersOfC; ++number) {
          if (anew[j]) gradient[j].c[e][number] = 0.0f;
        }
      }
      const Track<T> to_dx(p.dx, place, p.dx.g);
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        to_dx.put(to_dx.token(j, i, g * p.dx.g), dx[0][g], dx[1][g]);
        const auto& of_u = Cell::kTwoSides ? du : dx;
        shared.operand[i % 2].put(place.row + j, g * padded + place.unit, of_u[0][g], of_u[1][g]);
      }
      if (Cell::kTwoSides && p.du_last) {
        const Track<T> to_du(p.du_last, place);
        to_du.put(to_du.token(j, i), du[0][kGates - 1], du[1][kGates - 1]);
      }
      if (p.operand) {
        const Track<T> to_operand(p.operand, place);
        to_operand.put(to_operand.token(j, i), h[0] * scale[j][0], h[1] * scale[j][1]);
      }
    }
    ring.fetch(i - fused.ahead);
    __syncthreads();

    float sum[1][kChains][4] = {};  // [return]
    transposed_R.template multiply<kChains>(sum, shared.operand[i % 2]);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (i >= place.rows[j].tokens) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float product = 0.0f;
#pragma unroll
        for (int chain = 0; chain < kChains; ++chain) product += sum[0][chain][2 * e + j];
        const float sent = anew[j] ? 0.0f : fmaf(product, scale[j][e], direct[j][e]);
        gradient[j].h[e] = p.grad_clip < 0 ? sent : clamped(sent, static_cast<float>(p.grad_clip));
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
