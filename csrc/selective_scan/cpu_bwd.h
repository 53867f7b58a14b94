// The backward pass: states of a chunk are computed again from its checkpoint, then differentiated last to first. dB
// and dC are summed over the channels of a block, dA, dD and ddelta_bias over a slab of runs, then both in a fixed
// order. Internal to cpu.cpp.
#pragma once
#include "common/parallel.h"
#include "selective_scan/cpu_call.h"

namespace seqkern::selective_scan {
namespace {

template <class F>
struct Backward : Call<F> {
  using A = typename F::A;
  using Call<F>::in;
  static constexpr int kVectors = kBlock / kLanes<A>;
  static constexpr int64_t kTile = kChunk * kLanes<A>;
  static constexpr int64_t kStateTile = kChunk * kStatesOfBlock * F::kWidth;

  const BwdParams& p;
  const int64_t piece = channels_of_piece(in), blocks = num_blocks(in), slabs = num_slabs(in);
  const int64_t numbers = in.states * F::kWidth;
  const int64_t of_token = in.states * F::kParts;  // accumulators of a token's B or C
  const int64_t of_block = in.sequences.batch * this->L * of_token;
  A* const dB_partials = static_cast<A*>(p.workspace);  // (blocks, B, for each block of states: (L, states, parts))
  A* const dC_partials = dB_partials + (in.B.constant() ? 0 : blocks * of_block);
  A* const channel_partials = dC_partials + (in.C.constant() ? 0 : blocks * of_block);  // (slabs, sums, D)

  explicit Backward(const BwdParams& params) : Call<F>(params), p(params) {}

  // A vector of channels: its parameters, sums over time, and what is known of each token of a chunk.
  struct Vector {
    Channels<F> channels;
    A *carry, *dA, *dB, *dC;  // N numbers; dB and dC of constant ones
    A *dD, *dbias;            // vectors
    A *u, *delta, *x, *sum;   // (kChunk, kLanes), as in the forward
    A* slope;                 // d delta' / d delta
    A *dout, *gate;           // dout, and dz / out
    A *dB_sum, *dA_sum;

    template <class Take>
    void allocate(const Inputs& in, const Take& take) {
      const int64_t numbers = in.states * F::kWidth;
      channels.allocate(in, take);
      carry = take(numbers), dA = take(numbers);
      dB = in.B.constant() ? take(numbers) : nullptr, dC = in.C.constant() ? take(numbers) : nullptr;
      dD = take(kLanes<A>), dbias = take(kLanes<A>);
      u = take(kTile), delta = take(kTile), x = take(kTile), sum = take(kTile), slope = take(kTile);
      dout = take(kTile), gate = take(kTile), dB_sum = take(kTile), dA_sum = take(kTile);
    }
  };

  struct Arrays {
    Vector vectors[kVectors];
    A *B, *C;            // tiles of variable ones
    A *kept_a, *kept_h;  // (kChunk (+ 1), states of a block), numbers
    A *dB, *dC;          // likewise: sums over vectors of channels

    template <class Take>
    void allocate(const Backward& call, const Take& take) {
      for (Vector& v : vectors) v.allocate(call.in, take);
      B = take(call.coefficients), C = take(call.coefficients);
      kept_a = take(kStateTile), kept_h = take(kStateTile + kStatesOfBlock * F::kWidth);
      dB = take(kStateTile), dC = take(kStateTile);
    }
  };
  using Workspace = InScratch<A, Arrays>;

  void run() const {
    const int64_t tokens = in.sequences.batch * this->L / at_least(1, slabs);
    const int64_t work = at_least(1, tokens * in.states * at_most(kBlock, piece));
    parallel_for(0, slabs * blocks, kGrain / 4 / work + 1, [&](int64_t begin, int64_t end) {
      Workspace workspace(*this);
      for (int64_t item = begin; item < end; ++item) differentiate_slab(item % slabs, item / slabs, workspace);
      finish_streams();
    });
    reduce_tokens(in.B, p.dB, dB_partials);
    reduce_tokens(in.C, p.dC, dC_partials);
    reduce_channels();
  }

  void differentiate_slab(int64_t slab, int64_t block, Workspace& w) const {
    const int64_t blocks_per_piece = blocks_of_piece(in);
    const int64_t end_of_piece = (block / blocks_per_piece + 1) * piece;
    const int64_t first = block / blocks_per_piece * piece + block % blocks_per_piece * kBlock;
    int vectors = 0;
    for (int64_t d = first; d < end_of_piece && vectors < kVectors; d += kLanes<A>) {
      Vector& v = w.vectors[vectors++];
      v.channels.load(in, d, end_of_piece);
      Channels<F>::clear(v.dA, numbers);
      if (v.dB) Channels<F>::clear(v.dB, numbers);
      if (v.dC) Channels<F>::clear(v.dC, numbers);
      Channels<F>::clear(v.dD, kLanes<A>);
      Channels<F>::clear(v.dbias, kLanes<A>);
    }
    for (int64_t r = slab * in.num_runs / slabs; r < (slab + 1) * in.num_runs / slabs; ++r)
      differentiate_run(in.runs[r], block, vectors, w);
    for (int v = 0; v < vectors; ++v) store_sums(slab, w.vectors[v]);
  }

  void differentiate_run(const Run& run, int64_t block, int vectors, Workspace& w) const {
    const Array dlast = run.final < 0 ? Array{} : p.dlast_state;
    for (int v = 0; v < vectors; ++v) {
      const Channels<F>& channels = w.vectors[v].channels;
      channels.load_states(in, dlast, run.final, w.vectors[v].carry);
    }
    this->for_each_chunk(run, true, [&](const Chunk& chunk) {
      if (run.padding)
        clear_chunk(chunk, block, vectors, w);
      else
        differentiate_chunk(chunk, block, vectors, w);
    });
    if (!p.dinitial_state || run.initial < 0) return;
    for (int v = 0; v < vectors; ++v) {
      const Channels<F>& channels = w.vectors[v].channels;
      store_tile<A>(w.vectors[v].carry, channels.states(in, p.dinitial_state, run.initial), channels.lanes, of_token);
    }
  }

  void clear_chunk(const Chunk& chunk, int64_t block, int vectors, Workspace& w) const {
    for (int v = 0; v < vectors; ++v) {
      const Channels<F>& channels = w.vectors[v].channels;
      this->store_zeros(p.du, chunk, channels);
      this->store_zeros(p.ddelta, chunk, channels);
      if (p.dz) this->store_zeros(p.dz, chunk, channels);
    }
    for_each_state_block(in.states, [&]<int kStates>(int64_t n) {
      Channels<F>::clear(w.dB, kStateTile);
      if (!in.B.constant()) store_sum_over_lanes<kStates>(w.dB, partials_of(dB_partials, chunk, block, n, kStates));
      if (!in.C.constant()) store_sum_over_lanes<kStates>(w.dB, partials_of(dC_partials, chunk, block, n, kStates));
    });
  }

  void differentiate_chunk(const Chunk& chunk, int64_t block, int vectors, Workspace& w) const {
    const int64_t first = w.vectors[0].channels.first;
    this->load_coefficients(in.B, chunk, first, w.B);
    this->load_coefficients(in.C, chunk, first, w.C);
    for (int v = 0; v < vectors; ++v) prepare(chunk, w.vectors[v]);
    for_each_state_block(in.states, [&]<int kStates>(int64_t n) {
      if (!in.B.constant()) Channels<F>::clear(w.dB, chunk.count * kStates * F::kWidth);
      if (!in.C.constant()) Channels<F>::clear(w.dC, chunk.count * kStates * F::kWidth);
      for (int v = 0; v < vectors; ++v)
        differentiate_states<kStates>(chunk, n, w.vectors[v], w,
                                      tiles_before(chunk, w.vectors[v]).share(n, kStates, in.states));
      if (!in.B.constant()) store_sum_over_lanes<kStates>(w.dB, partials_of(dB_partials, chunk, block, n, kStates));
      if (!in.C.constant()) store_sum_over_lanes<kStates>(w.dC, partials_of(dC_partials, chunk, block, n, kStates));
    });
    for (int v = 0; v < vectors; ++v) finish(chunk, w.vectors[v]);
  }

  // Everything that does not depend on states.
  void prepare(const Chunk& chunk, Vector& v) const {
    const Channels<F>& channels = v.channels;
    if (chunk.begins)
      channels.load_states(in, in.initial_state, chunk.run->initial, channels.h);
    else
      load_tile<A>(checkpoint(chunk, channels.first), channels.lanes, of_token, channels.h);
    this->load_delta(chunk, channels, v.u, v.delta, v.x, v.slope);
    load_tile<A>(this->tokens(p.dy, chunk, channels.first), channels.lanes, chunk.count, v.dout);
    if (in.z) load_tile<A>(this->tokens(in.z, chunk, channels.first), channels.lanes, chunk.count, v.gate);
    for (int64_t i = 0; i < chunk.count * kLanes<A>; i += kLanes<A>) {
      if (in.z) {  // [gate]
        const Vec<A> dy = load<A>(v.dout + i), z = load<A>(v.gate + i);
        store<A>(v.dout + i, dy * silu(z));
        store<A>(v.gate + i, dy * silu_derivative(z));
      }
      store<A>(v.sum + i, Vec<A>{});
      store<A>(v.dB_sum + i, Vec<A>{});
      store<A>(v.dA_sum + i, Vec<A>{});
    }
  }

  Ahead tiles_before(const Chunk& chunk, const Vector& v) const {
    Ahead ahead;
    const Chunk before{chunk.run, chunk.tau - kChunk, kChunk, false};
    const Data* const arrays[] = {&in.u, &in.delta, &in.z, &p.dy};
    for (const Data* x : arrays)
      if (*x) ahead.add<A>(this->tokens(*x, before, v.channels.first));
    return ahead;
  }

  template <int kStates>
  void differentiate_states(const Chunk& chunk, int64_t n, Vector& v, Workspace& w, const Ahead& ahead) const {
    const Channels<F>& channels = v.channels;
    const Tile<F> tile{chunk.count,
                       in.two_exp,
                       this->coefficients_of(in.B, channels.B, w.B),
                       this->coefficients_of(in.C, channels.C, w.C),
                       v.delta,
                       v.x,
                       v.sum};
    const int64_t token = kStates * F::kWidth;
    if (v.dB) Channels<F>::clear(w.dB, token);
    if (v.dC) Channels<F>::clear(w.dC, token);
    const Gradients<F> grad{v.dout, v.dB_sum, v.dA_sum, w.dB, w.dC, v.dB ? 0 : token, v.dC ? 0 : token};
    advance<F, kStates, true>(tile, n, channels.scaled_A, channels.h, w.kept_a, w.kept_h, ahead);
    differentiate<F, kStates>(tile, grad, n, channels.plain_A, v.carry, v.dA, w.kept_a, w.kept_h);
    if (v.dB) add(w.dB, token, v.dB + n * F::kWidth);
    if (v.dC) add(w.dC, token, v.dC + n * F::kWidth);
  }

  static void add(const A* from, int64_t count, A* to) {
    for (int64_t i = 0; i < count; i += kLanes<A>) store<A>(to + i, load<A>(to + i) + load<A>(from + i));
  }

  void finish(const Chunk& chunk, Vector& v) const {
    const Channels<F>& channels = v.channels;
    Vec<A> dD{}, dbias{};  // of the chunk: sums of sums err less than one long sum
    const Vec<A> D = load<A>(channels.D);
    for (int64_t j = chunk.count; j-- > 0;) {
      const int64_t i = j * kLanes<A>;
      const Vec<A> u = load<A>(v.u + i), delta = load<A>(v.delta + i), dout = load<A>(v.dout + i);
      const Vec<A> out = this->output(channels, load<A>(v.sum + i), u);  // [out]
      const Vec<A> dx = load<A>(v.dB_sum + i);
      Vec<A> du = delta * dx;
      if (in.D) du = madd(D, dout, du);
      const Vec<A> ddelta = madd(u, dx, load<A>(v.dA_sum + i)) * load<A>(v.slope + i);
      dD = madd(dout, u, dD);
      dbias += ddelta;
      store<A>(v.u + i, du);                                      // [du]
      store<A>(v.delta + i, ddelta);                              // [ddelta]
      if (in.z) store<A>(v.gate + i, load<A>(v.gate + i) * out);  // [gate]
    }
    store<A>(v.dD, load<A>(v.dD) + dD), store<A>(v.dbias, load<A>(v.dbias) + dbias);
    this->store_tokens(v.u, p.du, chunk, channels);
    this->store_tokens(v.delta, p.ddelta, chunk, channels);
    if (in.z) this->store_tokens(v.gate, p.dz, chunk, channels);
  }

  Plane checkpoint(const Chunk& chunk, int64_t d) const {
    const int64_t index = chunk.run->b * num_chunks(in.sequences) + chunk.tau / kChunk;
    return plane(const_cast<void*>(p.checkpoints), in.accumulator, index * of_token * in.channels + d, 1, in.channels);
  }

  // Where the sums of a block of channels lie for states n ... n + states - 1 and the tokens of a chunk.
  struct Partials {
    A* data;
    int64_t tokens;
  };
  Partials partials_of(A* partials, const Chunk& chunk, int64_t block, int64_t n, int64_t states) const {
    const int64_t row = (block * in.sequences.batch + chunk.run->b) * this->L * of_token;
    return {partials + row + (n * this->L + chunk.tau * states) * F::kParts, chunk.count};
  }

  // vectors: (tokens, kStates, parts, kLanes)
  template <int kStates>
  void store_sum_over_lanes(const A* vectors, const Partials& to) const {
    const int64_t count = to.tokens * kStates * F::kParts;
    for (int64_t i = 0; i < count; i += kLanes<A>) {
      const int n = static_cast<int>(at_most(kLanes<A>, count - i));
      Vec<A> rows[kLanes<A>];
      for (int j = 0; j < kLanes<A>; ++j) rows[j] = j < n ? load<A>(vectors + (i + j) * kLanes<A>) : Vec<A>{};
      store<A>(to.data + i, sums_of_lanes<A>(rows), n);
    }
  }

  // [dB] [dC] Adds the sums of the blocks of each group.
  void reduce_tokens(const Projection& of, const Projection& grad, const A* partials) const {
    if (of.constant()) return;
    const int64_t blocks_of_group = blocks / of.groups, chunks = num_chunks(in.sequences);
    parallel_for(0, in.sequences.batch * of.groups * chunks, 16, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t tau = item % chunks * kChunk, g = item / chunks % of.groups, b = item / chunks / of.groups;
        const int64_t count = at_most(kChunk, this->L - tau);
        for_each_state_block(in.states, [&]<int kStates>(int64_t n) {
          constexpr int kReals = kStates * F::kParts;  // of a token
          A sum[kChunk * kReals] = {};
          const int64_t row = (n * this->L + tau * kStates) * F::kParts;
          for (int64_t block = g * blocks_of_group; block < (g + 1) * blocks_of_group; ++block)
            for (int64_t i = 0; i < count * kReals; ++i)
              sum[i] += partials[(block * in.sequences.batch + b) * this->L * of_token + row + i];
          visit_dtype(grad.dtype, [&]<class T>() {
            T* const out = static_cast<T*>(grad.data) + b * grad.b + g * grad.g + n * grad.n;
            for (int64_t i = 0; i < count * kReals; ++i)
              out[i % kReals / F::kParts * grad.n + this->token(tau + i / kReals) * grad.l + i % F::kParts * grad.im] =
                  narrow<T>(sum[i]);
          });
        });
      }
    });
  }

  // Sums of a vector of channels, rows of (slabs, sums, D): dA, constant dB and dC, dD, ddelta_bias.
  void store_sums(int64_t slab, const Vector& v) const {
    int64_t row = slab * sums_of_channel(in);
    const auto put = [&](const A* sums, int64_t count) {
      if (sums)
        store_tile<A>(sums,
                      plane(channel_partials, in.accumulator, row * in.channels + v.channels.first, 1, in.channels),
                      v.channels.lanes, count);
      row += sums ? count : 0;
    };
    put(v.dA, of_token), put(v.dB, of_token), put(v.dC, of_token), put(v.dD, 1), put(v.dbias, 1);
  }

  // [dA] and the others: adds the slabs.
  void reduce_channels() const {
    const int64_t sums = sums_of_channel(in), vectors = (in.channels + kLanes<A> - 1) / kLanes<A>;
    parallel_for(0, vectors, 64, [&](int64_t begin, int64_t end) {
      Scratch scratch(2 * Scratch::bytes_of<A>(sums * kLanes<A>));
      A* const sum = scratch.take<A>(sums * kLanes<A>);
      A* const slab_sums = scratch.take<A>(sums * kLanes<A>);
      for (int64_t vector = begin; vector < end; ++vector) {
        const int64_t d = vector * kLanes<A>;
        const int lanes = static_cast<int>(at_most(kLanes<A>, in.channels - d));
        Channels<F>::clear(sum, sums * kLanes<A>);
        for (int64_t slab = 0; slab < slabs; ++slab) {
          load_tile<A>(plane(channel_partials, in.accumulator, slab * sums * in.channels + d, 1, in.channels), lanes,
                       sums, slab_sums);
          add(slab_sums, sums * kLanes<A>, sum);
        }
        const A* row = sum;
        const auto put = [&](void* data, DType dtype, int64_t count) {
          if (data) store_tile<A>(row, plane(data, dtype, d * count, count, 1), lanes, count);
          row += count * kLanes<A>;
        };
        put(p.dA.data, p.dA.dtype, of_token);
        if (in.B.constant()) put(p.dB.data, p.dB.dtype, of_token);
        if (in.C.constant()) put(p.dC.data, p.dC.dtype, of_token);
        put(p.dD.data, p.dD.dtype, 1);
        put(p.ddelta_bias.data, p.ddelta_bias.dtype, 1);
      }
    });
  }
};

}  // namespace
}  // namespace seqkern::selective_scan
