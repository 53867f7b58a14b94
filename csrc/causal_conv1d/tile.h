// Pure functions of shape, dtype and strides: how the work is cut and what it needs. Callable without a GPU; the
// launches use the same plans that are printed.
#pragma once
#include "causal_conv1d/params.h"

namespace seqkern::causal_conv1d {

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Weight gradients are summed over tokens in chunks of this many, counted in memory from token 0 of each batch row,
// and then over the chunks in order: the result does not depend on threads, blocks or the device's size.
constexpr int64_t kTimeChunk = 4096;

constexpr int64_t time_chunks(const Inputs& in) {
  return ceil_div(in.sequences.length, kTimeChunk);
}

// Partial sums of dweight and dbias: (B, chunks, W + 1, D) accumulators, the last row of W + 1 for the bias.
constexpr int64_t partials_bytes(const Inputs& in) {
  return in.sequences.batch * time_chunks(in) * (in.width + 1) * in.channels * size_of(accumulator(in.dtype));
}

namespace cuda {

// Three paths, chosen by dtype, W, dilation and memory order only, so that B, L and packing change no bit of y or dx.
//   time     W <= 4, time contiguous: a thread owns vectors of neighbouring tokens of one channel
//   channel  W <= 4, channels contiguous: a thread owns a vector of channels and walks through time
//   general  longer or dilated filters, fp64: a thread owns one element
enum class Path { kTime, kChannel, kGeneral };

constexpr int kMaxTaps = 4;          // W of the time and channel paths
constexpr int kPast = kMaxTaps - 1;  // tokens before its own that a thread of these paths needs
constexpr int kHalo = 4;             // elements loaded for them: kPast, rounded up to a vector
constexpr int kChannelLanes = 8;     // bwd_channel: threads along channels; the rest of the block along time
constexpr int kReduceChannels = 32;  // reduce: channels of a block; its warps share the partial sums of each

struct Tile {
  int threads;        // of a block
  int vector;         // elements of one memory access
  int count;          // time: vectors of a thread; channel: tokens of a thread
  int blocks_per_sm;  // planned; bounds the registers
};

constexpr Path pick_path(const Inputs& in) {
  const bool dilated = in.dilation > 1 && in.width > 1;
  if (in.width > kMaxTaps || dilated || in.dtype == DType::kFloat64) return Path::kGeneral;
  return in.x_stride.l == 1 ? Path::kTime : Path::kChannel;
}

constexpr int vector_along_time(DType dtype) {
  return static_cast<int>(16 / size_of(dtype));
}

constexpr Tile pick_fwd_tile(Path path, DType dtype) {
  switch (path) {
    case Path::kTime:
      return {.threads = 128, .vector = vector_along_time(dtype), .count = 2, .blocks_per_sm = 6};
    case Path::kChannel:
      return {.threads = 256, .vector = 4, .count = 8, .blocks_per_sm = 2};
    default:
      return {.threads = 128, .vector = 1, .count = 1, .blocks_per_sm = 5};
  }
}

constexpr Tile pick_bwd_tile(Path path, DType dtype) {
  const int vector = vector_along_time(dtype);
  switch (path) {
    case Path::kTime:
      return {.threads = 128, .vector = vector, .count = 16 / vector, .blocks_per_sm = 5};
    case Path::kChannel:
      return {.threads = 128, .vector = 4, .count = 16, .blocks_per_sm = 3};
    default:
      return {.threads = 256, .vector = 1, .count = 1, .blocks_per_sm = 3};
  }
}

// Tokens whose weight gradients are summed in registers before they go to the workspace: of a warp on the time path,
// of a block on the channel path.
constexpr int chunk_of(Path path, const Tile& tile) {
  switch (path) {
    case Path::kTime:
      return 32 * tile.vector * tile.count;
    case Path::kChannel:
      return tile.threads / kChannelLanes * tile.count;
    default:
      return 512;
  }
}

constexpr Tile kReduceTile{.threads = 256, .vector = 1, .count = 1, .blocks_per_sm = 6};
constexpr Tile kStepTile{.threads = 128, .vector = 1, .count = 1, .blocks_per_sm = 8};

// How a grid is cut. Blocks from `token_blocks` on own rows of states.
struct Cut {
  int64_t token_blocks = 0;
  int64_t state_blocks = 0;
  int64_t along_time = 0;      // fwd_time: threads of a row; fwd_channel: blocks of a row; backward: chunks of a row
  int64_t along_channels = 0;  // blocks, channel path
  int lanes = 0;               // fwd_channel: threads along channels, a power of two
  bool vectorized = false;     // channel path: every token's channels are aligned for vector access
};

struct Plan {
  const char* kernel;
  const char* why;
  Tile tile;
  Cut cut;
  int launches;
  int64_t smem_bytes;
  int64_t workspace_bytes;
  int64_t bytes;  // compulsory global memory traffic: every tensor once
};

constexpr int64_t elements(const Inputs& in) {
  return in.sequences.batch * in.channels * in.sequences.length;
}

constexpr int64_t state_elements(const Inputs& in) {
  return in.sequences.count * in.channels * in.state_size();
}

constexpr int64_t parameter_bytes(const Inputs& in) {
  return in.channels * (in.width * size_of(in.weight.dtype) + (in.bias ? size_of(in.bias.dtype) : 0));
}

constexpr int64_t packing_bytes(const Inputs& in) {
  const Sequences& s = in.sequences;
  if (s.cu_seqlens) return (s.count + 1) * (s.cu_seqlens_is_int64 ? 8 : 4);
  return s.seq_idx ? s.batch * s.length * 4 : 0;
}

constexpr int64_t state_bytes(const Inputs& in, const Array& state) {
  return state ? state_elements(in) * size_of(state.dtype) : 0;
}

// Vectors of a row begin where memory is aligned, so that any L is read at full width: the first one may begin up to
// vector - 1 tokens before the row.
inline int64_t vectors_of_row(const Inputs& in, int vector) {
  const auto aligned = [&](int64_t offset) { return offset % vector == 0; };
  const bool rows_aligned = aligned(reinterpret_cast<intptr_t>(in.x) / size_of(in.dtype)) && aligned(in.x_stride.b) &&
                            aligned(in.x_stride.d) && (!in.sequences.reverse || aligned(in.sequences.length));
  const int64_t length = in.sequences.length;
  return ceil_div(length + (rows_aligned || length == 0 ? 0 : vector - 1), vector);
}

inline bool channels_aligned(const Inputs& in, const void* data, const Strides& stride, int vector) {
  return reinterpret_cast<intptr_t>(data) % (vector * size_of(in.dtype)) == 0 && in.channels % vector == 0 &&
         stride.b % vector == 0 && stride.l % vector == 0;
}

constexpr const char* why(Path path) {
  switch (path) {
    case Path::kTime:
      return "W <= 4, dilation 1, time contiguous: vectors of tokens";
    case Path::kChannel:
      return "W <= 4, dilation 1, channels contiguous: vectors of channels";
    default:
      return "W > 4, dilation > 1 or fp64: one element per thread";
  }
}

inline Plan plan_fwd(const FwdParams& p) {
  const Path path = pick_path(p);
  const Tile tile = pick_fwd_tile(path, p.dtype);
  const int64_t B = p.sequences.batch, D = p.channels, L = p.sequences.length;
  Plan plan{.kernel = "",
            .why = why(path),
            .tile = tile,
            .cut = {},
            .launches = 1,
            .smem_bytes = 0,
            .workspace_bytes = 0,
            .bytes = 0};
  Cut& cut = plan.cut;
  switch (path) {
    case Path::kTime:
      plan.kernel = "causal_conv1d_fwd_time";
      cut.along_time = ceil_div(vectors_of_row(p, tile.vector), tile.count);
      cut.token_blocks = ceil_div(B * D * cut.along_time, tile.threads);
      break;
    case Path::kChannel:
      plan.kernel = "causal_conv1d_fwd_channel";
      cut.vectorized =
          channels_aligned(p, p.x, p.x_stride, tile.vector) && channels_aligned(p, p.y, p.y_stride, tile.vector);
      cut.lanes = 32;
      while (cut.lanes > 1 && cut.lanes / 2 * tile.vector >= D) cut.lanes /= 2;
      cut.along_channels = ceil_div(D, cut.lanes * tile.vector);
      cut.along_time = ceil_div(L, tile.threads / cut.lanes * tile.count);
      cut.token_blocks = B * cut.along_time * cut.along_channels;
      plan.smem_bytes = (kMaxTaps + 1) * 32 * tile.vector * 4;
      break;
    case Path::kGeneral:
      plan.kernel = "causal_conv1d_fwd_general";
      cut.token_blocks = ceil_div(elements(p), tile.threads);
      break;
  }
  if (p.final_state) cut.state_blocks = ceil_div(state_elements(p), tile.threads);
  plan.bytes = 2 * elements(p) * size_of(p.dtype) + parameter_bytes(p) + packing_bytes(p) +
               state_bytes(p, p.initial_state) + state_bytes(p, p.final_state);
  return plan;
}

// Chunks of a row; on the time path counted in whole vectors.
inline int64_t chunks_of_row(const Inputs& in) {
  const Path path = pick_path(in);
  const Tile tile = pick_bwd_tile(path, in.dtype);
  const int64_t vectors =
      path == Path::kTime ? vectors_of_row(in, tile.vector) : ceil_div(in.sequences.length, tile.vector);
  return ceil_div(vectors, chunk_of(path, tile) / tile.vector);
}

// Of the backward: partial sums (B, chunks, W + 1, D), the last row of W + 1 for the bias; and on the general path
// with SiLU the gradient of pre, (B, D, L) in the memory order of x. Accumulator dtype.
inline int64_t partial_elements(const Inputs& in) {
  return in.sequences.batch * chunks_of_row(in) * (in.width + 1) * in.channels;
}

constexpr bool keeps_dpre(const Inputs& in) {
  return pick_path(in) == Path::kGeneral && in.silu;
}

inline int64_t workspace_bytes(const Inputs& in) {
  return (partial_elements(in) + (keeps_dpre(in) ? elements(in) : 0)) * size_of(accumulator(in.dtype));
}

inline Plan plan_bwd(const BwdParams& p) {
  const Path path = pick_path(p);
  const Tile tile = pick_bwd_tile(path, p.dtype);
  const int64_t B = p.sequences.batch, D = p.channels;
  Plan plan{.kernel = "",
            .why = why(path),
            .tile = tile,
            .cut = {},
            .launches = 2,
            .smem_bytes = 0,
            .workspace_bytes = workspace_bytes(p),
            .bytes = 0};
  Cut& cut = plan.cut;
  cut.along_time = chunks_of_row(p);
  switch (path) {
    case Path::kTime:
      plan.kernel = "causal_conv1d_bwd_time";
      cut.token_blocks = ceil_div(B * D * cut.along_time, tile.threads / 32);
      break;
    case Path::kChannel:
      plan.kernel = "causal_conv1d_bwd_channel";
      cut.vectorized = channels_aligned(p, p.x, p.x_stride, tile.vector) &&
                       channels_aligned(p, p.dy, p.dy_stride, tile.vector) &&
                       channels_aligned(p, p.dx, p.dx_stride, tile.vector);
      cut.lanes = kChannelLanes;
      cut.along_channels = ceil_div(D, cut.lanes * tile.vector);
      cut.token_blocks = B * cut.along_time * cut.along_channels;
      plan.smem_bytes = (kMaxTaps + 1) * cut.lanes * tile.vector * (1 + tile.threads / cut.lanes) * 4;
      break;
    case Path::kGeneral:
      plan.kernel = "causal_conv1d_bwd_dx";
      cut.token_blocks = ceil_div(elements(p), tile.threads);
      plan.launches = p.silu ? 4 : 3;
      break;
  }
  if (p.dinitial_state) cut.state_blocks = ceil_div(state_elements(p), tile.threads);
  plan.bytes = 3 * elements(p) * size_of(p.dtype) + 2 * parameter_bytes(p) + packing_bytes(p) +
               2 * plan.workspace_bytes + state_bytes(p, p.initial_state) + state_bytes(p, p.dinitial_state) +
               state_bytes(p, p.dfinal_state);
  return plan;
}

constexpr Plan plan_step(const StepParams& p) {
  const int64_t channels = p.batch * p.channels;
  return {.kernel = "causal_conv1d_step",
          .why = "a thread owns one channel of one batch row",
          .tile = kStepTile,
          .cut = {.token_blocks = ceil_div(channels, kStepTile.threads)},
          .launches = 1,
          .smem_bytes = 0,
          .workspace_bytes = 0,
          .bytes = channels * (2 * p.tokens * size_of(p.dtype) + 2 * p.state_size * size_of(p.conv_state.dtype)) +
                   p.channels * (p.width * size_of(p.weight.dtype) + (p.bias ? size_of(p.bias.dtype) : 0))};
}

// Kernel instances: 3 dtypes on the time and channel paths and 4 on the general one, forward and backward (dpre, dx
// and weight sums apart on the general path); the reduction for 2 accumulators; the step for 4 dtypes.
constexpr int kFwdKernels = 2 * 3 + 4;
constexpr int kBwdKernels = 2 * 3 + 2;
constexpr int kBwdGeneralKernels = 3 * 4;
constexpr int kStepKernels = 4;

}  // namespace cuda
}  // namespace seqkern::causal_conv1d
