// What the operators of linear_attention are given: names of arguments as the caller knows them, and checks.
#pragma once
#include <string>

#include "common/token_tensors.h"
#include "linear_attention/params.h"

namespace seqkern::linear_attention {

using MaybeTensor = std::optional<Tensor>;

// The public function that a form belongs to has its own names for arguments and dimensions.
struct Names {
  const char *op, *step;
  const char *q, *k, *v, *decay, *gate;
  const char *heads, *value_heads, *keys, *size;
};
inline const Names& names_of(Form form) {
  static constexpr Names kAttention = {
      "linear_attention", "linear_attention_step", "q", "k", "v", "log_decay", "gate", "H", "HV", "K", "V"};
  static constexpr Names kSsd = {"ssd", "ssd_step", "C", "B", "x", "dt", "z", "G", "H", "N", "P"};
  static constexpr Names kMlstm = {"mlstm", "mlstm_step", "q", "k", "v", "f", "gate", "H", "HV", "K", "V"};
  return form == Form::kDelta ? kSsd : form == Form::kExp ? kMlstm : kAttention;
}

// Tensors other than q, k and v that a call may be given, as torch passes them.
struct Given {
  const MaybeTensor &decay, &input, &A, &bias, &bonus, &skip, &gate;
};
struct Options {
  int64_t form, normalizer;
  bool softplus;
  double low, high;
  bool read_previous, value_major;
  double scale, eps;
};

// Copies options into Inputs or StepParams, which name them alike.
template <class Params>
void set_options(Params& p, const Options& o) {
  p.normalizer = static_cast<Normalizer>(o.normalizer);
  p.read_previous = o.read_previous;
  p.scale = p.normalizer == Normalizer::kSum ? 1.0 : o.scale, p.eps = o.eps;
}

// Checks of parameters, whose shapes are the same for whole sequences and for a step.
struct Parameters {
  MaybeTensor A, bias, bonus, skip;

  Parameters() = default;
  template <class Params>
  Parameters(const Checker& check, const Names& names, const Given& given, const Tensor& v, const Params& p) {
    const Dim HV = {names.value_heads, p.value_heads}, H = {names.heads, p.heads};
    const auto parameter = [&](const char* name, const MaybeTensor& t, std::initializer_list<Dim> dims) {
      if (!t) return t;
      check.shape(name, *t, dims);
      check.floating(name, *t);
      check.device(name, *t, names.v, v);
      return as_contiguous(t);
    };
    A = parameter("A", given.A, {HV}), bias = parameter("dt_bias", given.bias, {HV});
    bonus = parameter("bonus", given.bonus, {H, {names.keys, p.keys}});
    const bool per_value = given.skip && given.skip->dim() == 2;
    skip = per_value ? parameter("D", given.skip, {HV, {names.size, p.size}}) : parameter("D", given.skip, {HV});
  }

  template <class Params>
  void set(const Checker& check, Params& p) const {
    p.bonus = array(check, "bonus", bonus), p.skip = array(check, "D", skip);
    const bool per_value = skip && skip->dim() == 2;
    p.skip_h = per_value ? p.size : 1, p.skip_v = per_value ? 1 : 0;
  }
};

inline void check_heads(const Checker& check, const Names& names, int64_t heads, int64_t value_heads) {
  check_value_heads(check, names.v, names.q, names.heads, heads, names.value_heads, value_heads);
}

// A state that is given to or by a call, contiguous.
struct States {
  MaybeTensor S, z, m;

  State state(const Checker& check) const { return {array(check, "S", S), array(check, "z", z), array(check, "m", m)}; }
  void append_to(std::vector<Tensor>& out) const {
    for (const MaybeTensor& t : {S, z, m})
      if (t) out.push_back(*t);
  }
};

// What forward and backward are both given, checked, and kept alive while kernels read it.
struct Call {
  const Names& names;
  Checker check;
  Inputs in{};
  Tensor q, k, v;
  MaybeTensor decay, input, gate;
  Parameters parameters;
  States initial_state;
  Packing packing;
  std::vector<Run> runs;

  Call(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Given& given, const States& state,
       const MaybeTensor& cu_seqlens, const MaybeTensor& seq_idx, const Options& options, bool reverse, bool split_time,
       Target target)
      : names(names_of(static_cast<Form>(options.form))), check(names.op) {
    check.shape(names.v, v_in, {{"B"}, {"L"}, {names.value_heads}, {names.size}});
    check.shape(names.q, q_in, {{"B", v_in.size(0)}, {"L", v_in.size(1)}, {names.heads}, {names.keys}});
    const int64_t B = v_in.size(0), L = v_in.size(1);
    in.heads = q_in.size(2), in.keys = q_in.size(3), in.value_heads = v_in.size(2), in.size = v_in.size(3);
    check_heads(check, names, in.heads, in.value_heads);
    in.accumulator = accumulator(check.floating(names.v, v_in));
    in.value_major = options.value_major, in.split_time = split_time;
    set_options(in, options);
    packing = Packing(check, names.v, v_in, B, L, cu_seqlens, seq_idx);
    in.sequences = packing.sequences(B, L, reverse);

    v = v_in;
    v = data(names.v, v_in, in.value_heads, in.size, in.v);
    q = data(names.q, q_in, in.heads, in.keys, in.q), k = data(names.k, k_in, in.heads, in.keys, in.k);
    for (const auto& [name, t] : {std::pair(names.q, &q), std::pair(names.k, &k)})
      check.same_dtype(name, *t, names.v, v);
    gates(given, options);
    parameters = Parameters(check, names, given, v, in);
    parameters.set(check, in);
    in.gates.A = array(check, "A", parameters.A), in.gates.bias = array(check, "dt_bias", parameters.bias);
    if (given.gate) gate = data(names.gate, *given.gate, in.value_heads, in.size, in.gate);
    initial_state = states("initial_state", state);
    in.initial_state = initial_state.state(check);
    if (target == Target::kCpu) {
      runs = host_runs(check, in.sequences);
      in.runs = runs.data(), in.num_runs = static_cast<int64_t>(runs.size());
    } else {
      packing.check_values(check, in.sequences);
    }
  }

  Dim batch() const { return {"B", in.sequences.batch}; }
  Dim length() const { return {"L", in.sequences.length}; }
  Dim value_heads() const { return {names.value_heads, in.value_heads}; }

  // (B, L, heads, size) with a contiguous last dimension, copied where it is not.
  Tensor data(const char* name, const Tensor& t, int64_t heads, int64_t size, Data& out) const {
    const bool is_value = heads == in.value_heads && size == in.size;
    check.shape(name, t,
                {batch(),
                 length(),
                 {is_value ? names.value_heads : names.heads, heads},
                 {is_value ? names.size : names.keys, size}});
    check.device(name, t, names.v, v);
    Tensor kept = t;
    out = token_rows(check, name, kept);
    return kept;
  }

  // One number per token and head; a decay may also be one per head only.
  Data numbers(const char* name, const Tensor& t, bool may_be_constant = false) const {
    const bool constant = may_be_constant && t.dim() == 1;
    if (constant)
      check.shape(name, t, {value_heads()});
    else
      check.shape(name, t, {batch(), length(), value_heads()});
    check.device(name, t, names.v, v);
    if (constant) return {t.data_ptr(), check.floating(name, t), 0, 0, t.stride(0)};
    return token_numbers(check, name, t);
  }

  void gates(const Given& given, const Options& options) {
    Gates& gates = in.gates;
    gates.form = static_cast<Form>(options.form);
    gates.softplus = options.softplus, gates.low = options.low, gates.high = options.high;
    if (gates.form == Form::kNone) return;
    decay = given.decay;
    if (gates.form == Form::kKey) {
      check.shape(names.decay, *decay, {batch(), length(), value_heads(), {names.keys, in.keys}});
      check.device(names.decay, *decay, names.v, v);
      gates.decay = token_rows(check, names.decay, *decay);
      return;
    }
    gates.decay = numbers(names.decay, *decay, gates.form == Form::kToken);
    if (gates.form == Form::kExp) input = given.input, gates.input = numbers("i", *input);
  }

  Dim rows() const { return {packing.cu_seqlens ? "num_sequences" : "B", in.sequences.count}; }

  States states(const char* name, const States& given) const {
    if (!given.S && !given.z && !given.m) return {};
    const bool normalized = in.normalizer != Normalizer::kNone, has_max = in.normalizer == Normalizer::kMax;
    if (!given.S || bool(given.z) != normalized || bool(given.m) != has_max)
      check.fail(name, " must be ",
                 has_max      ? "the tensors (C, n, m)"
                 : normalized ? "the tensors (S, z)"
                              : "a tensor",
                 ", or None");
    const Dim K = {names.keys, in.keys}, V = {names.size, in.size};
    const auto part = [&](const char* letter, const MaybeTensor& t, std::initializer_list<Dim> dims) -> MaybeTensor {
      if (!t) return t;
      const std::string full_name = !normalized ? name : std::string(name) + "'s " + letter;
      check.shape(full_name.c_str(), *t, dims);
      check.floating(full_name.c_str(), *t);
      check.device(full_name.c_str(), *t, names.v, v);
      return as_contiguous(t);
    };
    return {part(has_max ? "C" : "S", given.S, {rows(), value_heads(), in.value_major ? V : K, in.value_major ? K : V}),
            part(has_max ? "n" : "z", given.z, {rows(), value_heads(), K}),
            part("m", given.m, {rows(), value_heads()})};
  }

  // Uninitialised.
  States empty_state() const {
    const ScalarType type = scalar_type(in.accumulator);
    const int64_t N = in.sequences.count, HV = in.value_heads, K = in.keys, V = in.size;
    States out{empty(v, {N, HV, in.value_major ? V : K, in.value_major ? K : V}, type), {}, {}};
    if (in.normalizer != Normalizer::kNone) out.z = empty(v, {N, HV, K}, type);
    if (in.normalizer == Normalizer::kMax) out.m = empty(v, {N, HV}, type);
    return out;
  }

  // One accumulator per token and value head.
  Tensor numbers() const {
    return empty(v, {in.sequences.batch, in.sequences.length, in.value_heads}, scalar_type(in.accumulator));
  }
};

}  // namespace seqkern::linear_attention
