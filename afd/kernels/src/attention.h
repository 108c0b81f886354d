// Attention of one tile of query rows over the blocks of a paged KV cache: flash-style online softmax, float32 sums.
//
// A tile of kKeyTile keys goes through three stages, each reading K or V once for all rows:
//   pack        K transposed, so that one vector holds the same dimension(s) of kLanes keys: scores come out as
//               vectors over keys, without horizontal sums
//   score       rows x keys products, then scale, mask, maximum, 2^x
//   accumulate  acc += weight * V
// Every row sees the same arithmetic in the same order wherever it stands in a tile and however the keys are split
// among threads: keys are cut at multiples of kKeyTile and kChunkKeys from position 0, and a tile in which the row sees
// nothing leaves its state as it was. So a token's result does not depend on its batch or on the number of threads.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace AFD_ISA {

using afd::AttentionArgs;
using afd::AttentionTile;
using afd::kChunkKeys;
using afd::kKeyGroup;
using afd::kKeyTile;
using afd::kMaxRows;
using afd::SoftmaxState;

constexpr int kGroups = kKeyTile / kKeyGroup;
constexpr int kKeyVectors = kKeyTile / kLanes;
constexpr int kRowTile = 6;                            // rows held in registers,
constexpr int kVectorTile = AFD_LANES == 16 && kKeyVectors >= 4 ? 4 : 2;   // times this many vectors of keys,
constexpr int kChunkTile = AFD_LANES == 16 ? 2 : 1;    // or this many chunks of values
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kMinusInfinity = -__builtin_inff();

// The two products in terms of what the instruction set multiplies. Word: an element of a query, of a transposed key, of
// a row of weights. Values: V of kPerWord keys, ready to be multiplied by one word of weights.
template <class T>
struct Operand {
    typedef float Word;
    typedef Chunk Values;
    static constexpr int kPerWord = 1;

    static AFD_INLINE Vf dot(Vf sum, float q, const float* k) { return sum + splat(q) * load_vector<Vf>(k); }
    static AFD_INLINE Values load_values(const T* v, const T*) { return load(v); }
    static AFD_INLINE Values load_values_part(const T* v, const T*, int n) { return load_part8(v, n); }
    static AFD_INLINE Chunk weigh(Chunk sum, float weight, Values v) {
        return {sum.a + splat(weight) * v.a, sum.b + splat(weight) * v.b};
    }
    // Stores the weights of two vectors of keys, returns their sum as stored.
    static AFD_INLINE Vf store_weights(float* out, Vf a, Vf b) {
        store_vector(out, a);
        store_vector(out + kLanes, b);
        return a + b;
    }
};
#if AFD_BF16_DOT
// Pairs of bf16: two dimensions of a key in the scores, two keys in the sum of values. The weights are rounded to bf16
// and their sum is taken of the rounded ones, so they still add up to one.
template <>
struct Operand<bf16> {
    typedef int32_t Word;
    struct Values {
        Vi even, odd;  // dimension 2 i, 2 i + 1 of the first key in the lower half of word i, of the second in the upper
    };
    static constexpr int kPerWord = 2;

    static AFD_INLINE Vf dot(Vf sum, int32_t q, const int32_t* k) {
        return dot_words(sum, (Vi)_mm512_set1_epi32(q), load_vector<Vi>(k));
    }
    static AFD_INLINE Values interleave(Vi first, Vi second) {
        constexpr __mmask32 upper = 0xaaaaaaaa;
        return {(Vi)_mm512_mask_blend_epi16(upper, (__m512i)first, (__m512i)(second << 16)),
                (Vi)_mm512_mask_blend_epi16(upper, (__m512i)((Vu)first >> 16), (__m512i)second)};
    }
    static AFD_INLINE Values load_values(const bf16* v, const bf16* w) {
        return interleave(load_vector<Vi>(v), load_vector<Vi>(w));
    }
    static AFD_INLINE Values load_values_part(const bf16* v, const bf16* w, int n) {
        return interleave(load_words(v, n / 2), load_words(w, n / 2));
    }
    static AFD_INLINE Chunk weigh(Chunk sum, int32_t weight, Values v) {
        const Vi w = (Vi)_mm512_set1_epi32(weight);
        return {dot_words(sum.a, w, v.even), dot_words(sum.b, w, v.odd)};
    }
    static AFD_INLINE Vf store_weights(int32_t* out, Vf a, Vf b) {
        const Vi words = (Vi)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
        store_vector(out, words);
        return even_elements(words) + odd_elements(words);
    }
};
#endif

// Brings the next tile into the cache while the current one is worked on: a few lines at each step of the inner loops,
// because a core keeps only some dozens of lines in flight, and stalls on a burst.
class Lookahead {
  public:
    AFD_INLINE Lookahead() = default;
    // runs: 2 * kGroups places, the first half k_bytes long, the second v_bytes.
    Lookahead(const void* const* runs, int k_bytes, int v_bytes, int num_steps) : run_(runs), v_bytes_(v_bytes) {
        const int lines = (k_bytes + v_bytes + 63) / 64 * kGroups;
        rate_ = (lines + num_steps - 1) / num_steps;
        k_runs_end_ = runs + kGroups;
        runs_end_ = runs + 2 * kGroups;
        at_ = static_cast<const char*>(*run_);
        end_ = at_ + k_bytes;
        k_bytes_ = k_bytes;
    }

    AFD_INLINE void step() {
        for (int i = 0; i < rate_; ++i) {
            prefetch(at_);
            at_ += 64;
            if (at_ >= end_) next_run();
        }
    }

  private:
    AFD_INLINE void next_run() {
        if (++run_ == runs_end_) {
            rate_ = 0;
            return;
        }
        at_ = static_cast<const char*>(*run_);
        end_ = at_ + (run_ < k_runs_end_ ? k_bytes_ : v_bytes_);
    }

    const char *at_ = nullptr, *end_ = nullptr;
    const void* const* run_ = nullptr;
    const void *const *k_runs_end_ = nullptr, *const *runs_end_ = nullptr;
    int k_bytes_ = 0, v_bytes_ = 0, rate_ = 0;
};

AFD_INLINE int padded(int dim) { return (dim + kChunk - 1) / kChunk * kChunk; }

// ---- pack ----------------------------------------------------------------------------------------------------

#if AFD_LANES == 16
// 16 keys x `words` 32-bit words -> out[word][kKeyTile], 4 words at a time. low, high: keys 0-7 and 8-15.
AFD_INLINE void transpose_keys(const int32_t* low, const int32_t* high, int words, Lookahead& ahead, int32_t* out) {
    for (int w = 0; w < words; w += 4) {
        ahead.step();
        __m512i rows[4];  // lane l of rows[j] = words w..w+3 of key j + 4 l
        for (int j = 0; j < 4; ++j) {
            const __m128i* a = reinterpret_cast<const __m128i*>(low + j * words + w);
            const __m128i* b = reinterpret_cast<const __m128i*>(low + (j + 4) * words + w);
            const __m128i* c = reinterpret_cast<const __m128i*>(high + j * words + w);
            const __m128i* d = reinterpret_cast<const __m128i*>(high + (j + 4) * words + w);
            __m512i row = _mm512_castsi128_si512(_mm_loadu_si128(a));
            row = _mm512_mask_broadcast_i32x4(row, 0x00f0, _mm_loadu_si128(b));
            row = _mm512_mask_broadcast_i32x4(row, 0x0f00, _mm_loadu_si128(c));
            rows[j] = _mm512_mask_broadcast_i32x4(row, 0xf000, _mm_loadu_si128(d));
        }
        const __m512i ab_low = _mm512_unpacklo_epi32(rows[0], rows[1]), ab_high = _mm512_unpackhi_epi32(rows[0], rows[1]);
        const __m512i cd_low = _mm512_unpacklo_epi32(rows[2], rows[3]), cd_high = _mm512_unpackhi_epi32(rows[2], rows[3]);
        int32_t* p = out + w * kKeyTile;
        _mm512_storeu_si512(p, _mm512_unpacklo_epi64(ab_low, cd_low));
        _mm512_storeu_si512(p + kKeyTile, _mm512_unpackhi_epi64(ab_low, cd_low));
        _mm512_storeu_si512(p + 2 * kKeyTile, _mm512_unpacklo_epi64(ab_high, cd_high));
        _mm512_storeu_si512(p + 3 * kKeyTile, _mm512_unpackhi_epi64(ab_high, cd_high));
    }
}

template <class T>
AFD_INLINE void pack_keys(const T* low, const T* high, int head_dim, Lookahead& ahead, typename Operand<T>::Word* out) {
    static_assert(sizeof(typename Operand<T>::Word) == 4, "the transpose moves 32-bit words");
    transpose_keys(reinterpret_cast<const int32_t*>(low), reinterpret_cast<const int32_t*>(high),
                   head_dim / Operand<T>::kPerWord, ahead, reinterpret_cast<int32_t*>(out));
}
#else
AFD_INLINE void transpose4(Quad& a, Quad& b, Quad& c, Quad& d) {
    const Vi4 low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, second = {2, 3, 6, 7};
    const Quad ab_low = __builtin_shuffle(a, b, low), ab_high = __builtin_shuffle(a, b, high);
    const Quad cd_low = __builtin_shuffle(c, d, low), cd_high = __builtin_shuffle(c, d, high);
    a = __builtin_shuffle(ab_low, cd_low, first);
    b = __builtin_shuffle(ab_low, cd_low, second);
    c = __builtin_shuffle(ab_high, cd_high, first);
    d = __builtin_shuffle(ab_high, cd_high, second);
}

AFD_INLINE void store_keys(float* out, int word, Quad q, const float*) { store_vector(out + word * kKeyTile, q); }
AFD_INLINE void store_keys(float* out, int word, Quad q, const bf16*) {
    const Vi4 words = (Vi4)q;
    store_vector(out + 2 * word * kKeyTile, words << 16);
    store_vector(out + (2 * word + 1) * kKeyTile, words & (int32_t)0xffff0000u);
}

template <class T>
AFD_INLINE void pack_keys(const T* low, const T* high, int head_dim, Lookahead& ahead, float* out) {
    const int words = head_dim * static_cast<int>(sizeof(T)) / 4;
    for (int quarter = 0; quarter < 4; ++quarter) {
        const char* rows = reinterpret_cast<const char*>((quarter < 2 ? low : high) + (quarter & 1) * 4 * head_dim);
        for (int w = 0; w < words; w += 4) {
            const char* p = rows + 4 * w;
            ahead.step();
            Quad a = load_vector<Quad>(p), b = load_vector<Quad>(p + 4 * words);
            Quad c = load_vector<Quad>(p + 8 * words), d = load_vector<Quad>(p + 12 * words);
            transpose4(a, b, c, d);
            store_keys(out + 4 * quarter, w, a, low);
            store_keys(out + 4 * quarter, w + 1, b, low);
            store_keys(out + 4 * quarter, w + 2, c, low);
            store_keys(out + 4 * quarter, w + 3, d, low);
        }
    }
}
#endif

// ---- score ---------------------------------------------------------------------------------------------------

// scores[r][key] = q[r] . k[key] for R rows and all keys of the tile.
template <class T, int R>
void score_rows(const typename Operand<T>::Word* q, const typename Operand<T>::Word* keys, int words, Lookahead& lookahead,
                float* scores) {
    Lookahead ahead = lookahead;
    for (int first = 0; first < kKeyVectors; first += kVectorTile) {
        Vf acc[R][kVectorTile] = {};
        const typename Operand<T>::Word* k = keys + first * kLanes;
        for (int w = 0; w < words; ++w, k += kKeyTile) {
            ahead.step();
            for (int r = 0; r < R; ++r)
                for (int j = 0; j < kVectorTile; ++j)
                    acc[r][j] = Operand<T>::dot(acc[r][j], q[r * words + w], k + j * kLanes);
        }
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < kVectorTile; ++j)
                store_vector(scores + r * kKeyTile + (first + j) * kLanes, acc[r][j]);
    }
    lookahead = ahead;
}

// Turns one row's scores into weights, in place, keys outside [begin, end) of the tile into zeros. Returns the factor for
// what the row has accumulated so far.
template <class T>
AFD_INLINE float soften_row(float* scores, int begin, int end, float scale, float* max, float* sum) {
    Vf s[kKeyVectors];
    if (begin >= end) {
        for (int j = 0; j < kKeyVectors; ++j) store_vector(scores + j * kLanes, Vf{});
        return 1.0f;
    }
    for (int j = 0; j < kKeyVectors; ++j) s[j] = load_vector<Vf>(scores + j * kLanes) * scale;
    if (begin > 0 || end < kKeyTile)  // also replaces NaNs from memory behind the last key
        for (int j = 0; j < kKeyVectors; ++j) {
            const Vi key = lane_index() + j * kLanes;
            s[j] = (key >= begin) & (key < end) ? s[j] : splat(kMinusInfinity);
        }
    Vf highest = s[0];
    for (int j = 1; j < kKeyVectors; ++j) highest = max_of(highest, s[j]);
    const float tile_max = max_lane(highest), old_max = *max;
    const float new_max = tile_max > old_max ? tile_max : old_max;
    Vf total = {};
    typename Operand<T>::Word* weights = reinterpret_cast<typename Operand<T>::Word*>(scores);
    for (int j = 0; j < kKeyVectors; j += 2)
        total += Operand<T>::store_weights(weights + j * kLanes / Operand<T>::kPerWord, exp2_of(s[j] - new_max),
                                           exp2_of(s[j + 1] - new_max));
    const float factor = new_max == old_max ? 1.0f : exp2_of(old_max - new_max);
    *max = new_max;
    *sum = *sum * factor + sum_of(total);
    return factor;
}

// ---- accumulate ----------------------------------------------------------------------------------------------

// acc[r][column..] = acc * factor[r] + sum over keys [begin, end) of weight[r][key] * v[key][column..], for R rows and
// C chunks of columns, the last of which has only `tail` columns if Tail.
template <class T, int R, int C, bool Tail>
void accumulate(const T* const* groups, int begin, int end, int v_dim, int column, int tail, Lookahead& lookahead,
                const float* weights, const float* factors, float* acc, int acc_stride) {
    typedef Operand<T> Op;
    Lookahead ahead = lookahead;
    Chunk sums[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
            const float* p = acc + r * acc_stride + column + c * kChunk;
            sums[r][c].a = load_vector<Vf>(p) * factors[r];
            sums[r][c].b = load_vector<Vf>(p + kLanes) * factors[r];
        }
    for (int key = begin / Op::kPerWord * Op::kPerWord; key < end;) {
        const int group = key / kKeyGroup;
        const int stop = end < (group + 1) * kKeyGroup ? end : (group + 1) * kKeyGroup;
        const int64_t offset = (key % kKeyGroup) * v_dim + column;
        const T* v = groups[group] + offset;
        for (; key < stop; key += Op::kPerWord, v += Op::kPerWord * v_dim) {
            ahead.step();
            // A pair that reaches over an end of the range takes its valid key twice: the other has no weight, but may
            // be unwritten memory, and 0 * NaN is NaN.
            const T* first = key < begin ? v + v_dim : v;
            const T* second = key + 1 < end ? v + v_dim : v;
            typename Op::Values values[C];
            for (int c = 0; c < C; ++c)
                values[c] = Tail && c == C - 1 ? Op::load_values_part(first + c * kChunk, second + c * kChunk, tail)
                                               : Op::load_values(first + c * kChunk, second + c * kChunk);
            for (int r = 0; r < R; ++r) {
                typename Op::Word weight;
                __builtin_memcpy(&weight, weights + r * kKeyTile + key / Op::kPerWord, sizeof weight);
                for (int c = 0; c < C; ++c) sums[r][c] = Op::weigh(sums[r][c], weight, values[c]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
            float* p = acc + r * acc_stride + column + c * kChunk;
            store_vector(p, sums[r][c].a);
            store_vector(p + kLanes, sums[r][c].b);
        }
    lookahead = ahead;
}

template <class T, int R>
void accumulate_rows(const T* const* groups, int begin, int end, int v_dim, int column, Lookahead& ahead,
                     const float* weights, const float* factors, float* acc, int acc_stride) {
    const int columns = v_dim - column, tail = columns % kChunk;
#define AFD_ACCUMULATE(C, TAIL) \
    accumulate<T, R, C, TAIL>(groups, begin, end, v_dim, column, tail, ahead, weights, factors, acc, acc_stride)
    if (columns >= kChunkTile * kChunk)
        AFD_ACCUMULATE(kChunkTile, false);
    else if (columns > kChunk)
        AFD_ACCUMULATE(kChunkTile, true);
    else if (columns == kChunk)
        AFD_ACCUMULATE(1, false);
    else
        AFD_ACCUMULATE(1, true);
#undef AFD_ACCUMULATE
}

// ---- one tile of rows ----------------------------------------------------------------------------------------

template <class T>
struct Scratch {
    typename Operand<T>::Word *q, *keys;
    float *scores, *factors;
    SoftmaxState chunk;

    static size_t bytes(const AttentionArgs& a) {
        const size_t words = static_cast<size_t>(a.head_dim / Operand<T>::kPerWord);
        return 4 * (words * (kMaxRows + kKeyTile) + kMaxRows * (kKeyTile + 1)) + 4 * state_size(a);
    }
    static size_t state_size(const AttentionArgs& a) { return static_cast<size_t>(kMaxRows) * (2 + padded(a.v_dim)); }

    Scratch(const AttentionArgs& a, void* memory);
};

AFD_INLINE SoftmaxState make_state(float* memory) {
    return {memory, memory + kMaxRows, memory + 2 * kMaxRows};
}

template <class T>
Scratch<T>::Scratch(const AttentionArgs& a, void* memory) {
    typedef typename Operand<T>::Word Word;
    const size_t words = static_cast<size_t>(a.head_dim / Operand<T>::kPerWord);
    q = static_cast<Word*>(memory);
    keys = q + words * kMaxRows;
    scores = reinterpret_cast<float*>(keys + words * kKeyTile);
    factors = scores + kMaxRows * kKeyTile;
    chunk = make_state(factors + kMaxRows);
}

template <class T>
void load_queries(const AttentionArgs& a, const AttentionTile& t, typename Operand<T>::Word* q) {
    const int dim = a.head_dim;
    for (int row = 0; row < t.num_rows(); ++row) {
        const T* from = static_cast<const T*>(a.q) + (t.token_begin + row / t.num_heads) * a.q_stride +
                        static_cast<int64_t>(t.head_begin + row % t.num_heads) * dim;
        if (Operand<T>::kPerWord == 2 || sizeof(T) == 4) {
            std::memcpy(q + row * (dim / Operand<T>::kPerWord), from, static_cast<size_t>(dim) * sizeof(T));
        } else {
            for (int i = 0; i < dim; ++i) q[row * dim + i] = to_float(from[i]);
        }
    }
}

// Rows are taken kRowTile at a time, as evenly as they divide: 9 rows are 5 + 4.
template <class Function>
AFD_INLINE void for_row_groups(int num_rows, Function function) {
    const int groups = (num_rows + kRowTile - 1) / kRowTile;
    for (int g = 0, row = 0; g < groups; ++g) {
        const int count = (num_rows - row + groups - g - 1) / (groups - g);
        function(row, count);
        row += count;
    }
}

#define AFD_BY_ROWS(COUNT, CALL) \
    switch (COUNT) {             \
        case 1: CALL(1); break;  \
        case 2: CALL(2); break;  \
        case 3: CALL(3); break;  \
        case 4: CALL(4); break;  \
        case 5: CALL(5); break;  \
        default: CALL(6);        \
    }

// Where the 8-key groups of the tile at `tile_key` lie: K's, then V's. Groups without a key in [begin, end) repeat a
// valid one: their block may be gone (behind a window) or not be there yet.
template <class T>
void find_groups(const AttentionArgs& a, const AttentionTile& t, int tile_key, int begin, int end, const T** groups) {
    const int first = (begin - tile_key) / kKeyGroup, last = (end - 1 - tile_key) / kKeyGroup;
    const int key = tile_key + first * kKeyGroup;
    const int32_t* block = a.block_table + t.seq * a.table_stride + key / a.block_size;
    int offset = key % a.block_size;
    const T** k = groups;
    const T** v = groups + kGroups;
    for (int g = first; g <= last; ++g) {
        const int64_t row = (static_cast<int64_t>(*block) * a.num_kv_heads + t.kv_head) * a.block_size + offset;
        k[g] = static_cast<const T*>(a.k_cache) + row * a.head_dim;
        v[g] = static_cast<const T*>(a.v_cache) + row * a.v_dim;
        offset += kKeyGroup;
        if (offset == a.block_size) {
            offset = 0;
            ++block;
        }
    }
    for (int g = 0; g < kGroups; ++g) {
        const int valid = g < first ? first : g > last ? last : g;
        k[g] = k[valid];
        v[g] = v[valid];
    }
}

template <class T>
void attend_keys(const AttentionArgs& a, const AttentionTile& t, int begin, int end, int last_key, const Scratch<T>& s,
                 SoftmaxState state) {
    const int rows = t.num_rows(), words = a.head_dim / Operand<T>::kPerWord, acc_stride = padded(a.v_dim);
    const float scale = a.scale * kLog2e;
    for (int r = 0; r < rows; ++r) {
        state.max[r] = kMinusInfinity;
        state.sum[r] = 0;
    }
    std::memset(state.acc, 0, static_cast<size_t>(rows) * acc_stride * sizeof(float));

    const T* groups[2][2 * kGroups];  // of this tile and of the next: K, then V
    const auto find = [&](int tile_key, int side) {
        const int first = begin > tile_key ? begin : tile_key;
        const int last = last_key < tile_key + kKeyTile ? last_key : tile_key + kKeyTile;
        find_groups(a, t, tile_key, first, last, groups[side]);
    };
    const int row_groups = (rows + kRowTile - 1) / kRowTile;
    const int columns = (a.v_dim + kChunkTile * kChunk - 1) / (kChunkTile * kChunk);
    const int num_steps = words + row_groups * (words * kKeyVectors / kVectorTile + kKeyTile / Operand<T>::kPerWord * columns);
    const int group_bytes = kKeyGroup * static_cast<int>(sizeof(T));
    int tile_key = begin / kKeyTile * kKeyTile;
    find(tile_key, 0);
    for (int side = 0; tile_key < end; tile_key += kKeyTile, side ^= 1) {
        const T* const* k = groups[side];
        const T* const* v = k + kGroups;
        Lookahead ahead;
        if (tile_key + kKeyTile < last_key) {
            find(tile_key + kKeyTile, side ^ 1);
            ahead = Lookahead(reinterpret_cast<const void* const*>(groups[side ^ 1]), group_bytes * a.head_dim, group_bytes * a.v_dim, num_steps);
        }
        const int lo = begin > tile_key ? begin - tile_key : 0;
        const int hi = (end < tile_key + kKeyTile ? end : tile_key + kKeyTile) - tile_key;
        for (int g = 0; g * kKeyGroup < hi; g += 2)
            pack_keys<T>(k[g], k[g + 1], a.head_dim, ahead, s.keys + g * kKeyGroup);
        for_row_groups(rows, [&](int row, int count) {
#define AFD_SCORE(R) score_rows<T, R>(s.q + row * words, s.keys, words, ahead, s.scores + row * kKeyTile)
            AFD_BY_ROWS(count, AFD_SCORE)
#undef AFD_SCORE
        });
        for (int r = 0; r < rows; ++r) {
            const int position = t.first_position + r / t.num_heads;
            const int row_end = position + 1 - tile_key < hi ? position + 1 - tile_key : hi;
            const int row_begin = a.window > 0 && position + 1 - a.window > tile_key + lo
                                      ? position + 1 - a.window - tile_key : lo;
            s.factors[r] = soften_row<T>(s.scores + r * kKeyTile, row_begin, row_end, scale, state.max + r, state.sum + r);
        }
        for (int column = 0; column < a.v_dim; column += kChunkTile * kChunk)
            for_row_groups(rows, [&](int row, int count) {
#define AFD_ACCUMULATE_ROWS(R)                                                                                        \
    accumulate_rows<T, R>(v, lo, hi, a.v_dim, column, ahead,                     \
                          s.scores + row * kKeyTile, s.factors + row, state.acc + row * acc_stride, acc_stride)
                AFD_BY_ROWS(count, AFD_ACCUMULATE_ROWS)
#undef AFD_ACCUMULATE_ROWS
            });
    }
}

// into = the softmax over the keys of both.
inline void merge_states(const AttentionArgs& a, int num_rows, SoftmaxState into, SoftmaxState from) {
    const int stride = padded(a.v_dim);
    for (int r = 0; r < num_rows; ++r) {
        if (from.max[r] == kMinusInfinity) continue;  // the row sees no key of `from`
        const float max = into.max[r] > from.max[r] ? into.max[r] : from.max[r];
        const float x = exp2_of(into.max[r] - max), y = exp2_of(from.max[r] - max);
        into.max[r] = max;
        into.sum[r] = into.sum[r] * x + from.sum[r] * y;
        float* p = into.acc + r * stride;
        const float* q = from.acc + r * stride;
        for (int i = 0; i < stride; i += kLanes)
            store_vector(p + i, load_vector<Vf>(p + i) * x + load_vector<Vf>(q + i) * y);
    }
}

template <class T>
void attend_chunks(const AttentionArgs& a, const AttentionTile& t, int begin, int end, SoftmaxState state, void* memory) {
    const Scratch<T> scratch(a, memory);
    load_queries<T>(a, t, scratch.q);
    const int item_end = end * kChunkKeys < t.key_end ? end * kChunkKeys : t.key_end;
    for (int chunk = begin; chunk < end; ++chunk) {
        const int first = chunk * kChunkKeys, last = first + kChunkKeys;
        attend_keys<T>(a, t, first > t.key_begin ? first : t.key_begin, last < item_end ? last : item_end, item_end, scratch,
                       chunk == begin ? state : scratch.chunk);
        if (chunk != begin) merge_states(a, t.num_rows(), state, scratch.chunk);
    }
}

template <class T>
void write_rows(const AttentionArgs& a, const AttentionTile& t, SoftmaxState state) {
    const int stride = padded(a.v_dim);
    for (int r = 0; r < t.num_rows(); ++r) {
        T* out = static_cast<T*>(a.out) + (t.token_begin + r / t.num_heads) * a.out_stride +
                 static_cast<int64_t>(t.head_begin + r % t.num_heads) * a.v_dim;
        const float inverse = 1.0f / state.sum[r];
        for (int i = 0; i < a.v_dim; i += kChunk) {
            const float* p = state.acc + r * stride + i;
            const Chunk c = {load_vector<Vf>(p) * inverse, load_vector<Vf>(p + kLanes) * inverse};
            if (i + kChunk <= a.v_dim)
                store(out + i, c);
            else
                store_part(out + i, c, a.v_dim - i);
        }
    }
}

}  // namespace AFD_ISA
