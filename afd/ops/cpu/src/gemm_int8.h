// out[m, n] = x[m, k] . w[n, k] over int8 weights with a scale for each of w's rows, without VNNI: integer sums, scaled at
// the end.
//
// x is rounded too: each row to int16, with a scale of its own, to integers so large that no sum of k products with
// weights of -127 to 127 can leave an int32. They have 15 bits up to k = 516 and 9 bits at k = 32768, beside 7 of the
// weights: what an output is off by is the weights' rounding. Sums are exact, so the same for any order, instruction set
// and split of the work.
//
// Packed: panels of kInt8Panel rows of w, transposed, two k together: [k / 2][rows][2], with zeros where the last panel
// or the last four k are not full; scales likewise. A vector of pairs of w, widened to int16, meets a pair of x broadcast.
#pragma once

#include "gemm.h"
#include "kernels.h"
#include "rounding.h"

namespace AFD_ISA {

using afd::kInt8Panel;

constexpr int kInt8Rows = 6;  // rows of x in a tile

// Vectors of outputs in a tile of so many rows: with few, one tile sweeps over a whole panel.
constexpr int int8_vectors(int rows) { return rows > 2 ? 2 : 4; }

// Rows of x rounded to integers, each with its scale.
struct Rounded {
    int64_t num_pairs;  // of a row
    int32_t* pairs;     // [m, num_pairs] of int16
    float* scales;      // [m]
    Rounded(void* memory, int m, int k)
        : num_pairs(afd::int8_depth(k) / 2),
          pairs(static_cast<int32_t*>(memory)),
          scales(reinterpret_cast<float*>(pairs + m * num_pairs)) {}
    static size_t bytes(int m, int k) { return sizeof(int32_t) * m * (afd::int8_depth(k) / 2 + 1); }
};

// kLanes pairs of int8 as pairs of int16.
AFD_INLINE Vi load_int8_pairs(const int8_t* p) {
#if AFD_LANES == 8
    return (Vi)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    typedef int8_t Narrow __attribute__((vector_size(AFD_LANES * 2)));
    typedef int16_t Wide __attribute__((vector_size(AFD_LANES * 4)));
    return (Vi)__builtin_convertvector(load_vector<Narrow>(p), Wide);
#endif
}

// sums + the dot product of the pairs of int16 in each word of x and y.
AFD_INLINE Vi add_dot_pairs(Vi sums, Vi x, Vi y) {
#if AFD_LANES == 8
    return sums + (Vi)_mm256_madd_epi16((__m256i)x, (__m256i)y);
#else
    return sums + (x >> 16) * (y >> 16) + ((x << 16) >> 16) * ((y << 16) >> 16);
#endif
}

// Writes the pairs of a row -> its scale. A row with an infinity or a NaN becomes zeros and NaN.
AFD_INLINE float round_row(const bf16* x, int k, int32_t* to) {
    const int64_t limit = 0x7fffffff / (127 * static_cast<int64_t>(k > 0 ? k : 1));
    const float most = static_cast<float>(limit < 0x7fff ? limit : 0x7fff);
    const Scaling scaling = scaling_of(x, k, most);
    const Vf factor = splat(scaling.factor);
    for (int i = 0; i < k; i += kChunk) {
        const int pairs = k - i < kChunk ? (afd::int8_depth(k) - i) / 2 : kLanes;
        const Chunk c = k - i < kChunk ? load_part(x + i, k - i) : load(x + i);
        const Vi rounded = scaling.finite ? nearest_pairs(c, factor) : Vi{};
        for (int pair = 0; pair < pairs; ++pair) to[i / 2 + pair] = rounded[pair];
    }
    return scaling.scale;
}

inline void round_rows(const afd::GemmArgs& a, void* memory, int row_begin, int row_end) {
    const Rounded rounded(memory, a.m, a.k);
    for (int row = row_begin; row < row_end; ++row)
        rounded.scales[row] =
            round_row(static_cast<const bf16*>(a.x) + row * a.x_stride, a.k, rounded.pairs + row * rounded.num_pairs);
}

// Rows [row, row + R) of x against V vectors of columns.
template <int R, int V, class Put>
void int8_tile(const afd::GemmArgs& a, const Rounded& rows, int row, int column) {
    const int k = afd::int8_depth(a.k);
    const int8_t* const panel = static_cast<const int8_t*>(a.w.data) +
                                static_cast<int64_t>(column / kInt8Panel) * kInt8Panel * k +
                                2 * (column % kInt8Panel);
    const int32_t* x = rows.pairs + row * rows.num_pairs;
    Vi sums[R][V];
    AFD_UNROLL
    for (int r = 0; r < R; ++r)
        AFD_UNROLL
        for (int v = 0; v < V; ++v) sums[r][v] = Vi{};
    const int8_t* const end = panel + static_cast<int64_t>(k) * kInt8Panel;
    for (const int8_t* from = panel; from < end; from += 2 * kInt8Panel, ++x) {
        prefetch(from + kAheadBytes);
        Vi weights[V];
        AFD_UNROLL
        for (int v = 0; v < V; ++v) weights[v] = load_int8_pairs(from + v * 2 * kLanes);
        AFD_UNROLL
        for (int r = 0; r < R; ++r) {
            const Vi pair = Vi{} + x[r * rows.num_pairs];
            AFD_UNROLL
            for (int v = 0; v < V; ++v) sums[r][v] = add_dot_pairs(sums[r][v], weights[v], pair);
        }
    }
    const int valid = a.n - column;
    AFD_UNROLL
    for (int r = 0; r < R; ++r) {
        typename Put::Out* const out = static_cast<typename Put::Out*>(a.out) + (row + r) * a.out_stride + column;
        const Vf row_scale = splat(rows.scales[row + r]);
        AFD_UNROLL
        for (int v = 0; v < V; v += 2) {
            Vf scaled[2];
            AFD_UNROLL
            for (int i = 0; i < 2; ++i)
                scaled[i] = __builtin_convertvector(sums[r][v + i], Vf) *
                            (row_scale * load_vector<Vf>(a.w.scales + column + (v + i) * kLanes));
            const int left = valid - v * kLanes;
            if (left >= 2 * kLanes)
                Put::put(out + v * kLanes, scaled[0], scaled[1]);
            else
                for (int i = 0; i < left; ++i) Put::put(out + v * kLanes + i, scaled[i / kLanes][i % kLanes]);
        }
    }
}

// `count` rows, at most R, against one panel.
template <int R, class Put>
void int8_panel(const afd::GemmArgs& a, const Rounded& rows, int row, int count, int column) {
    if constexpr (R > 1)
        if (count < R) return int8_panel<R - 1, Put>(a, rows, row, count, column);
    constexpr int kVectors = int8_vectors(R);
    const int end = a.n < column + kInt8Panel ? a.n : column + kInt8Panel;
    for (; column < end; column += kVectors * kLanes) int8_tile<R, kVectors, Put>(a, rows, row, column);
}

// Columns [n_begin, n_end); n_begin is a multiple of kInt8Panel.
template <class Put>
void gemm_int8(const afd::GemmArgs& a, const void* memory, int n_begin, int n_end) {
    const Rounded rounded(const_cast<void*>(memory), a.m, a.k);
    const RowGroups groups(a.m, kInt8Rows);
    for (int column = n_begin; column < n_end; column += kInt8Panel)
        for (int group = 0; group < groups.num; ++group) {
            const int row = groups.begin(group);
            int8_panel<kInt8Rows, Put>(a, rounded, row, groups.begin(group + 1) - row, column);
        }
}

}  // namespace AFD_ISA
