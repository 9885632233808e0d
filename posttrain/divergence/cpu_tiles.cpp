// The kernels of posttrain/divergence/cpu_tiles.py, which says what they compute. Needs AVX-512.

#include <ATen/native/CPUBlas.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t kColumns = 128;  // of a block of the vocabulary; BLOCK_V in Python
constexpr int64_t kRows = 64;      // positions multiplied at once
constexpr int64_t kLanes = 16;
constexpr int64_t kHalfLanes = 2 * kLanes;  // of numbers of two bytes
constexpr int64_t kVectors = kColumns / kLanes;

enum Kind : int64_t { kReverseKl, kForwardKl, kJsd };  // as in Python's KINDS

inline __m512 all(float value) { return _mm512_set1_ps(value); }

// x = n log 2 + r with |r| <= log(2) / 2, and exp(r) - 1; NaN stays NaN. For x <= 0; the least are taken for -87.
struct Exponential {
  __m512 n, minus_one;

  explicit Exponential(__m512 x) {
    x = _mm512_max_ps(all(-87.0f), x);  // the second operand wins where one is NaN
    n = _mm512_roundscale_ps(_mm512_mul_ps(x, all(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, all(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, all(-2.12194440e-4f), r);
    __m512 p = all(1.0f / 720);
    for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f}) {
      p = _mm512_fmadd_ps(p, r, all(c));
    }
    minus_one = _mm512_mul_ps(p, r);
  }
};

// exp(x) for x <= 0 to 2e-7.
inline __m512 exp_of(__m512 x) {
  const Exponential e(x);
  return _mm512_scalef_ps(_mm512_add_ps(e.minus_one, all(1.0f)), e.n);
}

// exp(x) - 1 for x <= 0, to 3e-7 of itself.
inline __m512 expm1_of(__m512 x) {
  const Exponential e(x);
  const __m512 power = _mm512_scalef_ps(all(1.0f), e.n);
  return _mm512_fmadd_ps(power, e.minus_one, _mm512_sub_ps(power, all(1.0f)));
}

// log(1 + x) for -1 < x <= 0.
inline __m512 log1p_of(__m512 x) {
  const __m512 y = _mm512_add_ps(all(1.0f), x);
  const __m512 mantissa = _mm512_getmant_ps(y, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
  const __m512 exponent = _mm512_getexp_ps(_mm512_mul_ps(y, all(4.0f / 3)));
  const __m512 f = _mm512_sub_ps(mantissa, all(1.0f));
  const __m512 s = _mm512_div_ps(f, _mm512_add_ps(f, all(2.0f)));
  const __m512 square = _mm512_mul_ps(s, s);
  __m512 p = all(2.0f / 11);
  for (const float c : {2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3, 2.0f}) {
    p = _mm512_fmadd_ps(p, square, all(c));
  }
  const __m512 rounding = _mm512_sub_ps(x, _mm512_sub_ps(y, all(1.0f)));
  return _mm512_fmadd_ps(exponent, all(0.693147181f), _mm512_fmadd_ps(s, p, rounding));
}

// cap tanh(x / cap)
inline __m512 capped(__m512 x, float cap) {
  const __m512 e = expm1_of(_mm512_mul_ps(_mm512_abs_ps(x), all(-2.0f / cap)));
  const __m512 size = _mm512_div_ps(_mm512_mul_ps(e, all(cap)), _mm512_add_ps(e, all(2.0f)));
  const __m512i sign = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(INT32_MIN));
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(_mm512_abs_ps(size)), sign));
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

// One position's logits of a block, over the temperature: what is kept of each, and the block's sums.
template <int64_t kKind>
inline void block_of_row(
    const float* student, const float* teacher, const __mmask16 (&masks)[kVectors], float scale, float cap,
    uint16_t* higher_at, uint16_t* apart_at, float* sum_at, int64_t sum_stride) {
  const __m512 lowest = all(-1e30f);
  __m512 s[kVectors], t[kVectors];
  __m512 top = lowest, teacher_top = lowest;
  for (int64_t v = 0; v < kVectors; ++v) {
    const __m512 logit = _mm512_loadu_ps(teacher + v * kLanes);
    s[v] = _mm512_mask_mul_ps(lowest, masks[v], _mm512_loadu_ps(student + v * kLanes), all(scale));
    t[v] = _mm512_mask_mul_ps(lowest, masks[v], cap > 0 ? capped(logit, cap) : logit, all(scale));
    top = _mm512_max_ps(top, s[v]);
    teacher_top = _mm512_max_ps(teacher_top, t[v]);
  }
  const float highest = _mm512_reduce_max_ps(top), teacher_highest = _mm512_reduce_max_ps(teacher_top);
  // Half precision ends at 65504; what is that far away has probability 0.
  const __m512 limit = all(60000.0f), negative_limit = all(-60000.0f);
  __m512 total = _mm512_setzero_ps(), teacher_total = total, weighted = total;
  for (int64_t v = 0; v < kVectors; ++v) {
    s[v] = _mm512_sub_ps(s[v], all(highest));
    t[v] = _mm512_sub_ps(t[v], all(teacher_highest));
    const __m512 apart = _mm512_sub_ps(s[v], t[v]);
    const __m512 weight = exp_of(s[v]), teacher_weight = exp_of(t[v]);
    total = _mm512_add_ps(total, weight);
    teacher_total = _mm512_add_ps(teacher_total, teacher_weight);
    if constexpr (kKind != kJsd) {
      weighted = _mm512_fmadd_ps(kKind == kReverseKl ? weight : teacher_weight, apart, weighted);
    }
    store_half(higher_at + v * kLanes, masks[v], _mm512_max_ps(negative_limit, _mm512_max_ps(s[v], t[v])));
    store_half(apart_at + v * kLanes, masks[v], _mm512_max_ps(negative_limit, _mm512_min_ps(limit, apart)));
  }
  const float sum = _mm512_reduce_add_ps(total), teacher_sum = _mm512_reduce_add_ps(teacher_total);
  sum_at[0] = highest;
  sum_at[sum_stride] = teacher_highest;
  sum_at[2 * sum_stride] = sum;
  sum_at[3 * sum_stride] = teacher_sum;
  sum_at[4 * sum_stride] = _mm512_reduce_add_ps(weighted) / (kKind == kReverseKl ? sum : teacher_sum);
}

// What was kept of 16 entries, once the whole vocabulary's sums are known.
struct Entries {
  __m512 log_p, log_q, log_ratio;  // of the student, of the teacher, and log_p - log_q

  Entries(
      const uint16_t* higher_at, const uint16_t* apart_at, __mmask16 mask, float log_scale, float teacher_log_scale) {
    const __m512 higher = load_half(higher_at, mask), apart = load_half(apart_at, mask), zero = _mm512_setzero_ps();
    log_p = _mm512_add_ps(_mm512_add_ps(higher, _mm512_min_ps(apart, zero)), all(log_scale));
    log_q = _mm512_add_ps(_mm512_sub_ps(higher, _mm512_max_ps(apart, zero)), all(teacher_log_scale));
    log_ratio = _mm512_add_ps(apart, all(log_scale - teacher_log_scale));
  }
};

// p, q, and their logarithms' distance from that of m = (1 - beta) p + beta q.
struct Mixture {
  __m512 p, q, p_over_m, q_over_m;

  Mixture(const Entries& entries, float beta) {
    const __m512 zero = _mm512_setzero_ps();
    const __mmask16 student_higher = _mm512_cmp_ps_mask(entries.log_ratio, zero, _CMP_GE_OQ);
    const __m512 below = expm1_of(_mm512_sub_ps(zero, _mm512_abs_ps(entries.log_ratio)));
    const __m512 larger = exp_of(_mm512_mask_mov_ps(entries.log_q, student_higher, entries.log_p));
    const __m512 smaller = _mm512_fmadd_ps(larger, below, larger);
    p = _mm512_mask_mov_ps(smaller, student_higher, larger);
    q = _mm512_mask_mov_ps(larger, student_higher, smaller);
    const __m512 share = _mm512_mask_mov_ps(all(1 - beta), student_higher, all(beta));
    const __m512 larger_over_m = _mm512_sub_ps(zero, log1p_of(_mm512_mul_ps(share, below)));
    p_over_m = _mm512_add_ps(larger_over_m, _mm512_min_ps(zero, entries.log_ratio));
    q_over_m = _mm512_sub_ps(larger_over_m, _mm512_max_ps(zero, entries.log_ratio));
  }
};

// The derivative of the divergence by 16 of the student's logits.
template <int64_t kKind>
inline __m512 logit_gradient(const Entries& entries, float centre, float beta) {
  if constexpr (kKind == kReverseKl) {
    return _mm512_mul_ps(exp_of(entries.log_p), _mm512_sub_ps(entries.log_ratio, all(centre)));
  } else if constexpr (kKind == kForwardKl) {
    // p - q without the rounding of either.
    const __m512 below = expm1_of(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(entries.log_ratio)));
    const __m512 apart = _mm512_mul_ps(exp_of(_mm512_max_ps(entries.log_p, entries.log_q)), below);
    const __mmask16 student_higher = _mm512_cmp_ps_mask(entries.log_ratio, _mm512_setzero_ps(), _CMP_GE_OQ);
    return _mm512_mask_sub_ps(apart, student_higher, _mm512_setzero_ps(), apart);
  } else {
    const Mixture mixture(entries, beta);
    return _mm512_mul_ps(
        _mm512_mul_ps(mixture.p, all(1 - beta)), _mm512_sub_ps(mixture.p_over_m, all(centre)));
  }
}

template <int64_t kKind>
void gradient_of_row(
    uint16_t* higher, const uint16_t* apart, const float* log_scales, int64_t vocabulary, int64_t scale_stride,
    int64_t block_stride, float weight, float centre, float beta) {
  for (int64_t column = 0; column < vocabulary; column += kLanes) {
    const __mmask16 mask = first_lanes(vocabulary - column);
    const float* log_scale = log_scales + column / kColumns * block_stride;
    const Entries entries(higher + column, apart + column, mask, log_scale[0], log_scale[scale_stride]);
    const __m512 gradient = _mm512_mul_ps(logit_gradient<kKind>(entries, centre, beta), all(weight));
    _mm512_mask_cvtepi32_storeu_epi16(higher + column, mask, to_bfloat16(gradient));
  }
}

}  // namespace

extern "C" {

// Blocks [first_block, last_block) of the vocabulary, for all positions. Of each entry two half-precision numbers are
// kept: the higher of both models' logits below their highest in the block, in ``higher``, and how far the student's is
// above the teacher's then, in ``apart``. ``sums`` is [5, blocks, positions]: the highest of student and teacher, the
// sums of their exponentials, and the mean of ``apart`` under the student, for reverse KL, or the teacher, for forward.
void posttrain_block_sums(
    int64_t kind, const at::BFloat16* student_hidden, const at::BFloat16* student_head,
    const at::BFloat16* teacher_hidden, const at::BFloat16* teacher_head, uint16_t* higher, uint16_t* apart, float* sums,
    int64_t positions, int64_t vocabulary, int64_t student_width, int64_t teacher_width, int64_t row_stride,
    int64_t sum_stride, int64_t block_stride, float inverse_temperature, float cap, int64_t first_block,
    int64_t last_block) {
  const auto row_form = kind == kReverseKl ? block_of_row<kReverseKl>
                        : kind == kForwardKl ? block_of_row<kForwardKl>
                                             : block_of_row<kJsd>;
  std::vector<int32_t> student_packed(student_width / 2 * kColumns), teacher_packed(teacher_width / 2 * kColumns);
  std::vector<float> student(kRows * kColumns), teacher(kRows * kColumns);
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
        const int64_t at = (row + r) * row_stride + column;
        row_form(
            student.data() + r * kColumns, teacher.data() + r * kColumns, masks, inverse_temperature, cap, higher + at,
            apart + at, sums + block * block_stride + row + r, sum_stride);
      }
    }
  }
  at::native::cpublas::brgemm_release();
}

// For positions [first_row, last_row), the generalised Jensen-Shannon divergence, in ``sums``, and KL(p || m),
// ``sum_stride`` further on. ``log_scales`` is [2, blocks, positions]: what is added to the logarithms of a block's
// exponentials to make them probabilities, of student and teacher.
void posttrain_jsd_sums(
    const uint16_t* higher, const uint16_t* apart, const float* log_scales, float* sums, int64_t vocabulary,
    int64_t row_stride, int64_t scale_stride, int64_t block_stride, int64_t sum_stride, float beta, int64_t first_row,
    int64_t last_row) {
  for (int64_t row = first_row; row < last_row; ++row) {
    __m512 divergence = _mm512_setzero_ps(), student_kl = divergence;
    for (int64_t block = 0; block < vocabulary; block += kColumns) {
      const float* log_scale = log_scales + block / kColumns * block_stride + row;
      __m512 block_divergence = _mm512_setzero_ps(), block_student_kl = block_divergence;
      for (int64_t column = block; column < std::min(block + kColumns, vocabulary); column += kLanes) {
        const __mmask16 mask = first_lanes(vocabulary - column);
        const int64_t at = row * row_stride + column;
        const Mixture mixture(Entries(higher + at, apart + at, mask, log_scale[0], log_scale[scale_stride]), beta);
        const __m512 kl = _mm512_mul_ps(mixture.p, mixture.p_over_m);
        const __m512 both = _mm512_fmadd_ps(
            _mm512_mul_ps(mixture.q, all(beta)), mixture.q_over_m, _mm512_mul_ps(kl, all(1 - beta)));
        block_student_kl = _mm512_mask_add_ps(block_student_kl, mask, block_student_kl, kl);
        block_divergence = _mm512_mask_add_ps(block_divergence, mask, block_divergence, both);
      }
      divergence = _mm512_add_ps(divergence, block_divergence);
      student_kl = _mm512_add_ps(student_kl, block_student_kl);
    }
    sums[row] = _mm512_reduce_add_ps(divergence);
    sums[sum_stride + row] = _mm512_reduce_add_ps(student_kl);
  }
}

// The gradient by the logits of positions [first_row, last_row), bfloat16, in place of ``higher``. ``log_scales`` is as
// above; ``weights`` multiplies a position's gradient, ``centres`` is its reverse KL or KL(p || m).
void posttrain_gradient(
    int64_t kind, uint16_t* higher, const uint16_t* apart, const float* log_scales, const float* weights,
    const float* centres, int64_t vocabulary, int64_t row_stride, int64_t scale_stride, int64_t block_stride, float beta,
    int64_t first_row, int64_t last_row) {
  const auto row_form = kind == kReverseKl ? gradient_of_row<kReverseKl>
                        : kind == kForwardKl ? gradient_of_row<kForwardKl>
                                             : gradient_of_row<kJsd>;
  for (int64_t row = first_row; row < last_row; ++row) {
    row_form(
        higher + row * row_stride, apart + row * row_stride, log_scales + row, vocabulary, scale_stride, block_stride,
        weights[row], centres[row], beta);
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
