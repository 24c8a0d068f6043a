// Tiles: a group of positions, one per lane, by `rows` values each; between memory of any strides and dtype, and vectors.
#pragma once

#include "simd.h"

namespace rmm {
namespace RMM_ISA {

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

// ---- dtypes ----

typedef uint32_t U32 __attribute__((vector_size(kBytes)));
typedef uint16_t U16 __attribute__((vector_size(kBytes / 2)));

#if defined(__AVX512F__)
RMM_INLINE U32 widen(U16 bits) { return (U32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits); }
#elif defined(__AVX2__)
RMM_INLINE U32 widen(U16 bits) { return (U32)_mm256_cvtepu16_epi32((__m128i)bits); }
#else
RMM_INLINE U32 widen(U16 bits) { return __builtin_convertvector(bits, U32); }
#endif

RMM_INLINE Vec<float> widen(U16 bits, BF16) { return (Vec<float>)(widen(bits) << 16); }

#if defined(__AVX512F__)
RMM_INLINE Vec<float> widen(U16 bits, F16) { return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits); }
#elif defined(__F16C__)
RMM_INLINE Vec<float> widen(U16 bits, F16) { return (Vec<float>)_mm256_cvtph_ps((__m128i)bits); }
#else
RMM_INLINE Vec<float> widen(U16 bits, F16) {
  const U32 wide = widen(bits);
  const U32 magnitude = wide & 0x7fffu;
  // Exponent and mantissa moved into place; the bias is corrected by a product, which is exact for subnormals too.
  const Vec<float> finite = (Vec<float>)((magnitude << 13) + (112u << 23));
  const Vec<float> subnormal = (Vec<float>)((magnitude << 13) + (113u << 23)) - 6.103515625e-5f;
  const Vec<float> special = (Vec<float>)((magnitude << 13) | 0x7f800000u);
  Vec<float> value = magnitude < 0x400u ? subnormal : finite;
  value = magnitude >= 0x7c00u ? special : value;
  return (Vec<float>)((U32)value | ((wide & 0x8000u) << 16));
}
#endif

RMM_INLINE U16 narrow(Vec<float> value, BF16) {
  const U32 bits = (U32)value;
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32 nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, U16);
}

#if defined(__AVX512F__)
RMM_INLINE U16 narrow(Vec<float> value, F16) {
  return (U16)_mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__F16C__)
RMM_INLINE U16 narrow(Vec<float> value, F16) { return (U16)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT); }
#else
RMM_INLINE U16 narrow(Vec<float> value, F16) {
  const U32 bits = (U32)value;
  const U32 magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  // Normal: round to nearest even at bit 13 and rebias. Subnormal: adding 0.5 lines the value up with fp16's last bit.
  const U32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const U32 subnormal = (U32)((Vec<float>)magnitude + 0.5f) - 0x3f000000u;
  U32 out = magnitude < (113u << 23) ? subnormal : normal;
  out = magnitude >= 0x477ff000u ? U32{} + 0x7c00u : out;
  out = magnitude > 0x7f800000u ? U32{} + 0x7e00u : out;
  return __builtin_convertvector(out | sign, U16);
}
#endif

// Vectors from and to storage of T itself or of a half type (F16, BF16), whose values are float.
template <class T, class From>
RMM_INLINE Vec<T> load_as(const From* from) {
  if constexpr (sizeof(From) == sizeof(T)) {
    return load<T>(from);
  } else {
    U16 bits;
    memcpy(&bits, from, sizeof bits);
    return widen(bits, From{});
  }
}

template <class T, class To>
RMM_INLINE void store_as(To* to, Vec<T> v) {
  if constexpr (sizeof(To) == sizeof(T)) {
    store<T>(to, v);
  } else {
    const U16 bits = narrow(v, To{});
    memcpy(to, &bits, sizeof bits);
  }
}

// What storing a value leaves of it.
template <class T>
RMM_INLINE Vec<T> as_stored(Dtype dtype, Vec<T> v) {
  if constexpr (sizeof(T) == 4) {
    if (dtype == Dtype::f16) return widen(narrow(v, F16{}), F16{});
    if (dtype == Dtype::bf16) return widen(narrow(v, BF16{}), BF16{});
  }
  return v;
}

// One value, by the same arithmetic as a vector of them.
template <class T, class From>
RMM_INLINE T scalar_as(const From* from) {
  if constexpr (sizeof(From) == sizeof(T)) {
    return *from;
  } else {
    return widen(U16{from->bits}, From{})[0];
  }
}

// ---- transposition ----

template <int... I>
struct Sequence {};
template <int N, int... I>
struct MakeSequence : MakeSequence<N - 1, N - 1, I...> {};
template <int... I>
struct MakeSequence<0, I...> {
  using type = Sequence<I...>;
};

// Swaps the off-diagonal step × step blocks of a pair of rows.
template <class T, int Step, int... I>
RMM_INLINE void swap_blocks(Vec<T>& upper, Vec<T>& lower, Sequence<I...>) {
  const Vec<T> a = upper, b = lower;
  upper = __builtin_shufflevector(a, b, ((I & Step) ? kLanes<T> + I - Step : I)...);
  lower = __builtin_shufflevector(a, b, ((I & Step) ? kLanes<T> + I : I + Step)...);
}

template <class T, int Step>
RMM_INLINE void transpose_step(Vec<T>* rows) {
  if constexpr (Step < kLanes<T>) {
    using Lanes = typename MakeSequence<kLanes<T>>::type;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      if (!(i & Step)) swap_blocks<T, Step>(rows[i], rows[i + Step], Lanes{});
    }
    transpose_step<T, Step * 2>(rows);
  }
}

// In place, as many rows as lanes.
template <class T>
RMM_INLINE void transpose(Vec<T>* rows) {
  transpose_step<T, 1>(rows);
}

// ---- tiles ----

// tile[j] lane l = from[l · lane_stride + j · row_stride], j < rows; lanes from `lanes` on are 0.
template <class T, class From>
void load_tile(const From* from, int64_t lane_stride, int64_t row_stride, int lanes, int64_t rows, Vec<T>* tile) {
  constexpr int W = kLanes<T>;
  int64_t j = 0;
  if (lanes == W && lane_stride == 1) {
    for (; j < rows; ++j) tile[j] = load_as<T>(from + j * row_stride);
  } else if (lanes == W && row_stride == 1) {
    for (; j + W <= rows; j += W) {
      Vec<T> block[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) block[l] = load_as<T>(from + l * lane_stride + j);
      transpose<T>(block);
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) tile[j + l] = block[l];
    }
  }
  for (; j < rows; ++j) {
    T row[W] = {};
    for (int l = 0; l < lanes; ++l) row[l] = scalar_as<T>(from + l * lane_stride + j * row_stride);
    tile[j] = load(row);
  }
}

// to[l · lane_stride + j · row_stride] = tile[j] lane l, j < rows, l < lanes.
template <class T, class To>
void store_tile(To* to, int64_t lane_stride, int64_t row_stride, int lanes, int64_t rows, const Vec<T>* tile) {
  constexpr int W = kLanes<T>;
  int64_t j = 0;
  if (lanes == W && lane_stride == 1) {
    for (; j < rows; ++j) store_as<T>(to + j * row_stride, tile[j]);
  } else if (lanes == W && row_stride == 1) {
    for (; j + W <= rows; j += W) {
      Vec<T> block[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) block[l] = tile[j + l];
      transpose<T>(block);
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) store_as<T>(to + l * lane_stride + j, block[l]);
    }
  }
  for (; j < rows; ++j) {
    To row[W];
    store_as<T>(row, tile[j]);
    for (int l = 0; l < lanes; ++l) to[l * lane_stride + j * row_stride] = row[l];
  }
}

// N whole tiles side by side, row by row: tiles[g][j] lane l = from[g · W + l + j · row_stride].
template <int N, class T, class From>
void load_tiles(const From* from, int64_t row_stride, int64_t rows, Vec<T>* const* tiles) {
  for (int64_t j = 0; j < rows; ++j, from += row_stride) {
    for (int g = 0; g < N; ++g) tiles[g][j] = load_as<T>(from + g * kLanes<T>);
  }
}

template <int N, class T, class To>
void store_tiles(To* to, int64_t row_stride, int64_t rows, Vec<T>* const* tiles) {
  for (int64_t j = 0; j < rows; ++j, to += row_stride) {
    for (int g = 0; g < N; ++g) store_as<T>(to + g * kLanes<T>, tiles[g][j]);
  }
}

// body(E{}) for the storage of a dtype. T is double exactly where that is f64.
template <class T, class Body>
RMM_INLINE void with_storage(Dtype dtype, const Body& body) {
  if constexpr (sizeof(T) == 8) {
    body(T{});
  } else if (dtype == Dtype::f32) {
    body(T{});
  } else if (dtype == Dtype::bf16) {
    body(BF16{});
  } else {
    body(F16{});
  }
}

// The same, the storage dtype known at run time.
template <class T>
void load_tile(Dtype dtype, const char* from, int64_t lane_stride, int64_t row_stride, int lanes, int64_t rows, Vec<T>* tile) {
  with_storage<T>(dtype, [&](auto e) {
    load_tile<T>(reinterpret_cast<const decltype(e)*>(from), lane_stride, row_stride, lanes, rows, tile);
  });
}

template <class T>
void store_tile(Dtype dtype, char* to, int64_t lane_stride, int64_t row_stride, int lanes, int64_t rows, const Vec<T>* tile) {
  with_storage<T>(
      dtype, [&](auto e) { store_tile<T>(reinterpret_cast<decltype(e)*>(to), lane_stride, row_stride, lanes, rows, tile); });
}

template <int N, class T>
void load_tiles(Dtype dtype, const char* from, int64_t row_stride, int64_t rows, Vec<T>* const* tiles) {
  with_storage<T>(dtype,
                  [&](auto e) { load_tiles<N, T>(reinterpret_cast<const decltype(e)*>(from), row_stride, rows, tiles); });
}

template <int N, class T>
void store_tiles(Dtype dtype, char* to, int64_t row_stride, int64_t rows, Vec<T>* const* tiles) {
  with_storage<T>(dtype, [&](auto e) { store_tiles<N, T>(reinterpret_cast<decltype(e)*>(to), row_stride, rows, tiles); });
}

// So many groups of positions are read and written side by side: of float and double, four cache lines of each dense row.
constexpr int kBlock = 256 / kBytes;

// N tiles side by side, of `lanes` positions in all, more than none. Where positions are dense a row's lines are read, or
// written, at once: rows mostly lie a power of two apart, and then few of their lines are in the cache at the same time.
template <class T, int N>
void load_block(Dtype dtype, const char* from, int64_t lane_stride, int64_t row_stride, int64_t lanes, int64_t rows,
                Vec<T>* const (&tiles)[N]) {
  constexpr int W = kLanes<T>;
  if (lane_stride == 1 && lanes == N * W) return load_tiles<N, T>(dtype, from, row_stride, rows, tiles);
  for (int g = 0; g < N && lanes > 0; ++g, lanes -= W, from += W * lane_stride * element_size(dtype)) {
    load_tile<T>(dtype, from, lane_stride, row_stride, lanes < W ? static_cast<int>(lanes) : W, rows, tiles[g]);
  }
}

template <class T, int N>
void store_block(Dtype dtype, char* to, int64_t lane_stride, int64_t row_stride, int64_t lanes, int64_t rows,
                 Vec<T>* const (&tiles)[N]) {
  constexpr int W = kLanes<T>;
  if (lane_stride == 1 && lanes == N * W) return store_tiles<N, T>(dtype, to, row_stride, rows, tiles);
  for (int g = 0; g < N && lanes > 0; ++g, lanes -= W, to += W * lane_stride * element_size(dtype)) {
    store_tile<T>(dtype, to, lane_stride, row_stride, lanes < W ? static_cast<int>(lanes) : W, rows, tiles[g]);
  }
}

// Positions of a block where what is kept of each takes `kept` vectors a group: all of kBlock groups, or, where that is too
// much for the second-level cache and positions are not dense, fewer.
template <class T>
int64_t block_of(int64_t kept, bool dense) {
  constexpr int64_t most = int64_t(1) << 18;
  return (dense || kept * kBlock * kBytes <= most ? kBlock : 2) * kLanes<T>;
}

// The memory of `count` tiles, a view's stride[0] apart, whichever axis is dense, to be asked for in `shares` of about the same
// size: many requests at once would be waited for. None where neither axis is dense.
class TileLines {
 public:
  TileLines(const View& view, const char* from, int64_t count, int64_t lanes, int64_t lane_stride, int64_t rows,
            int64_t row_stride, int64_t shares) {
    const int64_t size = element_size(view.dtype);
    const bool along_rows = row_stride == 1;
    int64_t lines = along_rows ? lanes : rows, bytes = (along_rows ? rows : lanes) * size;
    line_ = (along_rows ? lane_stride : row_stride) * size;
    if (line_ == bytes) {  // one after the other: as one line
      bytes *= lines;
      lines = 1;
    }
    requests_ = (bytes + 63) / 64;
    lines_ = lines;
    next_tile_ = view.stride[0] * size;
    tile_ = at_ = from;
    left_ = lane_stride == 1 || row_stride == 1 ? count * lines * requests_ : 0;
    share_ = shares > 0 ? (left_ + shares - 1) / shares : 0;
    left_in_line_ = requests_;
    left_in_tile_ = lines_;
  }

  // Asks for the next share, to be read or, Write = 1, written. Inline: the compiler drops calls of what does nothing else.
  template <int Write = 0>
  RMM_INLINE void prefetch() {
    int64_t some = share_ < left_ ? share_ : left_;
    left_ -= some;
    while (some > 0) {
      const int64_t now = some < left_in_line_ ? some : left_in_line_;
      for (int64_t i = 0; i < now; ++i) __builtin_prefetch(at_ + 64 * i, Write);
      at_ += 64 * now;
      some -= now;
      left_in_line_ -= now;
      if (left_in_line_ > 0) break;
      left_in_line_ = requests_;
      if (--left_in_tile_ == 0) {
        left_in_tile_ = lines_;
        tile_ += next_tile_;
        at_ = tile_;
      } else {
        at_ += line_ - 64 * requests_;
      }
    }
  }

 private:
  const char *tile_, *at_;
  int64_t line_, lines_, next_tile_, requests_;  // requests a line
  int64_t left_, share_, left_in_line_, left_in_tile_;
};

// A row of `count` values, `stride` apart, in consecutive lanes; what is left of the last vector is 0.
template <class T>
void load_row(Dtype dtype, const char* from, int64_t stride, int64_t count, Vec<T>* row) {
  constexpr int W = kLanes<T>;
  const int64_t full = count / W;
  load_tile<T>(dtype, from, stride, W * stride, W, full, row);
  if (full * W < count) {
    const char* const rest = from + full * W * stride * element_size(dtype);
    load_tile<T>(dtype, rest, stride, 1, static_cast<int>(count - full * W), 1, row + full);
  }
}

template <class T>
void store_row(Dtype dtype, char* to, int64_t stride, int64_t count, const Vec<T>* row) {
  constexpr int W = kLanes<T>;
  const int64_t full = count / W;
  store_tile<T>(dtype, to, stride, W * stride, W, full, row);
  if (full * W < count) {
    char* const rest = to + full * W * stride * element_size(dtype);
    store_tile<T>(dtype, rest, stride, 1, static_cast<int>(count - full * W), 1, row + full);
  }
}

}  // namespace RMM_ISA
}  // namespace rmm
