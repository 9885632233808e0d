// The kernel of posttrain/engine/cpu_attention.py, which says what it computes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kBlock = 64;  // states whose keys and values stay in the innermost cache
constexpr int64_t kTokens = 8;  // of one row, which share them
constexpr int64_t kFewQueries = 3;
constexpr int64_t kSmall = 1 << 15;  // products of a call that is not worth waking another thread for

using Vec = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32)));

struct BFloat16 {
  uint16_t bits;
};

inline Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline Vec load(const BFloat16* from) {
  Halves x;
  std::memcpy(&x, from, sizeof x);
  return reinterpret_cast<Vec>(__builtin_convertvector(x, Words) << 16);
}

inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }

inline void store(BFloat16* to, Vec x) {
  const Words bits = reinterpret_cast<Words>(x);
  // To the nearest, of two the even one. What rounds up past the largest number becomes infinite; NaN stays NaN, since
  // the sums here never set only the lowest bits of one.
  const Halves rounded = __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Halves);
  std::memcpy(to, &rounded, sizeof rounded);
}

// exp(x) for x <= 0, to 2e-7; NaN stays NaN.
inline Vec exp_of(Vec x) {
  const Vec lowest = Vec{} - 87.0f;
  x = x < lowest ? lowest : x;
  const float to_integer = 12582912.0f;  // 1.5 * 2^23: no bits are left behind the point
  const Vec n = (x * 1.44269504f + to_integer) - to_integer;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = Vec{} + 1.0f / 720;
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  return p * reinterpret_cast<Vec>((__builtin_convertvector(n, Ints) + 127) << 23);
}

inline float max_of(Vec x) {
  float top = x[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) top = std::max(top, x[lane]);
  return top;
}

inline float sum_of(Vec x) {
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) x[lane] += x[lane + width];
  }
  return x[0];
}

// Lane i becomes the sum of the lanes of x[i].
inline Vec sums_of(Vec* x) {
  for (int64_t i = 0; i < 8; ++i) {
    const Vec a = x[i], b = x[i + 8];
    x[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  for (int64_t i = 0; i < 4; ++i) {
    const Vec a = x[i], b = x[i + 4];
    x[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  }
  for (int64_t i = 0; i < 2; ++i) {
    const Vec a = x[i], b = x[i + 2];
    x[i] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  const Vec a = x[0], b = x[1];
  return __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

template <typename T>
struct Pass {
  const T* query;  // [heads, tokens, D], strides in elements, those of D being 1
  const T* keys;   // [rows, key heads, capacity, D]
  const T* values;
  const int64_t* rows;  // of each token
  const int64_t* seen;  // states each token attends to
  T* output;            // [tokens, heads, D]
  int64_t heads, key_heads, capacity, head_stride, token_stride;
  float scale;
};

// One query's softmax over the states so far, not yet divided by its sum.
template <int kVectors>
struct Running {
  Vec query[kVectors], mixed[kVectors], sum;
  float top;
};

// Adds the first ``valid`` states of a block to one query's softmax. The order of every sum depends on positions alone.
template <typename T, int kVectors>
void add_block(Running<kVectors>& at, const T* keys, const T* values, int64_t valid) {
  constexpr int64_t dim = kVectors * kLanes;
  const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Vec hidden = Vec{} - INFINITY;
  Vec scores[kBlock / kLanes];
  Vec tops = hidden;
  const int64_t groups = (valid + kLanes - 1) / kLanes;
  for (int64_t group = 0; group < groups; ++group) {
    const T* key = keys + group * kLanes * dim;
    Vec products[kLanes];
    for (int64_t state = 0; state < kLanes; ++state, key += dim) {
      Vec product = at.query[0] * load(key);
      for (int v = 1; v < kVectors; ++v) product += at.query[v] * load(key + v * kLanes);
      products[state] = product;
    }
    const Vec score = sums_of(products);
    scores[group] = lane < static_cast<int32_t>(valid - group * kLanes) ? score : hidden;
    tops = tops < scores[group] ? scores[group] : tops;
  }
  const float top = std::max(at.top, max_of(tops));
  const Vec shrink = exp_of(Vec{} + (at.top - top));
  at.top = top;
  at.sum *= shrink;
  float weights[kBlock];
  for (int64_t group = 0; group < groups; ++group) {
    const Vec weight = exp_of(scores[group] - top);
    const Vec shown = lane < static_cast<int32_t>(valid - group * kLanes) ? weight : Vec{};
    at.sum += shown;
    store(weights + group * kLanes, shown);
  }
  Vec even[kVectors] = {}, odd[kVectors] = {};
  const T* value = values;
  int64_t state = 0;
  for (; state + 1 < valid; state += 2, value += 2 * dim) {
    for (int v = 0; v < kVectors; ++v) {
      even[v] += weights[state] * load(value + v * kLanes);
      odd[v] += weights[state + 1] * load(value + dim + v * kLanes);
    }
  }
  if (state < valid) {
    for (int v = 0; v < kVectors; ++v) even[v] += weights[state] * load(value + v * kLanes);
  }
  for (int v = 0; v < kVectors; ++v) at.mixed[v] = at.mixed[v] * shrink + (even[v] + odd[v]);
}

// Tokens [first, last) of one row, for the query heads of one key head.
template <typename T, int kVectors>
void attend(const Pass<T>& pass, int64_t first, int64_t last, int64_t key_head) {
  constexpr int64_t dim = kVectors * kLanes;
  const int64_t shared = pass.heads / pass.key_heads, count = (last - first) * shared;
  const int64_t offset = (pass.rows[first] * pass.key_heads + key_head) * pass.capacity * dim;
  std::vector<Running<kVectors>> running(count);
  for (int64_t i = 0; i < count; ++i) {
    Running<kVectors>& at = running[i];
    const int64_t head = key_head * shared + i % shared;
    const T* query = pass.query + head * pass.head_stride + (first + i / shared) * pass.token_stride;
    for (int v = 0; v < kVectors; ++v) at.query[v] = load(query + v * kLanes) * pass.scale;
    std::fill_n(at.mixed, kVectors, Vec{});
    at.sum = Vec{};
    at.top = -INFINITY;
  }
  const int64_t longest = *std::max_element(pass.seen + first, pass.seen + last);
  for (int64_t begin = 0; begin < longest; begin += kBlock) {
    const auto add = [&](const auto* keys, const auto* values) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t valid = std::min(kBlock, pass.seen[first + i / shared] - begin);
        if (valid > 0) add_block(running[i], keys, values, valid);
      }
    };
    const T* keys = pass.keys + offset + begin * dim;
    const T* values = pass.values + offset + begin * dim;
    if constexpr (std::is_same_v<T, BFloat16>) {
      // Converted once for many queries.
      if (count > kFewQueries) {
        float wide_keys[kBlock * dim], wide_values[kBlock * dim];
        const int64_t size = std::min(kBlock, (longest - begin + kLanes - 1) / kLanes * kLanes) * dim;
        for (int64_t i = 0; i < size; i += kLanes) {
          store(wide_keys + i, load(keys + i));
          store(wide_values + i, load(values + i));
        }
        add(wide_keys, wide_values);
        continue;
      }
    }
    add(keys, values);
  }
  for (int64_t i = 0; i < count; ++i) {
    const Vec total = Vec{} + sum_of(running[i].sum);
    T* output = pass.output + ((first + i / shared) * pass.heads + key_head * shared + i % shared) * dim;
    for (int v = 0; v < kVectors; ++v) store(output + v * kLanes, running[i].mixed[v] / total);
  }
}

template <typename T, int kVectors>
void attend_all(const Pass<T>& pass, int64_t tokens, int threads) {
  std::vector<int64_t> starts;
  int64_t states = 0;
  for (int64_t n = 0; n < tokens; ++n) {
    states += pass.seen[n];
    if (starts.empty() || pass.rows[n] != pass.rows[starts.back()] || n - starts.back() == kTokens) starts.push_back(n);
  }
  const int64_t pieces = static_cast<int64_t>(starts.size());
  starts.push_back(tokens);
  const bool small = states * pass.heads * kVectors * kLanes < kSmall;
#pragma omp parallel for collapse(2) schedule(dynamic, 4) num_threads(threads) if (threads > 1 && !small)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    for (int64_t head = 0; head < pass.key_heads; ++head) {
      attend<T, kVectors>(pass, starts[piece], starts[piece + 1], head);
    }
  }
}

template <typename T>
void dispatch(const Pass<T>& pass, int64_t tokens, int64_t dim, int threads) {
  switch (dim / kLanes) {
    case 1: return attend_all<T, 1>(pass, tokens, threads);
    case 2: return attend_all<T, 2>(pass, tokens, threads);
    case 3: return attend_all<T, 3>(pass, tokens, threads);
    case 4: return attend_all<T, 4>(pass, tokens, threads);
    case 5: return attend_all<T, 5>(pass, tokens, threads);
    case 6: return attend_all<T, 6>(pass, tokens, threads);
    case 8: return attend_all<T, 8>(pass, tokens, threads);
    case 16: return attend_all<T, 16>(pass, tokens, threads);
  }
}

}  // namespace

extern "C" {

void posttrain_attention(
    int is_float32, const void* query, const void* keys, const void* values, const int64_t* rows, const int64_t* seen,
    void* output, int64_t tokens, int64_t heads, int64_t key_heads, int64_t capacity, int64_t dim, int64_t head_stride,
    int64_t token_stride, float scale, int threads) {
  const auto run = [&]<typename T>(T*) {
    dispatch<T>(
        {static_cast<const T*>(query), static_cast<const T*>(keys), static_cast<const T*>(values), rows, seen,
         static_cast<T*>(output), heads, key_heads, capacity, head_stride, token_stride, scale},
        tokens, dim, threads);
  };
  is_float32 ? run(static_cast<float*>(nullptr)) : run(static_cast<BFloat16*>(nullptr));
}

}  // extern "C"
