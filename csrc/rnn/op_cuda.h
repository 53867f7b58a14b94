// The CUDA paths of rnn_fwd and rnn_bwd: fused kernels where a head fits a block, else a loop over tokens of products
// and pointwise kernels, as stepwise.h lays it out.
#pragma once
#include "rnn/op_call.h"
#include "rnn/stepwise.h"
#include "rnn/tile.h"

namespace seqkern::rnn {

// Products for every head by torch, or room for those of our own, whose sums have a fixed order.
class Products {
 public:
  explicit Products(const Call& call) : call_(call) {}

  // (H, rows, columns) of (H, G, P, Q) or (H, Q, P), in the dtype of operands.
  Tensor operand(const Tensor& weights) const {
    const int64_t columns = weights.size(weights.dim() - 1);
    const int64_t rows = weights.dim() == 4 ? weights.size(1) * weights.size(2) : weights.size(1);
    return torch::stable::view(torch::stable::to(weights, call_.x.scalar_type()), {call_.in.heads, rows, columns});
  }
  Tensor room(int64_t columns) const {
    return empty(call_.x, {call_.in.heads, call_.in.sequences.batch, columns}, call_.x.scalar_type());
  }
  Array array(const Tensor& t) const { return {t.data_ptr(), call_.in.x.dtype}; }

  // left (H, B, depth) by right (H, depth, columns), or room for it. `out` tells where it is, and the result keeps it
  // alive.
  Tensor of(const Tensor& left, const Tensor& right, Array& out) const {
    const bool own = call_.in.batch_invariant;
    const Tensor product = own ? empty(left, {left.size(0), left.size(1), right.size(2)}, call_.state_type())
                               : torch::stable::matmul(left, right);
    out = {product.data_ptr(), own ? call_.in.accumulator : call_.in.x.dtype};
    return product;
  }

 private:
  const Call& call_;
};

inline Tensor transposed(const Tensor& t) {
  return torch::stable::transpose(t, 1, 2);
}

inline Tensor stepwise_workspace(const Call& call) {
  return empty(call.x, {(cuda::stepwise_workspace_bytes(call.in) + 7) / 8}, ScalarType::Double);
}

inline void stepwise_fwd(const Call& call, FwdParams& p, Stream stream) {
  const Products products(call);
  const Tensor scratch = stepwise_workspace(call), operand = products.room(p.outputs),
               R = transposed(products.operand(call.weights.R));
  p.workspace = scratch.data_ptr();
  cuda::FwdWork work{.operand = products.array(operand)};
  Tensor m, proj;
  if (p.proj) {
    m = products.room(p.units), proj = transposed(products.operand(*call.weights.proj));
    work.m = products.array(m);
  }

  cuda::begin(p, work, stream);
  for (int64_t tau = 0; tau < p.sequences.length; ++tau) {
    const Tensor product = products.of(operand, R, work.product);
    if (p.batch_invariant) cuda::multiply(cuda::recur_product(p, work), stream);
    cuda::forward_step(p, work, tau, stream);
    if (!p.proj) continue;
    const Tensor projected = products.of(m, proj, work.projected);
    if (p.batch_invariant) cuda::multiply(cuda::project_product(p, work), stream);
    cuda::project_step(p, work, tau, stream);
  }
}

inline void stepwise_bwd(const Call& call, BwdParams& p, Stream stream) {
  const Products products(call);
  const Tensor scratch = stepwise_workspace(call), du = products.room(p.sizes().gates * p.units),
               R = products.operand(call.weights.R);
  p.workspace = scratch.data_ptr();
  cuda::BwdWork work{.du = products.array(du)};
  Tensor dh, proj;
  if (p.proj) {
    dh = products.room(p.outputs), proj = products.operand(*call.weights.proj);
    work.dh = products.array(dh);
  }

  cuda::begin(p, work, stream);
  Tensor dm, returned;  // kept until the kernels that read them are on their way
  for (int64_t tau = p.sequences.length - 1; tau >= 0; --tau) {
    if (p.proj) {
      cuda::return_step(p, work, tau, stream);
      dm = products.of(dh, proj, work.dm);
      if (p.batch_invariant) cuda::multiply(cuda::unproject_product(p, work), stream);
    }
    cuda::backward_step(p, work, tau, stream);
    returned = products.of(du, R, work.returned);
    if (p.batch_invariant) cuda::multiply(cuda::return_product(p, work), stream);
  }
  cuda::return_step(p, work, -1, stream);
}

inline void cuda_fwd(const Call& call, FwdParams& p) {
  const DeviceScope scope(call.x);
  if (cuda::plan_fwd(p).path == cuda::Path::kFused)
    cuda::fused_fwd(p, scope.stream);
  else
    stepwise_fwd(call, p, scope.stream);
}

inline void cuda_bwd(const Call& call, BwdParams& p) {
  const DeviceScope scope(call.x);
  if (cuda::plan_bwd(p).path == cuda::Path::kFused)
    cuda::fused_bwd(p, scope.stream);
  else
    stepwise_bwd(call, p, scope.stream);
}

inline void sum_on_cuda(const Tensor& beside, const SumParams& p) {
  launch_beside(beside, cuda::sum, p);
}

}  // namespace seqkern::rnn
