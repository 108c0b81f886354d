// The three stages of attention over one tile of keys: pack K, score, accumulate V (see attention.h).
#pragma once

#include "kernels.h"
#include "lookahead.h"
#include "simd.h"

namespace AFD_ISA {

using afd::AttentionArgs;
using afd::AttentionTile;
using afd::kChunkKeys;
using afd::kKeyGroup;
using afd::kMaxRows;
using afd::SoftmaxState;

constexpr int kMaxKeys = 64;                         // keys scored at once: `Keys` below is this or half of it
constexpr int kRowTile = 6;                          // rows held in registers,
// times this many chunks of values,
template <int R>
constexpr int kChunkTile = AFD_LANES == 16 || R <= 3 ? 2 : 1;
constexpr int kStrip = 2 * kChunk;                   // out of a strip of columns.
// Vectors of keys held against kRowTile rows: all of a tile with AVX-512, two elsewhere.
template <int Keys>
constexpr int kVectorTile = AFD_LANES == 16 ? Keys / kLanes : 2;
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kMinusInfinity = -__builtin_inff();

// The two products in terms of what the instruction set multiplies. Word: an element of a query, of a transposed key,
// of a row of weights. Values: V of kPerWord keys, ready to be multiplied by one word of weights.
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
        Vi even,
            odd;  // dimension 2 i, 2 i + 1 of the first key in the lower half of word i, of the second in the upper
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

AFD_INLINE int padded(int dim) { return (dim + kChunk - 1) / kChunk * kChunk; }

// ---- pack ----------------------------------------------------------------------------------------------------

#if AFD_LANES == 16
// 16 keys x `words` 32-bit words -> out[word][Keys], 4 words at a time. low, high: keys 0-7 and 8-15.
template <int Keys>
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
        const __m512i ab_low = _mm512_unpacklo_epi32(rows[0], rows[1]),
                      ab_high = _mm512_unpackhi_epi32(rows[0], rows[1]);
        const __m512i cd_low = _mm512_unpacklo_epi32(rows[2], rows[3]),
                      cd_high = _mm512_unpackhi_epi32(rows[2], rows[3]);
        int32_t* p = out + w * Keys;
        _mm512_storeu_si512(p, _mm512_unpacklo_epi64(ab_low, cd_low));
        _mm512_storeu_si512(p + Keys, _mm512_unpackhi_epi64(ab_low, cd_low));
        _mm512_storeu_si512(p + 2 * Keys, _mm512_unpacklo_epi64(ab_high, cd_high));
        _mm512_storeu_si512(p + 3 * Keys, _mm512_unpackhi_epi64(ab_high, cd_high));
    }
}

template <class T, int Keys>
AFD_INLINE void pack_keys(const T* low, const T* high, int head_dim, Lookahead& ahead, typename Operand<T>::Word* out) {
    static_assert(sizeof(typename Operand<T>::Word) == 4, "the transpose moves 32-bit words");
    transpose_keys<Keys>(reinterpret_cast<const int32_t*>(low), reinterpret_cast<const int32_t*>(high),
                         head_dim / Operand<T>::kPerWord, ahead, reinterpret_cast<int32_t*>(out));
}
#else
AFD_INLINE void transpose4(Quad& a, Quad& b, Quad& c, Quad& d) {
    const Quad ab_low = AFD_SHUFFLE(Vi4, a, b, 0, 4, 1, 5), ab_high = AFD_SHUFFLE(Vi4, a, b, 2, 6, 3, 7);
    const Quad cd_low = AFD_SHUFFLE(Vi4, c, d, 0, 4, 1, 5), cd_high = AFD_SHUFFLE(Vi4, c, d, 2, 6, 3, 7);
    a = AFD_SHUFFLE(Vi4, ab_low, cd_low, 0, 1, 4, 5);
    b = AFD_SHUFFLE(Vi4, ab_low, cd_low, 2, 3, 6, 7);
    c = AFD_SHUFFLE(Vi4, ab_high, cd_high, 0, 1, 4, 5);
    d = AFD_SHUFFLE(Vi4, ab_high, cd_high, 2, 3, 6, 7);
}

template <int Keys>
AFD_INLINE void store_keys(float* out, int word, Quad q, const float*) {
    store_vector(out + word * Keys, q);
}
template <int Keys>
AFD_INLINE void store_keys(float* out, int word, Quad q, const bf16*) {
    const Vi4 words = (Vi4)q;
    store_vector(out + 2 * word * Keys, words << 16);
    store_vector(out + (2 * word + 1) * Keys, words & (int32_t)0xffff0000u);
}

template <class T, int Keys>
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
            store_keys<Keys>(out + 4 * quarter, w, a, low);
            store_keys<Keys>(out + 4 * quarter, w + 1, b, low);
            store_keys<Keys>(out + 4 * quarter, w + 2, c, low);
            store_keys<Keys>(out + 4 * quarter, w + 3, d, low);
        }
    }
}
#endif

// ---- score ---------------------------------------------------------------------------------------------------

// scores[r][key] = q[r] . k[key] for R rows and all keys of the tile.
template <class T, int Keys, int R>
void score_rows(const typename Operand<T>::Word* q, const typename Operand<T>::Word* keys, int words,
                Lookahead& lookahead, float* scores) {
    constexpr int kTile = kVectorTile<Keys>;
    Lookahead ahead = lookahead;
    for (int first = 0; first < Keys / kLanes; first += kTile) {
        Vf acc[R][kTile] = {};
        const typename Operand<T>::Word* k = keys + first * kLanes;
        for (int w = 0; w < words; ++w, k += Keys) {
            ahead.step();
            for (int r = 0; r < R; ++r)
                for (int j = 0; j < kTile; ++j)
                    acc[r][j] = Operand<T>::dot(acc[r][j], q[r * words + w], k + j * kLanes);
        }
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < kTile; ++j) store_vector(scores + r * Keys + (first + j) * kLanes, acc[r][j]);
    }
    lookahead = ahead;
}

// Prefetches for a key in score_direct: as many as it has lines.
template <class T>
AFD_INLINE int direct_steps(int head_dim) {
    return (head_dim * static_cast<int>(sizeof(T)) + 63) / 64;
}

// The same without a transpose: a row and a key are multiplied as they lie, and the lanes of the product added up at the
// end. q: in the lane order of a chunk of keys. Only the first num_keys are scored.
template <class T, int Keys, int R>
void score_direct(const float* q, const T* const* groups, int num_keys, int head_dim, Lookahead& lookahead,
                  float* scores) {
    const int steps = direct_steps<T>(head_dim);
    Vf products[R][Keys];
    Lookahead ahead = lookahead;
    for (int key = 0; key < num_keys; key += 2) {
        const T* k = groups[key / kKeyGroup] + (key % kKeyGroup) * head_dim;
        for (int i = 0; i < 2 * steps; ++i) ahead.step();
        Vf acc[R][2] = {};
        for (int i = 0; i < head_dim; i += kChunk) {
            const Chunk first = load(k + i), second = load(k + head_dim + i);
            for (int r = 0; r < R; ++r) {
                const Chunk loaded = load(q + r * head_dim + i), x = {load_once(loaded.a), load_once(loaded.b)};
                acc[r][0] += x.a * first.a;
                acc[r][1] += x.a * second.a;
                acc[r][0] += x.b * first.b;
                acc[r][1] += x.b * second.b;
            }
        }
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < 2; ++j) products[r][key + j] = acc[r][j];
    }
    lookahead = ahead;
    for (int r = 0; r < R; ++r)
        for (int key = 0; key < num_keys; key += kLanes)
            store_vector(scores + r * Keys + key, lane_sums(products[r] + key));
}

// Turns one row's scores into weights, in place, keys outside [begin, end) of the tile into zeros. Returns the factor
// for what the row has accumulated so far.
template <class T, int Keys>
AFD_INLINE float soften_row(float* scores, int begin, int end, float scale, float* max, float* sum) {
    constexpr int kVectors = Keys / kLanes;
    Vf s[kVectors];
    if (begin >= end) {
        for (int j = 0; j < kVectors; ++j) store_vector(scores + j * kLanes, Vf{});
        return 1.0f;
    }
    for (int j = 0; j < kVectors; ++j) s[j] = load_vector<Vf>(scores + j * kLanes) * scale;
    if (begin > 0 || end < Keys)  // also replaces NaNs from memory behind the last key
        for (int j = 0; j < kVectors; ++j) {
            const Vi key = lane_index() + j * kLanes;
            s[j] = ((key >= begin) & (key < end)) ? s[j] : splat(kMinusInfinity);
        }
    Vf highest = s[0];
    for (int j = 1; j < kVectors; ++j) highest = max_of(highest, s[j]);
    const float tile_max = max_lane(highest), old_max = *max;
    const float new_max = tile_max > old_max ? tile_max : old_max;
    Vf total = {};
    typename Operand<T>::Word* weights = reinterpret_cast<typename Operand<T>::Word*>(scores);
    for (int j = 0; j < kVectors; j += 2)
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
template <class T, int Keys, int R, int C, bool Tail>
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
            for (int c = 0; c < C; ++c) {
                const float* w = read_again(weights);
                const typename Op::Values values =
                    Tail && c == C - 1 ? Op::load_values_part(first + c * kChunk, second + c * kChunk, tail)
                                       : Op::load_values(first + c * kChunk, second + c * kChunk);
                for (int r = 0; r < R; ++r) {
                    typename Op::Word weight;
                    __builtin_memcpy(&weight, w + r * Keys + key / Op::kPerWord, sizeof weight);
                    sums[r][c] = Op::weigh(sums[r][c], weight, values);
                }
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

// One strip of columns.
template <class T, int Keys, int R>
void accumulate_rows(const T* const* groups, int begin, int end, int v_dim, int strip, Lookahead& ahead,
                     const float* weights, const float* factors, float* acc, int acc_stride) {
    constexpr int kTile = kChunkTile<R>;
    const int strip_end = strip + kStrip < v_dim ? strip + kStrip : v_dim;
    for (int column = strip; column < strip_end; column += kTile * kChunk) {
        const int columns = v_dim - column, tail = columns % kChunk;
#define AFD_ACCUMULATE(C, TAIL) \
    accumulate<T, Keys, R, C, TAIL>(groups, begin, end, v_dim, column, tail, ahead, weights, factors, acc, acc_stride)
        if (columns >= kTile * kChunk)
            AFD_ACCUMULATE(kTile, false);
        else if (columns > kChunk)
            AFD_ACCUMULATE(kTile, true);
        else if (columns == kChunk)
            AFD_ACCUMULATE(1, false);
        else
            AFD_ACCUMULATE(1, true);
#undef AFD_ACCUMULATE
    }
}

}  // namespace AFD_ISA
