#include "common/tensor.h"

#include <algorithm>
#include <cstdlib>

namespace seqkern {
namespace {

bool has_contiguous_time(const Tensor& t) {
  return t.stride(2) == 1 || t.size(2) == 1;
}
bool has_contiguous_channels(const Tensor& t) {
  return t.stride(1) == 1 || t.size(1) == 1;
}
Tensor swap_last_two(const Tensor& t) {
  return torch::stable::transpose(t, 1, 2);
}

}  // namespace

bool prefers_channels(const Tensor& t) {
  return has_contiguous_channels(t) && (!has_contiguous_time(t) || (t.size(2) == 1 && t.size(1) > 1));
}

Tensor in_order(const Tensor& t, bool channels_first) {
  if (!channels_first) return has_contiguous_time(t) ? t : as_contiguous(t);
  return has_contiguous_channels(t) ? t : swap_last_two(as_contiguous(swap_last_two(t)));
}

Tensor empty_in_order(const Tensor& like, int64_t B, int64_t D, int64_t L, ScalarType type, bool channels_first) {
  return channels_first ? swap_last_two(empty(like, {B, L, D}, type)) : empty(like, {B, D, L}, type);
}

Strides strides(const Tensor& t, bool channels_first) {
  if (channels_first) return {t.stride(0), 1, t.size(2) == 1 ? t.size(1) : t.stride(2)};
  return {t.stride(0), t.size(1) == 1 ? t.size(2) : t.stride(1), 1};
}

Packing::Packing(const Checker& check, const char* x_name, const Tensor& x, int64_t B, int64_t L,
                 const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& seq_idx)
    : cu_seqlens(as_contiguous(cu_seqlens)), seq_idx(as_contiguous(seq_idx)) {
  if (cu_seqlens && seq_idx) check.fail("cu_seqlens and seq_idx exclude each other; pass one of them");
  if (cu_seqlens) {
    check.shape("cu_seqlens", *cu_seqlens, {{"N + 1"}});
    if (cu_seqlens->size(0) < 1) check.fail("cu_seqlens must be (N + 1,) with at least one element, got (0,)");
    check.index("cu_seqlens", *cu_seqlens);
    check.device("cu_seqlens", *cu_seqlens, x_name, x);
    if (B != 1) check.fail("cu_seqlens needs a batch of B=1, got B=", B, "; concatenate the sequences along time");
  }
  if (seq_idx) {
    check.shape("seq_idx", *seq_idx, {{"B", B}, {"L", L}});
    check.int32("seq_idx", *seq_idx);
    check.device("seq_idx", *seq_idx, x_name, x);
  }
}

Sequences Packing::sequences(int64_t B, int64_t L, bool reverse) const {
  Sequences sequences{.batch = B, .length = L, .count = B, .reverse = reverse};
  if (cu_seqlens) {
    sequences.count = cu_seqlens->size(0) - 1;
    sequences.cu_seqlens = cu_seqlens->data_ptr();
    sequences.cu_seqlens_is_int64 = cu_seqlens->scalar_type() == ScalarType::Long;
  }
  if (seq_idx) sequences.seq_idx = static_cast<const int32_t*>(seq_idx->data_ptr());
  return sequences;
}

bool checks_values() {
  const char* value = std::getenv("SEQKERN_CHECK");
  return value != nullptr && *value == '1';
}

StateIndices::StateIndices(const Checker& check, const std::optional<Tensor>& given, const char* x_name,
                           const Tensor& x, int64_t B, int64_t rows)
    : indices(as_contiguous(given)) {
  if (!indices) return;
  check.shape("state_indices", *indices, {{"B", B}});
  check.device("state_indices", *indices, x_name, x);
  is_int64 = check.index("state_indices", *indices);
  const torch::stable::Device host(torch::headeronly::DeviceType::CPU);
  if (x.device().type() != host.type() && !checks_values()) return;
  const Tensor on_host = torch::stable::to(*indices, host);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t row = is_int64 ? static_cast<const int64_t*>(on_host.data_ptr())[b]
                                 : static_cast<const int32_t*>(on_host.data_ptr())[b];
    if (row >= rows) check.fail("state_indices must be below R=", rows, ", got ", row, "; negative rows are skipped");
  }
}

void Packing::check_values(const Checker& check, const Sequences& sequences) const {
  if (!cu_seqlens || !checks_values()) return;
  const Tensor on_host = torch::stable::to(*cu_seqlens, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  Sequences on_host_sequences = sequences;
  on_host_sequences.cu_seqlens = on_host.data_ptr();
  host_runs(check, on_host_sequences);
}

namespace {

std::vector<Run> runs_of_cu_seqlens(const Checker& check, const Sequences& s) {
  const auto bound = [&](int64_t n) {
    return s.cu_seqlens_is_int64 ? static_cast<const int64_t*>(s.cu_seqlens)[n]
                                 : static_cast<const int32_t*>(s.cu_seqlens)[n];
  };
  if (bound(0) != 0 || bound(s.count) != s.length)
    check.fail("cu_seqlens must start at 0 and end at L=", s.length, ", got ", bound(0), " and ", bound(s.count));
  std::vector<Run> runs;
  runs.reserve(s.count);
  for (int64_t n = 0; n < s.count; ++n) {
    if (bound(n + 1) < bound(n))
      check.fail("cu_seqlens must not decrease, got ", bound(n), " then ", bound(n + 1), " at ", n + 1);
    runs.push_back(
        {.b = 0, .begin = bound(n), .end = bound(n + 1), .initial = n, .final = n, .padding = false, .sequence = n});
  }
  return runs;
}

// Appends the runs of one row; in a row without sequences the state passes through an empty run.
void append_runs_of_row(std::vector<Run>& runs, const Sequences& s, int64_t b) {
  const int32_t* id = s.seq_idx + b * s.length;
  const size_t row = runs.size();
  for (int64_t begin = 0, end; begin < s.length; begin = end) {
    const bool padding = id[begin] < 0;
    for (end = begin + 1; end < s.length && (padding ? id[end] < 0 : id[end] == id[begin]); ++end) {
    }
    runs.push_back({.b = b, .begin = begin, .end = end, .initial = -1, .final = -1, .padding = padding, .sequence = b});
  }
  const auto is_sequence = [](const Run& run) { return !run.padding; };
  const auto lowest = std::find_if(runs.begin() + row, runs.end(), is_sequence);
  if (lowest == runs.end()) {
    runs.insert(runs.begin() + row,
                {.b = b, .begin = 0, .end = 0, .initial = b, .final = b, .padding = false, .sequence = b});
    return;
  }
  const auto highest = std::find_if(runs.rbegin(), runs.rend(), is_sequence);
  (s.reverse ? *highest : *lowest).initial = b;
  (s.reverse ? *lowest : *highest).final = b;
}

}  // namespace

std::vector<Run> host_runs(const Checker& check, const Sequences& s) {
  if (s.cu_seqlens) return runs_of_cu_seqlens(check, s);
  std::vector<Run> runs;
  for (int64_t b = 0; b < s.batch; ++b) {
    if (s.seq_idx)
      append_runs_of_row(runs, s, b);
    else
      runs.push_back({.b = b, .begin = 0, .end = s.length, .initial = b, .final = b, .padding = false, .sequence = b});
  }
  return runs;
}

std::vector<Run> cut_at_resets(const std::vector<Run>& runs, const Sequences& s, const bool* reset) {
  std::vector<Run> cut;
  for (const Run& run : runs) {
    if (run.padding || run.begin == run.end) {
      cut.push_back(run);
      continue;
    }
    const bool* const resets = reset + run.b * s.length;
    const size_t lowest = cut.size();
    Run piece = {.b = run.b,
                 .begin = run.begin,
                 .end = run.end,
                 .initial = -1,
                 .final = -1,
                 .padding = false,
                 .sequence = run.sequence};
    for (int64_t t = run.begin; t < run.end; ++t) {
      const int64_t at = s.reverse ? t + 1 : t;
      if (!resets[t] || at <= piece.begin || at >= run.end) continue;
      piece.end = at;
      cut.push_back(piece);
      piece.begin = at, piece.end = run.end;
    }
    cut.push_back(piece);
    if (!resets[s.reverse ? run.end - 1 : run.begin]) (s.reverse ? cut.back() : cut[lowest]).initial = run.initial;
    (s.reverse ? cut[lowest] : cut.back()).final = run.final;
  }
  return cut;
}

}  // namespace seqkern
