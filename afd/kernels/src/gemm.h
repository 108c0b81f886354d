// out[m, n] = x[m, k] . w[n, k], bf16 in, float32 sums, over weights packed for it.
//
// Packed: each panel of kPanel rows of w (the last one perhaps narrower) is transposed in its place, two k together:
// [k / 2][rows of the panel][2]. A vector then holds one pair of k for kLanes outputs and meets the same pair of x
// broadcast, so sums need no horizontal step. A panel is read from memory once and stays in the L2 cache while all of x
// passes. Each output is summed in the order of k, for any m and any split of the work.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace AFD_ISA {

using afd::kPanel;

constexpr int kTileVectors = AFD_LANES == 16 ? 4 : 2;  // vectors of outputs, held in registers against
constexpr int kTileRows = AFD_LANES == 16 ? 6 : 4;     // so many rows of x
constexpr int kTileColumns = kTileVectors * kLanes;
constexpr int kAheadBytes = 8192;  // weights come from memory in one sweep: fetched so far ahead of it

AFD_INLINE Vi splat_pair(const bf16* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof word);
    return Vi{} + word;
}

// acc[r][v] = the dot products of R rows of x with V vectors of columns. `panel` points at the first of these columns;
// its pairs of k are `width` columns apart. The last vector has `valid` columns (whole vectors are loaded if Whole).
template <int R, int V, bool Whole>
AFD_INLINE void multiply(const bf16* panel, int width, int valid, bool from_memory, const bf16* x, int64_t x_stride,
                         int k, Vf (*acc)[V]) {
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) acc[r][v] = Vf{};
    for (int i = 0; i < k; i += 2) {
        const bf16* const from = panel + static_cast<int64_t>(i) * width;
        Vi weights[V];
        for (int v = 0; v < V; ++v) {
            const bf16* const p = from + v * 2 * kLanes;
            if (from_memory) prefetch(reinterpret_cast<const char*>(p) + kAheadBytes);
            weights[v] = Whole ? load_vector<Vi>(p) : load_words(p, valid);
        }
        for (int r = 0; r < R; ++r) {
            const Vi pair = splat_pair(x + r * x_stride + i);
            for (int v = 0; v < V; ++v) acc[r][v] = dot_words(acc[r][v], weights[v], pair);
        }
    }
}

// What happens to a sum: rounded to bf16, kept, or added to what is there.
struct ToBf16 {
    typedef bf16 Out;
    static AFD_INLINE void put(bf16* out, Vf a, Vf b) { store(out, split_pairs(Chunk{a, b})); }
    static AFD_INLINE void put(bf16* out, float sum) { from_float(sum, out); }
};
struct ToFloat {
    typedef float Out;
    static AFD_INLINE void put(float* out, Vf a, Vf b) { store(out, Chunk{a, b}); }
    static AFD_INLINE void put(float* out, float sum) { *out = sum; }
};
struct AddToFloat {
    typedef float Out;
    static AFD_INLINE void put(float* out, Vf a, Vf b) {
        const Chunk old = load(out);
        store(out, Chunk{old.a + a, old.b + b});
    }
    static AFD_INLINE void put(float* out, float sum) { *out += sum; }
};

// R rows against one panel of `width` columns.
template <int R, class Put>
void multiply_panel(const bf16* panel, int width, bool from_memory, const bf16* x, int64_t x_stride, int k,
                    typename Put::Out* out, int64_t out_stride) {
    int column = 0;
    for (; column + kTileColumns <= width; column += kTileColumns) {
        Vf acc[R][kTileVectors];
        multiply<R, kTileVectors, true>(panel + 2 * column, width, kLanes, from_memory, x, x_stride, k, acc);
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < kTileVectors; v += 2)
                Put::put(out + r * out_stride + column + v * kLanes, acc[r][v], acc[r][v + 1]);
    }
    for (; column < width; column += kLanes) {
        const int valid = width - column < kLanes ? width - column : kLanes;
        Vf acc[R][1];
        multiply<R, 1, false>(panel + 2 * column, width, valid, from_memory, x, x_stride, k, acc);
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < valid; ++i) Put::put(out + r * out_stride + column + i, acc[r][0][i]);
    }
}

// Columns [n_begin, n_end); n_begin is a multiple of kPanel.
template <class Put>
void gemm(const afd::GemmArgs& a, int n_begin, int n_end) {
    const bf16* const x = static_cast<const bf16*>(a.x);
    typename Put::Out* const out = static_cast<typename Put::Out*>(a.out);
    const int groups = (a.m + kTileRows - 1) / kTileRows;
    for (int n = n_begin; n < n_end; n += kPanel) {
        const bf16* const panel = static_cast<const bf16*>(a.w) + static_cast<int64_t>(n) * a.k;
        const int width = a.n - n < kPanel ? a.n - n : kPanel;
        for (int group = 0, row = 0; group < groups; ++group) {
            const int count = (a.m - row + groups - group - 1) / (groups - group);
            const bf16* const from = x + row * a.x_stride;
            typename Put::Out* const to = out + row * a.out_stride + n;
#define AFD_PANEL(R)                                                                                  \
    case R:                                                                                           \
        multiply_panel<R, Put>(panel, width, group == 0, from, a.x_stride, a.k, to, a.out_stride); \
        break;
            switch (count) {
                AFD_PANEL(1)
                AFD_PANEL(2)
                AFD_PANEL(3)
                AFD_PANEL(4)
#if AFD_LANES == 16
                AFD_PANEL(5)
                AFD_PANEL(6)
#endif
            }
#undef AFD_PANEL
            row += count;
        }
    }
}

}  // namespace AFD_ISA
