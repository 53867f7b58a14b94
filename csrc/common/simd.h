// Vectors for CPU kernels; simd_math.h has functions of them. The file that includes this is compiled once per
// instruction set, so everything here has internal linkage and nothing comes from std:: (a weak symbol of one
// instruction set could be linked into another).
//
// Vec<A> is one register of A = float or double; memory of any element type is widened on load and rounded to
// nearest even on store. Compile with -ffp-contract=off: products and sums are fused where madd says so and nowhere
// else, so a value does not depend on which loop computed it.
#pragma once
#include <stdlib.h>

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "common/dtype.h"

namespace seqkern {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
constexpr int kLanes = kVectorBytes / sizeof(A);

template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VecOf<A>::type;

using Float = Vec<float>;
using Double = Vec<double>;
using Int = Vec<int32_t>;
using UInt = Vec<uint32_t>;
typedef uint16_t UShort __attribute__((vector_size(kVectorBytes / 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, from);
}

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;  // of the element type T, see accumulator(DType)

// body.template operator()<T>() with the element type T of dtype.
template <class Body>
inline void visit_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body.template operator()<float>();
    case DType::kBFloat16:
      return body.template operator()<BFloat16>();
    case DType::kFloat16:
      return body.template operator()<Half>();
    case DType::kFloat64:
      return body.template operator()<double>();
  }
}

#if defined(__AVX512F__)
constexpr __mmask16 kAll = 0xffff;  // gcc 12 warns of uninitialized values inside the intrinsics without a mask
#endif

inline Float splat(float value) {
  return value - Float{};
}  // x - 0 is x, -0 too
inline Double splat(double value) {
  return value - Double{};
}

inline Float madd(Float a, Float b, Float c) {  // a b + c
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline Double madd(Double a, Double b, Double c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// Masks are vectors of integers, all bits set or none.
template <class A>
inline auto first_lanes(int n) {
  Vec<A> index{};
  for (int i = 0; i < kLanes<A>; ++i) index[i] = static_cast<A>(i);
  return index < static_cast<A>(n);
}
template <class Mask, class V>
inline V select(Mask mask, V yes, V no) {
  return mask ? yes : no;
}

// {0, ..., n - 1} as a pack.
template <int... kI>
struct Indices {};
template <int kN, int... kI>
struct IndicesBelow : IndicesBelow<kN - 1, kN - 1, kI...> {};
template <int... kI>
struct IndicesBelow<0, kI...> {
  using type = Indices<kI...>;
};

// Lane i of the result is lane source(i) of a, or lane source(i) - lanes of b.
template <class Source, class V, int... kI>
inline V shuffle(V a, V b, Indices<kI...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Source::of(kI)...);
#else
  return __builtin_shuffle(a, b, decltype(a < b){Source::of(kI)...});
#endif
}

// Vectors rows[kCount] hold rows of kCount elements one after another. Column kPart of them, gathered one vector after
// another: a lane not found in rows[kVector] keeps what was found before.
template <int kCount, int kLanes, int kPart, int kVector>
struct FromRows {
  static constexpr int of(int i) {
    const int element = i * kCount + kPart;
    return element / kLanes == kVector ? kLanes + element % kLanes : kVector == 1 ? element % kLanes : i;
  }
};
template <int kCount, int kPart, int kVector, class A>
inline Vec<A> column(const Vec<A>* rows) {
  if constexpr (kVector == 0)
    return rows[0];
  else
    return shuffle<FromRows<kCount, kLanes<A>, kPart, kVector>>(
        column<kCount, kPart, kVector - 1, A>(rows), rows[kVector], typename IndicesBelow<kLanes<A>>::type{});
}
template <int kCount, class A, int kPart = 0>
inline void split_columns(const Vec<A>* rows, Vec<A>* columns) {
  columns[kPart] = column<kCount, kPart, kCount - 1, A>(rows);
  if constexpr (kPart + 1 < kCount) split_columns<kCount, A, kPart + 1>(rows, columns);
}

// Rows of two elements, which are the lanes of a and b.
template <int kLanes, int kVector>
struct Interleaved {
  static constexpr int of(int i) { return i % 2 * kLanes + (kVector * kLanes + i) / 2; }
};
template <class A>
inline void interleave(Vec<A> a, Vec<A> b, Vec<A>* rows) {
  rows[0] = shuffle<Interleaved<kLanes<A>, 0>>(a, b, typename IndicesBelow<kLanes<A>>::type{});
  rows[1] = shuffle<Interleaved<kLanes<A>, 1>>(a, b, typename IndicesBelow<kLanes<A>>::type{});
}

// Exchanges of lanes between the vectors `a` and `b` whose numbers differ in the bit kBit. First: of each pair of lanes
// whose numbers differ in that bit, the lower ones of a and b; second: the upper ones.
template <int kLanes, int kBit, bool kUpper>
struct Exchanged {
  static constexpr int of(int i) { return (i & kBit ? kLanes : 0) + ((i & ~kBit) | (kUpper ? kBit : 0)); }
};
template <class A, int kBit, bool kUpper>
inline Vec<A> exchange(Vec<A> a, Vec<A> b) {
  return shuffle<Exchanged<kLanes<A>, kBit, kUpper>>(a, b, typename IndicesBelow<kLanes<A>>::type{});
}

// Lane j of rows[i] and lane i of rows[j] change places.
template <class A, int kBit = 1>
[[gnu::always_inline]] inline void transpose(Vec<A>* rows) {
  for (int i = 0; i < kLanes<A>; ++i) {
    if (i & kBit) continue;
    const Vec<A> a = rows[i], b = rows[i | kBit];
    rows[i] = exchange<A, kBit, false>(a, b);
    rows[i | kBit] = exchange<A, kBit, true>(a, b);
  }
  if constexpr (2 * kBit < kLanes<A>) transpose<A, 2 * kBit>(rows);
}

// Lane i of the result is the sum of the lanes of rows[i], added as a tree.
template <class A, int kBit = 1>
inline Vec<A> sums_of_lanes(Vec<A>* rows) {
  for (int i = 0; i < kLanes<A>; i += 2 * kBit)
    rows[i] = exchange<A, kBit, false>(rows[i], rows[i | kBit]) + exchange<A, kBit, true>(rows[i], rows[i | kBit]);
  if constexpr (2 * kBit < kLanes<A>) return sums_of_lanes<A, 2 * kBit>(rows);
  return rows[0];
}

template <class A>
inline A sum_of_lanes(Vec<A> v) {
  A sum = 0;
  for (int i = 0; i < kLanes<A>; ++i) sum += v[i];
  return sum;
}

// Conversions. Vectors of the 16-bit types travel as the low halves of 32-bit lanes.

inline float widen(float x) {
  return x;
}
inline double widen(double x) {
  return x;
}
inline Float widen(BFloat16, UInt bits) {
  return bit_cast<Float>(bits << 16);
}
inline Float widen(Half, UInt bits) {
  const UInt exponent_and_mantissa = (bits & 0x7fffu) << 13;
  // No arithmetic on subnormals, which may count as 0: see FlushSubnormals.
  const UInt subnormal = bit_cast<UInt>(bit_cast<Float>(exponent_and_mantissa + 0x38800000u) - 0x1p-14f);
  const UInt finite = exponent_and_mantissa < 0x00800000u ? subnormal : exponent_and_mantissa + 0x38000000u;
  const UInt magnitude = exponent_and_mantissa >= 0x0f800000u ? exponent_and_mantissa | 0x7f800000u : finite;
  return bit_cast<Float>(magnitude | (bits & 0x8000u) << 16);
}

inline UInt round_to_upper_half(Float x) {  // the nearest bfloat16 in the upper 16 bits, anything below
  const UInt bits = bit_cast<UInt>(x);
  const UInt rounded = bits + (0x7fffu + (bits >> 16 & 1u));
  return x != x ? bits | 0x400000u : rounded;
}
inline UInt narrow(BFloat16, Float x) {
  return round_to_upper_half(x) >> 16;
}
inline UInt narrow(Half, Float x) {
  const UInt bits = bit_cast<UInt>(x);
  const UInt magnitude = bits & 0x7fffffffu;
  const UInt special = magnitude > 0x7f800000u ? UInt{} + 0x7e00u : UInt{} + 0x7c00u;
  const UInt normal = (magnitude + (0xc8000fffu + (magnitude >> 13 & 1u))) >> 13;
  const UInt subnormal = bit_cast<UInt>(bit_cast<Float>(magnitude) + 0.5f) - 0x3f000000u;
  const UInt half = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? subnormal : normal;
  return half | (bits >> 16 & 0x8000u);
}

// One element: the vector form in one lane, so that both agree to the last bit.
template <class T>
inline float widen(T x) {
  return widen(x, UInt{} + x.bits)[0];
}

template <class T, class A>
inline T narrow(A x) {
  if constexpr (sizeof(T) == 2) {
    return {static_cast<uint16_t>(narrow(T{}, splat(static_cast<float>(x)))[0])};
  } else {
    return static_cast<T>(x);
  }
}

template <class T>
inline UInt load_low_halves(const T* p) {
#if defined(__AVX512F__)
  return bit_cast<UInt>(_mm512_maskz_cvtepu16_epi32(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#else
  UShort bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return __builtin_convertvector(bits, UInt);
#endif
}
template <class T>
inline void store_low_halves(T* p, UInt bits) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(kAll, bit_cast<__m512i>(bits)));
#else
  const UShort low = __builtin_convertvector(bits, UShort);
  __builtin_memcpy(p, &low, sizeof low);
#endif
}

// kLanes<A> elements at p.
template <class A, class T>
inline Vec<A> load(const T* p) {
  if constexpr (kSame<A, T>) {
    Vec<A> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  } else if constexpr (kSame<A, float> && sizeof(T) == 2) {
#if defined(__F16C__)
    if constexpr (kSame<T, Half>) {
#if defined(__AVX512F__)
      return _mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
      return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
    }
#endif
    return widen(T{}, load_low_halves(p));
  } else {
    Vec<A> v;
    for (int i = 0; i < kLanes<A>; ++i) v[i] = static_cast<A>(widen(p[i]));
    return v;
  }
}

// The first n of them, and zeros.
template <class A, class T>
inline Vec<A> load(const T* p, int n) {
  if (n >= kLanes<A>) return load<A>(p);
  T whole[kLanes<A>] = {};
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (kSame<A, float> && kSame<T, float>) return _mm512_maskz_loadu_ps(mask, p);
  if constexpr (kSame<A, float> && sizeof(T) == 2) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(whole), _mm256_maskz_loadu_epi16(mask, p));
    return load<A>(whole);
  }
#endif
  __builtin_memcpy(whole, p, static_cast<size_t>(n) * sizeof(T));
  return load<A>(whole);
}

template <class A, class T>
inline void store(T* p, Vec<A> v) {
  if constexpr (kSame<A, T>) {
    __builtin_memcpy(p, &v, sizeof v);
  } else if constexpr (kSame<A, float> && sizeof(T) == 2) {
#if defined(__F16C__)
    if constexpr (kSame<T, Half>) {
#if defined(__AVX512F__)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(kAll, v, _MM_FROUND_TO_NEAREST_INT));
#else
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#endif
      return;
    }
#endif
    store_low_halves(p, narrow(T{}, v));
  } else {
    for (int i = 0; i < kLanes<A>; ++i) p[i] = narrow<T>(v[i]);
  }
}

// A cache line at p on its way to memory past the caches, for what is too large to be found in them again; where p does
// not begin a line, or vectors are shorter, a store like any other. Other threads see it after finish_streams().
template <class A, class T>
inline void stream(T* p, Vec<A> v) {
#if defined(__AVX512F__)
  if constexpr (kSame<A, T>) {
    if (reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0)
      return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(v));
  }
#endif
  store<A>(p, v);
}
inline void finish_streams() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// The first n of kLanes<A> elements.
template <class A, class T>
inline void store(T* p, Vec<A> v, int n) {
  if (n >= kLanes<A>) return store<A>(p, v);
  T whole[kLanes<A>];
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (kSame<A, float> && kSame<T, float>) return _mm512_mask_storeu_ps(p, mask, v);
#endif
  store<A>(whole, v);
#if defined(__AVX512F__)
  if constexpr (kSame<A, float> && sizeof(T) == 2)
    return _mm256_mask_storeu_epi16(p, mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(whole)));
#endif
  __builtin_memcpy(p, whole, static_cast<size_t>(n) * sizeof(T));
}

// to[i] = from[i * stride]
template <class To, class From>
inline void convert(const From* from, int64_t stride, int64_t count, To* to) {
  int64_t i = 0;
  if (stride == 1) {
    using A = Accumulator<To>;
    for (; i + kLanes<A> <= count; i += kLanes<A>) store<A>(to + i, load<A>(from + i));
  }
  for (; i < count; ++i) to[i] = narrow<To>(widen(from[i * stride]));
}

// Such rows with their first element dropped and `last` appended: rows[kVector] of the result, from the vector that
// starts one element later (of the last vector: the vector itself, as its last element is replaced).
template <int kCount, int kLanes, int kVector>
struct Appended {
  static constexpr int of(int i) {
    const int element = kVector * kLanes + i;
    return element % kCount == kCount - 1 ? kLanes + element / kCount : kVector == kCount - 1 ? i + 1 : i;
  }
};
template <int kCount, class A, class T, int kVector = 0>
inline void append_column(const T* memory, Vec<A> last, Vec<A>* rows) {
  const Vec<A> from = kVector == kCount - 1 ? rows[kVector] : load<A>(memory + kVector * kLanes<A> + 1);
  rows[kVector] = shuffle<Appended<kCount, kLanes<A>, kVector>>(from, last, typename IndicesBelow<kLanes<A>>::type{});
  if constexpr (kVector + 1 < kCount) append_column<kCount, A, T, kVector + 1>(memory, last, rows);
}

// Fetch the cache line `bytes` ahead of where a loop reads or writes: neither the hardware nor the order of execution
// looks far enough, across pages least of all. The line need not exist.
inline void prefetch_read(const void* p, int64_t bytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes)), 0);
}
inline void prefetch_write(const void* p, int64_t bytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes)), 1);
}

// While it lives, numbers below the normal range are 0 to this thread: processors are slow at them.
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kZeroInputs | kZeroResults); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kZeroInputs = 0x40, kZeroResults = 0x8000;
  const unsigned before_;
#else
  FlushSubnormals() {}
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

// One allocation cut into arrays that start on cache lines.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(static_cast<char*>(malloc(static_cast<size_t>(bytes + kLine)))) {
    if (memory_ == nullptr) abort();
    next_ = memory_ + (kLine - reinterpret_cast<uintptr_t>(memory_) % kLine);
  }
  ~Scratch() { free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += bytes_of<T>(count);
    return array;
  }
  template <class T>
  static constexpr int64_t bytes_of(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + kLine - 1) / kLine * kLine;
  }

 private:
  static constexpr int64_t kLine = 64;
  char* memory_;
  char* next_;
};

// Arrays in one allocation: arrays.allocate(call, take) gets each from take(count), a first time to count bytes only.
template <class A, class Arrays>
struct InScratch : Arrays {
  template <class Call>
  explicit InScratch(const Call& call) : scratch_(bytes(call)) {
    Arrays::allocate(call, [&](int64_t count) { return scratch_.template take<A>(count); });
  }

 private:
  template <class Call>
  int64_t bytes(const Call& call) {
    int64_t sum = 0;
    Arrays::allocate(call, [&](int64_t count) -> A* { return sum += Scratch::bytes_of<A>(count), nullptr; });
    return sum;
  }
  Scratch scratch_;
};

}  // namespace
}  // namespace seqkern
