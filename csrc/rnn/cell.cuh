// Cells by index, for kernels that are templates over it.
#pragma once

#include <tuple>

#include "rnn/cells.h"
#include "rnn/params.h"

namespace seqkern::rnn::cuda {

// That of elman_tanh is for elman_relu too.
template <int kCell, typename R = float>
using CellOf = std::tuple_element_t<kCell, std::tuple<Lstm<R>, Gru<R>, Slstm<R>, ElmanTanh<R>>>;
template <int kCell>
inline constexpr int kNumbers = CellOf<kCell>::kCarried > 0 ? CellOf<kCell>::kCarried : 1;  // that cells pass for c

// f(a value of the type in cells.h).
template <int kCell, typename R = float, typename F>
__device__ __forceinline__ R with_cell(Cell cell, F&& f) {
  if constexpr (kCell == static_cast<int>(Cell::kElmanTanh)) {
    if (cell == Cell::kElmanRelu) return f(ElmanRelu<R>());
  }
  return f(CellOf<kCell, R>());
}

}  // namespace seqkern::rnn::cuda
