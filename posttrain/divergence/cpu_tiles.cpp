// The kernels of posttrain/divergence/cpu_tiles.py, which says what they compute. Needs AVX-512.

#include <ATen/native/CPUBlas.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t kColumns = 128;  // of a block of the vocabulary; BLOCK_V in Python
constexpr int64_t kRows = 32;      // positions multiplied at once
constexpr int64_t kLanes = 16;
constexpr int64_t kHalfLanes = 2 * kLanes;  // of numbers of two bytes
constexpr int64_t kVectors = kColumns / kLanes;

// exp(x) for x <= 0 to 2e-7; NaN stays NaN.
inline __m512 exp_of(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);  // the second operand wins where one is NaN
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  }
  return _mm512_scalef_ps(p, n);
}

inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, kLanes)) - 1);
}

// Rows become columns.
inline void transpose(__m512i (&r)[kLanes]) {
  __m512i t[kLanes];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// [count, width] rows, as pairs of neighbours, to [width / 2, kColumns] pairs: the order in which bfloat16 products
// read their second factor. Missing rows become zeros.
void pack(const at::BFloat16* rows, int64_t count, int64_t width, int32_t* packed) {
  const auto* pairs = reinterpret_cast<const int32_t*>(rows);
  const int64_t num_pairs = width / 2;
  __m512i r[kLanes];
  for (int64_t first = 0; first < kColumns; first += kLanes) {
    for (int64_t pair = 0; pair < num_pairs; pair += kLanes) {
      const __mmask16 mask = first_lanes(num_pairs - pair);
      for (int64_t i = 0; i < kLanes; ++i) {
        r[i] = first + i < count ? _mm512_maskz_loadu_epi32(mask, pairs + (first + i) * num_pairs + pair)
                                 : _mm512_setzero_si512();
      }
      transpose(r);
      for (int64_t i = 0; i < std::min(kLanes, num_pairs - pair); ++i) {
        _mm512_storeu_si512(packed + (pair + i) * kColumns + first, r[i]);
      }
    }
  }
}

// A [count, columns] part of rows of bfloat16 to [columns, padded]; what is missing to ``padded`` becomes zeros.
void transpose_part(
    const uint16_t* rows, int64_t count, int64_t row_stride, int64_t columns, int64_t padded, uint16_t* transposed) {
  __m512i low[kLanes], high[kLanes];
  for (int64_t column = 0; column < columns; column += kHalfLanes) {
    const int64_t valid = std::min(kHalfLanes, columns - column);
    const auto mask = static_cast<__mmask32>((uint64_t{1} << valid) - 1);
    for (int64_t row = 0; row < padded; row += kHalfLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        __m512i pair[2];
        for (int64_t j = 0; j < 2; ++j) {
          const int64_t at = row + 2 * i + j;
          pair[j] = at < count ? _mm512_maskz_loadu_epi16(mask, rows + at * row_stride + column) : _mm512_setzero_si512();
        }
        low[i] = _mm512_unpacklo_epi16(pair[0], pair[1]);
        high[i] = _mm512_unpackhi_epi16(pair[0], pair[1]);
      }
      transpose(low);
      transpose(high);
      // Unpacking works in quarters: of eight columns the first four are in ``low``.
      for (int64_t i = 0; i < valid; ++i) {
        const __m512i* from = i % 8 < 4 ? low : high;
        _mm512_storeu_si512(transposed + (column + i) * padded + row, from[i / 8 * 4 + i % 4]);
      }
    }
  }
}

inline void store_half(uint16_t* to, __mmask16 mask, __m512 values) {
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline __m512 load_half(const uint16_t* from, __mmask16 mask) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from));
}

inline __m512i to_bfloat16(__m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
}

}  // namespace

extern "C" {

// Blocks [first_block, last_block) of the vocabulary, for all positions. ``sums`` is [5, blocks, positions].
void posttrain_block_sums(
    const at::BFloat16* student_hidden, const at::BFloat16* student_head, const at::BFloat16* teacher_hidden,
    const at::BFloat16* teacher_head, uint16_t* below_top, uint16_t* difference, float* sums, int64_t positions,
    int64_t vocabulary, int64_t student_width, int64_t teacher_width, int64_t row_stride, int64_t sum_stride,
    int64_t block_stride, float inverse_temperature, int64_t first_block, int64_t last_block) {
  std::vector<int32_t> student_packed(student_width / 2 * kColumns), teacher_packed(teacher_width / 2 * kColumns);
  std::vector<float> student(kRows * kColumns), teacher(kRows * kColumns);
  const __m512 scale = _mm512_set1_ps(inverse_temperature);
  const __m512 lowest = _mm512_set1_ps(-1e30f);
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t column = block * kColumns;
    const int64_t columns = std::min(kColumns, vocabulary - column);
    __mmask16 masks[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) {
      masks[v] = first_lanes(columns - v * kLanes);
    }
    pack(student_head + column * student_width, columns, student_width, student_packed.data());
    pack(teacher_head + column * teacher_width, columns, teacher_width, teacher_packed.data());
    for (int64_t row = 0; row < positions; row += kRows) {
      const int64_t rows = std::min(kRows, positions - row);
      at::native::cpublas::brgemm(
          rows, kColumns, student_width, student_width, kColumns, kColumns, false, student_hidden + row * student_width,
          reinterpret_cast<const at::BFloat16*>(student_packed.data()), student.data());
      at::native::cpublas::brgemm(
          rows, kColumns, teacher_width, teacher_width, kColumns, kColumns, false, teacher_hidden + row * teacher_width,
          reinterpret_cast<const at::BFloat16*>(teacher_packed.data()), teacher.data());
      for (int64_t r = 0; r < rows; ++r) {
        __m512 s[kVectors], apart[kVectors];
        __m512 top = lowest, teacher_top = lowest;
        __m512 t[kVectors];
        for (int64_t v = 0; v < kVectors; ++v) {
          const float* at = student.data() + r * kColumns + v * kLanes;
          const float* teacher_at = teacher.data() + r * kColumns + v * kLanes;
          s[v] = _mm512_mask_mul_ps(lowest, masks[v], _mm512_loadu_ps(at), scale);
          t[v] = _mm512_mask_mul_ps(lowest, masks[v], _mm512_loadu_ps(teacher_at), scale);
          apart[v] = _mm512_sub_ps(s[v], t[v]);
          top = _mm512_max_ps(top, s[v]);
          teacher_top = _mm512_max_ps(teacher_top, t[v]);
        }
        const float highest = _mm512_reduce_max_ps(top), teacher_highest = _mm512_reduce_max_ps(teacher_top);
        __m512 total = _mm512_setzero_ps(), weighted = total, teacher_total = total;
        for (int64_t v = 0; v < kVectors; ++v) {
          s[v] = _mm512_sub_ps(s[v], _mm512_set1_ps(highest));
          const __m512 weight = exp_of(s[v]);
          total = _mm512_add_ps(total, weight);
          weighted = _mm512_fmadd_ps(weight, apart[v], weighted);
          teacher_total = _mm512_add_ps(teacher_total, exp_of(_mm512_sub_ps(t[v], _mm512_set1_ps(teacher_highest))));
        }
        const float sum = _mm512_reduce_add_ps(total);
        const float mean = _mm512_reduce_add_ps(weighted) / sum;
        uint16_t* below_at = below_top + (row + r) * row_stride + column;
        uint16_t* difference_at = difference + (row + r) * row_stride + column;
        // Half precision ends at 65504; what is that far away has probability 0.
        const __m512 limit = _mm512_set1_ps(60000.0f), negative_limit = _mm512_set1_ps(-60000.0f);
        for (int64_t v = 0; v < kVectors; ++v) {
          const __m512 centred = _mm512_sub_ps(apart[v], _mm512_set1_ps(mean));
          store_half(below_at + v * kLanes, masks[v], _mm512_max_ps(negative_limit, s[v]));
          store_half(difference_at + v * kLanes, masks[v], _mm512_max_ps(negative_limit, _mm512_min_ps(limit, centred)));
        }
        float* sum_at = sums + block * block_stride + row + r;
        sum_at[0] = highest;
        sum_at[sum_stride] = sum;
        sum_at[2 * sum_stride] = mean;
        sum_at[3 * sum_stride] = teacher_highest;
        sum_at[4 * sum_stride] = _mm512_reduce_add_ps(teacher_total);
      }
    }
  }
  at::native::cpublas::brgemm_release();
}

// The gradient by the logits of positions [first_row, last_row), bfloat16, in place of ``below_top``. ``factors`` is
// [2, blocks, positions]: what a block's exponentials are multiplied with, and what is added to its differences.
void posttrain_gradient(
    uint16_t* below_top, const uint16_t* difference, const float* factors, int64_t vocabulary, int64_t row_stride,
    int64_t factor_stride, int64_t block_stride, int64_t first_row, int64_t last_row) {
  for (int64_t row = first_row; row < last_row; ++row) {
    for (int64_t column = 0; column < vocabulary; column += kLanes) {
      const __mmask16 mask = first_lanes(vocabulary - column);
      const float* factor = factors + column / kColumns * block_stride + row;
      uint16_t* at = below_top + row * row_stride + column;
      const __m512 probability = _mm512_mul_ps(exp_of(load_half(at, mask)), _mm512_set1_ps(factor[0]));
      const __m512 apart =
          _mm512_add_ps(load_half(difference + row * row_stride + column, mask), _mm512_set1_ps(factor[factor_stride]));
      _mm512_mask_cvtepi32_storeu_epi16(at, mask, to_bfloat16(_mm512_mul_ps(probability, apart)));
    }
  }
}

// [count, width] hidden states to [padded / 2, width] pairs of positions, zeros for those that are missing.
void posttrain_pack_positions(
    const uint16_t* hidden, int64_t count, int64_t width, int64_t padded, uint16_t* packed) {
  for (int64_t position = 0; position < padded; ++position) {
    uint16_t* to = packed + position / 2 * 2 * width + position % 2;
    for (int64_t i = 0; i < width; ++i) {
      to[2 * i] = position < count ? hidden[position * width + i] : 0;
    }
  }
}

// Rows of the head's gradient for blocks [first_block, last_block) of the vocabulary: ``total`` [vocabulary, width]
// becomes, or with ``add`` grows by, the logits' gradient, transposed, times the packed hidden states.
void posttrain_head_gradient(
    const uint16_t* gradient, const at::BFloat16* packed, float* total, int64_t count, int64_t padded,
    int64_t vocabulary, int64_t width, int64_t row_stride, int64_t add, int64_t first_block, int64_t last_block) {
  std::vector<uint16_t> transposed(kColumns * padded);
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t column = block * kColumns;
    const int64_t columns = std::min(kColumns, vocabulary - column);
    transpose_part(gradient + column, count, row_stride, columns, padded, transposed.data());
    at::native::cpublas::brgemm(
        columns, width, padded, padded, width, width, add != 0, reinterpret_cast<const at::BFloat16*>(transposed.data()),
        packed, total + column * width);
  }
  at::native::cpublas::brgemm_release();
}

}  // extern "C"
