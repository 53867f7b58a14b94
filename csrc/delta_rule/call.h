// What forward and backward of delta_rule are given, checked.
#pragma once
#include "common/token_tensors.h"
#include "delta_rule/params.h"

namespace seqkern::delta_rule {

using MaybeTensor = std::optional<Tensor>;

// The form of a decay that has `of_token` dimensions where it is one number per token and head.
inline Decay form_of(const MaybeTensor& decay, int64_t of_token) {
  if (!decay) return Decay::kNone;
  return decay->dim() == of_token + 1 ? Decay::kKey : Decay::kToken;
}

inline void check_heads(const Checker& check, int64_t heads, int64_t value_heads) {
  check_value_heads(check, "v", "q", "H", heads, "HV", value_heads);
}

// The tensors are kept alive while kernels read them.
struct Call {
  Checker check{"delta_rule"};
  Inputs in{};
  Tensor q, k, v, beta;
  MaybeTensor erase, decay, initial_state;
  Packing packing;
  std::vector<Run> runs;

  Call(const Tensor& q_in, const Tensor& k_in, const MaybeTensor& erase_in, const Tensor& v_in, const Tensor& beta_in,
       const MaybeTensor& decay_in, const MaybeTensor& state, const MaybeTensor& cu_seqlens, bool normalize,
       double scale, bool reverse, bool split_time, Target target)
      : q(q_in), k(k_in), v(v_in), beta(beta_in), erase(erase_in), decay(decay_in) {
    check.shape("v", v, {{"B"}, {"L"}, {"HV"}, {"V"}});
    const int64_t B = v.size(0), L = v.size(1);
    check.shape("q", q, {{"B", B}, {"L", L}, {"H"}, {"K"}});
    in.heads = q.size(2), in.keys = q.size(3), in.value_heads = v.size(2), in.size = v.size(3);
    check_heads(check, in.heads, in.value_heads);
    in.accumulator = accumulator(check.floating("v", v));
    in.normalize = normalize, in.scale = scale, in.split_time = split_time;
    packing = Packing(check, "v", v, B, L, cu_seqlens, std::nullopt);
    in.sequences = packing.sequences(B, L, reverse);

    in.v = token_rows(check, "v", v);
    in.q = keys("q", q), in.k = keys("k", k);
    if (erase) in.erase = keys("erase_key", *erase);
    check.shape("beta", beta, {{"B", B}, {"L", L}, {"HV", in.value_heads}});
    check.device("beta", beta, "v", v);
    in.beta = token_numbers(check, "beta", beta);
    in.form = form_of(decay, 3);
    if (in.form == Decay::kToken) {
      check.shape("log_decay", *decay, {{"B", B}, {"L", L}, {"HV", in.value_heads}});
      check.device("log_decay", *decay, "v", v);
      in.decay = token_numbers(check, "log_decay", *decay);
    } else if (in.form == Decay::kKey) {
      check.shape("log_decay", *decay, {{"B", B}, {"L", L}, {"HV", in.value_heads}, {"K", in.keys}});
      check.device("log_decay", *decay, "v", v);
      in.decay = token_rows(check, "log_decay", *decay);
    }
    initial_state = checked_state("initial_state", state);
    in.initial_state = array(check, "initial_state", initial_state);
    if (target == Target::kCpu) {
      runs = host_runs(check, in.sequences);
      in.runs = runs.data(), in.num_runs = static_cast<int64_t>(runs.size());
    } else {
      packing.check_values(check, in.sequences);
    }
  }

  // (B, L, H, K) in the dtype of v.
  Data keys(const char* name, Tensor& t) const {
    check.shape(name, t, {{"B", v.size(0)}, {"L", v.size(1)}, {"H", in.heads}, {"K", in.keys}});
    check.device(name, t, "v", v);
    const Data data = token_rows(check, name, t);
    check.same_dtype(name, t, "v", v);
    return data;
  }
  // (B, L, HV, V)
  Data values(const char* name, Tensor& t) const {
    check.shape(name, t, {{"B", v.size(0)}, {"L", v.size(1)}, {"HV", in.value_heads}, {"V", in.size}});
    check.device(name, t, "v", v);
    return token_rows(check, name, t);
  }

  // (N, HV, K, V), contiguous.
  MaybeTensor checked_state(const char* name, const MaybeTensor& t) const {
    if (!t) return t;
    const Dim rows = {packing.cu_seqlens ? "num_sequences" : "B", in.sequences.count};
    check.shape(name, *t, {rows, {"HV", in.value_heads}, {"K", in.keys}, {"V", in.size}});
    check.floating(name, *t);
    check.device(name, *t, "v", v);
    return as_contiguous(t);
  }
};

}  // namespace seqkern::delta_rule
