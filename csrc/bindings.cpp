// The module seqkern._C: what was built, and what a shape would run. Operators are not here: they need no Python.
#include <pybind11/pybind11.h>

#include <map>
#include <stdexcept>
#include <string>

#include "causal_conv1d/tile.h"
#include "common/isa.h"
#include "delta_rule/tile.h"
#include "delta_rule/tile_bwd.h"
#include "delta_rule/tile_step.h"
#include "elementwise_rnn/tile.h"
#include "elementwise_rnn/tile_bwd.h"
#include "elementwise_rnn/tile_step.h"
#include "linear_attention/tile.h"
#include "linear_attention/tile_bwd.h"
#include "linear_attention/tile_step.h"
#include "linear_scan/tile.h"
#include "rnn/tile.h"
#include "rnn/tile_bwd.h"
#include "selective_scan/tile.h"
#include "softmax_scan/tile.h"

namespace py = pybind11;

namespace {

using namespace seqkern;

py::dict build_info() {
  py::dict info;
#if defined(SEQKERN_WITH_CUDA)
  info["cuda"] = SEQKERN_CUDA_VERSION;
#else
  info["cuda"] = py::none();
#endif
  info["archs"] = py::str(SEQKERN_ARCHS).attr("split")();
  info["compiler"] = __VERSION__;
  info["torch"] = SEQKERN_TORCH_VERSION;
  return info;
}

py::list available_isas() {
  py::list names;
  for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) names.append(isa_name(static_cast<Isa>(isa)));
  return names;
}

DType dtype_of(const std::string& name) {
  static const std::map<std::string, DType> kDTypes = {
      {"fp32", DType::kFloat32}, {"bf16", DType::kBFloat16}, {"fp16", DType::kFloat16}, {"fp64", DType::kFloat64}};
  const auto found = kDTypes.find(name);
  if (found == kDTypes.end()) throw std::invalid_argument("dtype must be fp32, bf16, fp16 or fp64, got " + name);
  return found->second;
}

// A plan asks of a pointer only whether it is there and how it is aligned.
void* const kPresent = reinterpret_cast<void*>(256);

py::dict as_dict(const causal_conv1d::cuda::Plan& plan) {
  py::dict d;
  d["kernel"] = plan.kernel;
  d["because"] = plan.why;
  d["blocks"] = plan.cut.token_blocks + plan.cut.state_blocks;
  d["threads per block"] = plan.tile.threads;
  d["blocks per SM"] = plan.tile.blocks_per_sm;
  d["shared memory bytes"] = plan.smem_bytes;
  d["launches"] = plan.launches;
  d["workspace bytes"] = plan.workspace_bytes;
  d["bytes moved"] = plan.bytes;
  return d;
}

py::dict plan_causal_conv1d(int64_t batch, int64_t channels, int64_t length, int64_t width, const std::string& dtype,
                            int64_t dilation, bool silu, bool bias, bool states, bool channels_last) {
  namespace conv = causal_conv1d;
  const DType type = dtype_of(dtype);
  const Strides stride =
      channels_last ? Strides{length * channels, 1, channels} : Strides{channels * length, length, 1};
  const auto array = [&](bool present, DType element) { return Array{present ? kPresent : nullptr, element}; };

  conv::Inputs in{};
  in.sequences.batch = in.sequences.count = batch;
  in.sequences.length = length;
  in.channels = channels, in.width = width, in.dilation = dilation, in.silu = silu, in.dtype = type;
  in.x = kPresent, in.x_stride = stride;
  in.weight = array(true, type), in.bias = array(bias, type), in.initial_state = array(states, accumulator(type));

  conv::FwdParams fwd{in};
  fwd.y = kPresent, fwd.y_stride = stride, fwd.final_state = array(states, accumulator(type));

  conv::BwdParams bwd{in};
  bwd.dy = kPresent, bwd.dy_stride = stride, bwd.dx = kPresent, bwd.dx_stride = stride;
  bwd.dfinal_state = bwd.dinitial_state = array(states, accumulator(type));

  conv::StepParams step{};
  step.batch = step.rows = batch, step.channels = channels, step.tokens = 1;
  step.width = width, step.dilation = dilation, step.state_size = in.state_size(), step.silu = silu, step.dtype = type;
  step.weight = in.weight, step.bias = in.bias, step.conv_state = array(true, accumulator(type));

  py::dict plans;
  plans["forward"] = as_dict(conv::cuda::plan_fwd(fwd));
  plans["backward"] = as_dict(conv::cuda::plan_bwd(bwd));
  plans["step"] = as_dict(conv::cuda::plan_step(step));
  return plans;
}

py::dict facts(const char* why, int64_t blocks, int threads, int blocks_per_sm, int64_t workspace_bytes,
               int64_t bytes) {
  py::dict d;
  d["because"] = why;
  d["blocks"] = blocks;
  d["threads per block"] = threads;
  d["blocks per SM"] = blocks_per_sm;
  d["workspace bytes"] = workspace_bytes;
  d["bytes moved"] = bytes;
  return d;
}

py::dict plan_selective_scan(int64_t batch, int64_t channels, int64_t length, int64_t states, const std::string& dtype,
                             int64_t groups, bool complex, bool gate, bool constant, bool two_exp, bool split_time,
                             bool checkpoints, bool channels_last) {
  namespace scan = selective_scan;
  const DType type = dtype_of(dtype), sums = accumulator(type);
  const Strides stride =
      channels_last ? Strides{length * channels, 1, channels} : Strides{channels * length, length, 1};
  const Data tokens{kPresent, type, stride};
  if (groups < 1 || channels % groups != 0) throw std::invalid_argument("groups must divide channels");

  scan::Inputs in{};
  in.sequences.batch = in.sequences.count = batch;
  in.sequences.length = length;
  in.channels = channels, in.states = states, in.complex = complex, in.two_exp = two_exp, in.softplus = true;
  in.accumulator = sums, in.split_time = split_time;
  in.u = in.delta = tokens;
  if (gate) in.z = tokens;
  in.A = in.D = in.delta_bias = {kPresent, sums};
  in.B.data = in.C.data = kPresent, in.B.dtype = in.C.dtype = type;
  in.B.groups = in.C.groups = constant ? 0 : groups;

  scan::FwdParams fwd{in, tokens};
  if (checkpoints) fwd.checkpoints = kPresent;
  scan::BwdParams bwd{in, tokens};
  bwd.du = bwd.ddelta = tokens;
  if (gate) bwd.dz = tokens;

  scan::StepParams step{};
  step.batch = step.rows = batch, step.heads = channels, step.size = 1, step.states = states;
  step.complex = complex, step.accumulator = sums;
  step.u.data = step.delta.data = step.y.data = step.D.data = step.delta_bias.data = kPresent;
  step.u.dtype = step.delta.dtype = step.y.dtype = step.z.dtype = type, step.D.dtype = step.delta_bias.dtype = sums;
  if (gate) step.z.data = kPresent;
  step.A.dtype = step.state.dtype = sums, step.B.dtype = step.C.dtype = type;
  step.B.heads_per_group = step.C.heads_per_group = channels / groups;

  py::dict plans;
  {
    const scan::cuda::FwdPlan plan = scan::cuda::plan_fwd(fwd);
    py::dict d = facts(scan::cuda::why(plan.kind), plan.blocks, 32 * plan.cut.warps, plan.tile.blocks_per_sm,
                       plan.workspace_bytes, scan::cuda::fwd_bytes(fwd));
    d["segments of a row"] = plan.cut.segments;
    d["shared memory bytes"] = plan.smem_bytes;
    d["launches"] = plan.cut.segments > 1 ? 3 : 1;
    plans["forward"] = d;
  }
  {
    const scan::cuda::BwdPlan plan = scan::cuda::plan_bwd(bwd);
    py::dict d = facts(scan::cuda::why(plan.kind), plan.blocks, 32 * plan.cut.warps * plan.tile.sharing,
                       plan.tile.blocks_per_sm, scan::cuda::bwd_workspace_bytes(bwd), scan::cuda::bwd_bytes(bwd));
    d["segments of a row"] = plan.cut.segments;
    plans["backward"] = d;
  }
  {
    const scan::cuda::StepPlan plan = scan::cuda::plan_step(step);
    plans["step"] = facts("a few threads own one channel of one batch row", plan.blocks, plan.tile.threads,
                          plan.tile.blocks_per_sm, 0, scan::cuda::step_bytes(step));
  }
  return plans;
}

// Of linear_scan or softmax_scan, over whole sequences.
template <typename Plan>
py::dict as_dict(const Plan& plan) {
  const time_scan::Cut& cut = plan.cut;
  const bool serial = cut.path == time_scan::Path::kSerial;
  py::dict d = facts(cut.why, cut.blocks, cut.threads, serial ? plan.tile.serial_blocks : plan.tile.tile_blocks,
                     plan.workspace_bytes, plan.bytes);
  d["path"] = time_scan::name(cut.path);
  d["tiles of a row"] = cut.tiles;
  d["shared memory bytes"] = plan.smem_bytes;
  d["launches"] = plan.launches;
  return d;
}

py::dict plan_linear_scan(int64_t batch, int64_t length, int64_t channels, const std::string& dtype,
                          bool constant_over_batch, bool constant_over_time, bool constant_over_channels, bool complex,
                          bool log_space, bool reset, bool states, bool split_time) {
  namespace scan = linear_scan;
  const DType type = dtype_of(dtype), sums = accumulator(type);
  const Data tokens{kPresent, type, {.b = length * channels, .d = 1, .l = channels}};
  const int64_t decay_rows = constant_over_time ? 1 : length, decay_channels = constant_over_channels ? 1 : channels;
  const Strides decay{.b = constant_over_batch ? 0 : decay_rows * decay_channels,
                      .d = constant_over_channels ? 0 : 1,
                      .l = constant_over_time ? 0 : decay_channels};
  const Array state{states ? kPresent : nullptr, sums};

  scan::Inputs in{};
  in.sequences.batch = in.sequences.count = batch;
  in.sequences.length = length;
  in.channels = channels, in.complex = complex, in.log_space = log_space;
  in.accumulator = sums, in.split_time = split_time;
  in.a = {kPresent, type, decay}, in.initial_state = state;
  if (reset) in.reset = static_cast<const bool*>(kPresent);

  const scan::FwdParams fwd{in, tokens, tokens, state};
  const scan::BwdParams bwd{in, tokens, tokens, state, tokens, in.a, state};
  scan::StepParams step{};
  step.batch = step.rows = batch, step.channels = channels, step.complex = complex, step.log_space = log_space;
  step.accumulator = step.state.dtype = sums, step.a.dtype = step.b.dtype = step.h.dtype = type;
  step.a.b = constant_over_batch ? 0 : decay_channels, step.a.d = decay.d;

  py::dict plans;
  plans["forward"] = as_dict(scan::cuda::plan_fwd(fwd));
  plans["backward"] = as_dict(scan::cuda::plan_bwd(bwd));
  const scan::cuda::StepPlan plan = scan::cuda::plan_step(step);
  plans["step"] = facts("a thread owns one channel of one batch row", plan.blocks, plan.tile.threads,
                        plan.tile.blocks_per_sm, 0, scan::cuda::step_bytes(step));
  return plans;
}

py::dict plan_elementwise_rnn(int64_t batch, int64_t length, int64_t channels, const std::string& dtype,
                              const std::string& cell, const std::string& solver, int64_t max_sweeps, bool reset,
                              bool states, bool split_time, bool checkpoints) {
  namespace rnn = elementwise_rnn;
  static const std::map<std::string, rnn::Solver> kSolvers = {{"auto", rnn::Solver::kAutomatic},
                                                              {"serial", rnn::Solver::kSerial},
                                                              {"newton", rnn::Solver::kNewton},
                                                              {"shooting", rnn::Solver::kShooting}};
  rnn::Inputs in{};
  int64_t number = 0;
  while (number < rnn::kCells && cell != rnn::sizes_of(static_cast<rnn::Cell>(number)).name) ++number;
  if (number == rnn::kCells) throw std::invalid_argument("cell must be gru, lstm, slstm, indrnn or elman, got " + cell);
  const auto found = kSolvers.find(solver);
  if (found == kSolvers.end())
    throw std::invalid_argument("solver must be auto, serial, newton or shooting, got " + solver);

  in.cell = static_cast<rnn::Cell>(number);
  const rnn::CellSizes sizes = in.sizes();
  const DType type = dtype_of(dtype), sums = accumulator(type);
  const Data tokens{kPresent, type, {.b = length * channels, .d = 1, .l = channels}};
  const rnn::GateData gates{kPresent, type, sizes.gates * length * channels, sizes.gates * channels, channels};
  const Array state{states ? kPresent : nullptr, sums}, kept{checkpoints ? kPresent : nullptr, sums};
  in.sequences.batch = in.sequences.count = batch;
  in.sequences.length = length;
  in.channels = channels, in.accumulator = sums, in.split_time = split_time;
  in.x = gates, in.weights = {kPresent, sums}, in.initial_state = state;
  if (reset) in.reset = static_cast<const bool*>(kPresent);

  rnn::FwdParams fwd{in};
  fwd.solver = found->second, fwd.max_sweeps = max_sweeps;
  fwd.h = tokens, fwd.final_state = state, fwd.checkpoints = kept;
  rnn::BwdParams bwd{in};
  bwd.dh = tokens, bwd.dfinal_state = bwd.dinitial_state = state, bwd.checkpoints = {kPresent, sums};
  bwd.dx = gates, bwd.dweights = in.weights;
  rnn::StepParams step{};
  step.batch = step.rows = batch, step.channels = channels, step.cell = in.cell, step.accumulator = sums;
  step.x.dtype = step.h.dtype = type, step.weights = in.weights;
  for (int i = 0; i < sizes.published; ++i) step.state[i].dtype = sums;

  py::dict plans;
  const rnn::cuda::FwdPlan plan = rnn::cuda::plan_fwd(fwd);
  const rnn::cuda::Tile& tile = plan.tile;
  const bool serial = plan.solver == rnn::Solver::kSerial, newton = plan.solver == rnn::Solver::kNewton;
  py::dict forward = facts(plan.why, plan.cut.blocks, plan.cut.threads,
                           serial   ? tile.serial_blocks
                           : newton ? tile.newton_blocks
                                    : tile.sweep_blocks,
                           plan.workspace_bytes, plan.bytes);
  forward["solver"] = serial ? "serial" : newton ? "newton" : "shooting";
  forward["chunks of a row"] = plan.chunks;
  forward["sweeps at most"] = plan.sweeps;
  forward["shared memory bytes"] = plan.smem_bytes;
  forward["launches"] = plan.launches;
  plans["forward"] = forward;
  plans["backward"] = as_dict(rnn::cuda::plan_bwd(bwd));
  const rnn::cuda::StepPlan one = rnn::cuda::plan_step(step);
  plans["step"] = facts("a thread owns one channel of one batch row", one.blocks, one.tile.threads,
                        one.tile.blocks_per_sm, 0, rnn::cuda::step_bytes(step));
  return plans;
}

py::dict plan_rnn(int64_t batch, int64_t length, int64_t heads, int64_t size, const std::string& dtype,
                  const std::string& cell, int64_t outputs, int64_t shared_bytes, int64_t multiprocessors) {
  int64_t number = 0;
  while (number < rnn::kCells && cell != rnn::sizes_of(static_cast<rnn::Cell>(number)).name) ++number;
  if (number == rnn::kCells)
    throw std::invalid_argument("cell must be lstm, gru, slstm, elman_tanh or elman_relu, got " + cell);
  rnn::Inputs in{};
  in.cell = static_cast<rnn::Cell>(number);
  const rnn::CellSizes sizes = in.sizes();
  in.sequences.batch = in.sequences.count = batch, in.sequences.length = length;
  in.heads = heads, in.units = size, in.outputs = outputs > 0 ? outputs : size;
  in.x.dtype = dtype_of(dtype), in.accumulator = accumulator(in.x.dtype);
  if (outputs > 0) in.proj = {kPresent, in.x.dtype};

  const int64_t element = size_of(in.x.dtype), sums = size_of(in.accumulator), tokens = batch * length * heads;
  const int64_t weights = heads * in.outputs * size * (sizes.gates + (outputs > 0 ? 1 : 0)) * element;
  const int64_t forward_bytes = tokens * (sizes.gates * size + in.outputs) * element + weights;
  const int64_t kept = tokens * size * (sizes.gates * element + sizes.carried * sums);
  const int64_t gradients = tokens * (sizes.gates * size + 2 * in.outputs) * element + weights;
  const auto as_dict = [&](const rnn::cuda::Plan& plan, int64_t bytes) {
    const bool fused = plan.path == rnn::cuda::Path::kFused;
    py::dict d;
    d["path"] = fused ? "fused" : "stepwise";
    d["because"] = plan.why;
    if (fused) {
      d["blocks"] = plan.blocks;
      d["waves"] = plan.waves;
      d["warps per block"] = plan.fused.warps;
      d["R in registers, %"] = plan.held_percent;
      d["shared memory bytes"] = plan.smem_bytes;
      d["tokens on their way"] = plan.fused.ahead;
    }
    d["launches"] = fused ? 1 : length * (outputs > 0 ? 4 : 2) + 1;
    d["bytes moved"] = bytes;
    return d;
  };
  const Limits limits = {shared_bytes, multiprocessors};
  py::dict plans;
  plans["forward"] = as_dict(rnn::cuda::plan_fwd(in, limits), forward_bytes);
  plans["backward"] = as_dict(rnn::cuda::plan_bwd(in, limits), forward_bytes + kept + gradients);
  py::dict step;
  step["because"] = "a product for every head, then its cells";
  step["launches"] = outputs > 0 ? 4 : 2;
  const int64_t state = in.outputs + (sizes.published - 1) * size;
  step["bytes moved"] = batch * heads * ((sizes.gates * size + in.outputs) * element + 2 * state * sums) + weights;
  plans["step"] = step;
  return plans;
}

py::dict plan_softmax_scan(int64_t batch, int64_t length, int64_t heads, int64_t size, const std::string& dtype,
                           bool states, bool split_time, bool normalizers) {
  namespace scan = softmax_scan;
  const DType type = dtype_of(dtype), sums = accumulator(type);
  const scan::Data scores{kPresent, type, length * heads, heads, 1};
  const scan::Data values{kPresent, type, length * heads * size, heads * size, size};
  const Array part{states ? kPresent : nullptr, sums};
  const scan::State state{part, part, part};

  scan::Inputs in{};
  in.sequences.batch = in.sequences.count = batch;
  in.sequences.length = length;
  in.heads = heads, in.size = size, in.accumulator = sums, in.split_time = split_time;
  in.s = scores, in.v = values, in.initial_state = state;

  const scan::FwdParams fwd{in, values, state, normalizers ? kPresent : nullptr};
  const scan::BwdParams bwd{in, values, values, kPresent, state, scores, values, state};
  scan::StepParams step{};
  step.batch = step.rows = batch, step.heads = heads, step.size = size, step.accumulator = sums;
  step.m.dtype = step.n.dtype = step.w.dtype = sums, step.s.dtype = step.v.dtype = step.o.dtype = type;

  py::dict plans;
  plans["forward"] = as_dict(scan::cuda::plan_fwd(fwd));
  plans["backward"] = as_dict(scan::cuda::plan_bwd(bwd));
  const scan::cuda::StepPlan plan = scan::cuda::plan_step(step);
  plans["step"] = facts("a few threads own one head of one batch row", plan.blocks, plan.tile.threads,
                        plan.tile.blocks_per_sm, 0, scan::cuda::step_bytes(step));
  return plans;
}

template <typename Tile>
std::string text_of(const Tile& tile) {
  const char* operands[] = {"fp32 (tf32)", "bf16", "fp16", "fp64"};
  return std::to_string(tile.tokens) + " tokens, " + std::to_string(tile.keys) + " keys, " +
         std::to_string(tile.values) + " values, products of " + operands[static_cast<int>(tile.operand)];
}

py::dict plan_linear_attention(int64_t batch, int64_t length, int64_t heads, int64_t keys, int64_t size,
                               const std::string& dtype, int64_t value_heads, const std::string& decay, bool normalize,
                               bool read_previous, bool bonus, bool skip, bool gate, bool states, bool value_major,
                               bool split_time, bool backward) {
  namespace attention = linear_attention;
  using attention::Form, attention::Normalizer;
  static const std::map<std::string, Form> kForms = {{"none", Form::kNone},   {"head", Form::kToken},
                                                     {"token", Form::kToken}, {"key", Form::kKey},
                                                     {"delta", Form::kDelta}, {"exp", Form::kExp}};
  const auto form = kForms.find(decay);
  if (form == kForms.end())
    throw std::invalid_argument("decay must be none, head, token, key, delta or exp, got " + decay);
  if (value_heads == 0) value_heads = heads;
  if (heads < 1 || value_heads % heads != 0) throw std::invalid_argument("heads must divide value_heads");
  const DType type = dtype_of(dtype), sums = accumulator(type);
  const auto tokens = [&](int64_t count, int64_t width, bool present = true) -> attention::Data {
    return {present ? kPresent : nullptr, type, length * count * width, count * width, width};
  };
  const auto array = [&](bool present, DType element) { return Array{present ? kPresent : nullptr, element}; };

  attention::Inputs in{};
  in.sequences.batch = in.sequences.count = batch, in.sequences.length = length;
  in.heads = heads, in.value_heads = value_heads, in.keys = keys, in.size = size;
  in.accumulator = sums, in.split_time = split_time, in.value_major = value_major, in.read_previous = read_previous;
  in.q = in.k = tokens(heads, keys), in.v = tokens(value_heads, size), in.gate = tokens(value_heads, size, gate);
  in.gates.form = form->second;
  const bool exponential = in.gates.form == Form::kExp, delta = in.gates.form == Form::kDelta;
  in.normalizer = exponential ? Normalizer::kMax : normalize ? Normalizer::kSum : Normalizer::kNone;
  const bool normalized = in.normalizer != Normalizer::kNone;
  in.gates.decay = tokens(value_heads, in.gates.form == Form::kKey ? keys : 1, in.gates.form != Form::kNone);
  if (decay == "head") in.gates.decay.b = in.gates.decay.l = 0;
  in.gates.input = tokens(value_heads, 1, exponential), in.gates.A = array(delta, sums);
  in.bonus = array(bonus, sums), in.skip = array(skip, sums), in.skip_h = 1;
  const attention::State state{array(states, sums), array(states && normalized, sums),
                               array(states && exponential, sums)};
  in.initial_state = state;

  attention::FwdParams fwd{in};
  fwd.y = in.v, fwd.final_state = state;
  if (backward) {
    fwd.o = tokens(value_heads, size, gate || (skip && normalized));
    fwd.denominators = normalized ? kPresent : nullptr, fwd.maxima = exponential ? kPresent : nullptr;
  }
  attention::BwdParams bwd{};
  static_cast<attention::Inputs&>(bwd) = in;
  bwd.dy = bwd.dv = in.v, bwd.dq = in.q, bwd.dk = in.k, bwd.dgate = in.gate,
  bwd.o = tokens(value_heads, size, gate || normalized);
  bwd.denominators = normalized ? kPresent : nullptr, bwd.maxima = exponential ? kPresent : nullptr;
  bwd.ddecay = in.gates.decay, bwd.dinput = in.gates.input, bwd.dA = in.gates.A, bwd.dbonus = in.bonus,
  bwd.dskip = in.skip;
  bwd.dfinal_state = bwd.dinitial_state = state;

  attention::StepParams step{};
  step.batch = step.rows = batch, step.heads = heads, step.value_heads = value_heads, step.keys = keys,
  step.size = size;
  step.accumulator = sums, step.form = in.gates.form, step.normalizer = in.normalizer;
  step.A = in.gates.A, step.bonus = in.bonus, step.skip = in.skip, step.skip_h = 1;
  const auto rows = [](const attention::Data& x) -> attention::StepParams::Rows {
    return {x.data, x.dtype, x.l, x.h, 1};
  };
  step.q = rows(in.q), step.k = rows(in.k), step.v = step.y = rows(in.v), step.gate = rows(in.gate);
  step.decay = rows(in.gates.decay), step.input = rows(in.gates.input);
  step.S = {{kPresent, sums, value_heads * keys * size, keys * size, value_major ? 1 : size}, value_major ? keys : 1};
  if (normalized) step.z = {kPresent, sums, value_heads * keys, keys, 1};
  if (exponential) step.m = {kPresent, sums, value_heads, 1, 0};

  const auto why = [](int64_t segments) {
    return segments > 1 ? "few rows, heads and values: time is cut into segments"
                        : "a block walks through a row, for a head and a tile of its values";
  };
  py::dict plans;
  {
    const attention::cuda::FwdPlan plan = attention::cuda::plan_fwd(fwd);
    py::dict d = facts(why(plan.segments), plan.blocks * plan.segments, attention::cuda::kFwdThreads,
                       plan.tile.blocks_per_sm, plan.workspace_bytes, plan.bytes);
    d["chunk"] = text_of(plan.tile);
    d["segments of a row"] = plan.segments;
    d["shared memory bytes"] = plan.smem_bytes;
    d["launches"] = plan.launches;
    plans["forward"] = d;
  }
  {
    const attention::cuda::BwdPlan plan = attention::cuda::plan_bwd(bwd);
    py::dict d = facts(why(plan.segments), plan.blocks, attention::cuda::kBwdThreads, plan.tile.blocks_per_sm,
                       plan.workspace.bytes, attention::cuda::bwd_bytes(bwd));
    d["chunk"] = text_of(plan.tile);
    d["segments of a row"] = plan.segments;
    d["shared memory bytes"] = plan.smem_bytes;
    d["launches"] = plan.launches;
    plans["backward"] = d;
  }
  {
    const attention::cuda::StepPlan plan = attention::cuda::plan_step(step);
    plans["step"] =
        facts(normalized ? "a block owns a head and its normalizer" : "a block owns a tile of the values of a head",
              plan.blocks, plan.cut.threads, plan.blocks_per_sm, 0, attention::cuda::step_bytes(step));
  }
  return plans;
}

py::dict plan_delta_rule(int64_t batch, int64_t length, int64_t heads, int64_t keys, int64_t size,
                         const std::string& dtype, int64_t value_heads, const std::string& decay, bool erase_key,
                         bool states, bool split_time, bool backward) {
  namespace delta = delta_rule;
  using delta::Decay;
  static const std::map<std::string, Decay> kForms = {
      {"none", Decay::kNone}, {"token", Decay::kToken}, {"key", Decay::kKey}};
  const auto form = kForms.find(decay);
  if (form == kForms.end()) throw std::invalid_argument("decay must be none, token or key, got " + decay);
  if (value_heads == 0) value_heads = heads;
  if (heads < 1 || value_heads % heads != 0) throw std::invalid_argument("heads must divide value_heads");
  const DType type = dtype_of(dtype), sums = accumulator(type);
  const auto tokens = [&](int64_t count, int64_t width, bool present = true) -> TokenData {
    return {present ? kPresent : nullptr, type, length * count * width, count * width, width};
  };
  const Array state{states ? kPresent : nullptr, sums};

  delta::Inputs in{};
  in.sequences.batch = in.sequences.count = batch, in.sequences.length = length;
  in.heads = heads, in.value_heads = value_heads, in.keys = keys, in.size = size;
  in.accumulator = sums, in.split_time = split_time, in.form = form->second, in.initial_state = state;
  in.q = in.k = tokens(heads, keys), in.erase = tokens(heads, keys, erase_key), in.v = tokens(value_heads, size);
  in.beta = tokens(value_heads, 1);
  in.decay = tokens(value_heads, in.form == Decay::kKey ? keys : 1, in.form != Decay::kNone);

  delta::FwdParams fwd{in};
  fwd.o = in.v, fwd.final_state = state;
  if (backward) fwd.u = in.v, fwd.u.dtype = operand_of(type);
  delta::BwdParams bwd{};
  static_cast<delta::Inputs&>(bwd) = in;
  bwd.u = in.v, bwd.u.dtype = operand_of(type), bwd.dO = bwd.dv = in.v, bwd.dq = in.q, bwd.dk = in.k;
  bwd.derase = in.erase, bwd.dbeta = in.beta, bwd.ddecay = in.decay, bwd.dfinal_state = bwd.dinitial_state = state;

  delta::StepParams step{};
  step.batch = step.rows = batch, step.heads = heads, step.value_heads = value_heads, step.keys = keys;
  step.size = size, step.accumulator = sums, step.form = in.form;
  const auto rows = [](const TokenData& x) -> delta::StepParams::Rows { return {x.data, x.dtype, x.l, x.h, 1}; };
  step.q = rows(in.q), step.k = rows(in.k), step.erase = rows(in.erase), step.v = step.o = rows(in.v);
  step.beta = rows(in.beta), step.decay = rows(in.decay);
  step.S = {kPresent, sums, value_heads * keys * size, keys * size, size}, step.S_v = 1;

  const auto walk = [](const auto& plan, const char* why, int64_t blocks, int threads, int64_t smem_bytes) {
    py::dict d = facts(plan.segments > 1 ? "few rows, heads and values: time is cut into segments" : why, blocks,
                       threads, plan.tile.blocks_per_sm, plan.workspace_bytes, plan.bytes);
    d["chunk"] = text_of(plan.tile);
    d["blocks of scores"] = plan.scores.blocks;
    d["segments of a row"] = plan.segments;
    d["shared memory bytes"] = smem_bytes;
    d["launches"] = plan.launches;
    return d;
  };
  py::dict plans;
  {
    const delta::cuda::FwdPlan plan = delta::cuda::plan_fwd(fwd);
    plans["forward"] = walk(plan, "a block walks through a row, for a head and a tile of its values",
                            plan.blocks * plan.segments, delta::cuda::kFwdThreads, plan.smem_bytes);
  }
  {
    const delta::cuda::BwdPlan plan = delta::cuda::plan_bwd(bwd);
    plans["backward"] =
        walk(plan, "blocks walk through a row, forward or backward, for a head and a tile of its values",
             plan.walk_blocks, delta::cuda::kBwdThreads, plan.walk_smem_bytes);
  }
  {
    const delta::cuda::StepPlan plan = delta::cuda::plan_step(step);
    plans["step"] = facts("a block owns a tile of the values of a head", plan.blocks, plan.cut.threads,
                          plan.blocks_per_sm, 0, delta::cuda::step_bytes(step));
  }
  return plans;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts and plans of seqkern.";
  m.def("build_info", &build_info,
        "cuda: version of the toolkit or None; archs: list; compiler; torch: version of the headers");
  m.def("isa", [] { return isa_name(isa()); }, "The instruction set of the CPU kernels.");
  m.def("isas", &available_isas, "Those that this machine can run.");
  m.def("plan_causal_conv1d", &plan_causal_conv1d, py::kw_only(), py::arg("batch"), py::arg("channels"),
        py::arg("length"), py::arg("width"), py::arg("dtype"), py::arg("dilation") = 1, py::arg("silu") = true,
        py::arg("bias") = true, py::arg("states") = false, py::arg("channels_last") = false,
        "The CUDA kernels that a shape runs: how many blocks, what they need and the bytes that they move.");
  m.def("plan_selective_scan", &plan_selective_scan, py::kw_only(), py::arg("batch"), py::arg("channels"),
        py::arg("length"), py::arg("states"), py::arg("dtype"), py::arg("groups") = 1, py::arg("complex") = false,
        py::arg("gate") = true, py::arg("constant") = false, py::arg("two_exp") = false, py::arg("split_time") = true,
        py::arg("checkpoints") = true, py::arg("channels_last") = false, "The same.");
  m.def("plan_linear_scan", &plan_linear_scan, py::kw_only(), py::arg("batch"), py::arg("length"), py::arg("channels"),
        py::arg("dtype"), py::arg("constant_over_batch") = false, py::arg("constant_over_time") = false,
        py::arg("constant_over_channels") = false, py::arg("complex") = false, py::arg("log_space") = false,
        py::arg("reset") = false, py::arg("states") = false, py::arg("split_time") = true, "The same.");
  m.def("plan_elementwise_rnn", &plan_elementwise_rnn, py::kw_only(), py::arg("batch"), py::arg("length"),
        py::arg("channels"), py::arg("dtype"), py::arg("cell") = "gru", py::arg("solver") = "auto",
        py::arg("max_sweeps") = 0, py::arg("reset") = false, py::arg("states") = false, py::arg("split_time") = true,
        py::arg("checkpoints") = true, "The same.");
  m.def("plan_linear_attention", &plan_linear_attention, py::kw_only(), py::arg("batch"), py::arg("length"),
        py::arg("heads"), py::arg("keys"), py::arg("size"), py::arg("dtype"), py::arg("value_heads") = 0,
        py::arg("decay") = "none", py::arg("normalize") = false, py::arg("read_previous") = false,
        py::arg("bonus") = false, py::arg("skip") = false, py::arg("gate") = false, py::arg("states") = false,
        py::arg("value_major") = false, py::arg("split_time") = true, py::arg("backward") = true, "The same.");
  m.def("plan_delta_rule", &plan_delta_rule, py::kw_only(), py::arg("batch"), py::arg("length"), py::arg("heads"),
        py::arg("keys"), py::arg("size"), py::arg("dtype"), py::arg("value_heads") = 0, py::arg("decay") = "none",
        py::arg("erase_key") = false, py::arg("states") = false, py::arg("split_time") = true,
        py::arg("backward") = true, "The same.");
  m.def("plan_rnn", &plan_rnn, py::kw_only(), py::arg("batch"), py::arg("length"), py::arg("heads"), py::arg("size"),
        py::arg("dtype"), py::arg("cell") = "lstm", py::arg("outputs") = 0,
        py::arg("shared_bytes") = kH200.shared_bytes, py::arg("multiprocessors") = kH200.multiprocessors,
        "The same, for a device with so much shared memory for a block and so many multiprocessors.");
  m.def("plan_softmax_scan", &plan_softmax_scan, py::kw_only(), py::arg("batch"), py::arg("length"), py::arg("heads"),
        py::arg("size"), py::arg("dtype"), py::arg("states") = false, py::arg("split_time") = true,
        py::arg("normalizers") = true, "The same.");
}
