// out[m, n] = x[m, k] . w[n, k], bf16 in, float32 sums, over weights packed for it.
//
// Packed: each panel of kPanel rows of w (the last one perhaps narrower) is transposed in its place, two k together:
// [k / 2][rows of the panel][2]. A vector then holds one pair of k for kLanes outputs and meets the same pair of x
// broadcast, so sums need no horizontal step. A panel is read from memory once and stays in the L2 cache while all of x
// passes; meanwhile the next one is fetched. Each output is summed in the order of k, for any m and any split of the work.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace AFD_ISA {

using afd::kPanel;

// Rows of x against one pass over a panel. AVX2: six fit its registers too, but ran at half the speed on Zen 3.
constexpr int kTileRows = AFD_LANES == 16 ? 6 : AFD_LANES == 8 ? 5 : 4;
constexpr int kAheadBytes = 8192;  // of a panel that is used once

// What is fetched from memory while something else is computed: so many bytes at each step of the innermost loop.
struct Fetch {
    const char* at;
    int bytes;

    AFD_INLINE void step() {
        if (bytes == 0) return;
        prefetch(at);
        if (bytes > 64) prefetch(at + 64);
        if (bytes > 128) {
            prefetch(at + 128);
            prefetch(at + 192);
        }
        at += bytes;
    }
};

// Vectors of outputs held in registers against R rows of x: enough sums at a time to hide an addition's latency.
constexpr int tile_vectors(int R) {
    if (AFD_LANES == 16) return 4;
    return R == 1 ? 8 : R == 2 ? 4 : 2;
}

template <bool Whole>
AFD_INLINE Vi load_weights(const bf16* from, int v, int valid) {
    const bf16* const p = from + v * 2 * kLanes;
    return Whole ? load_vector<Vi>(p) : load_words(p, valid);
}

#if AFD_BF16_DOT

// Rows of x as they are: pairs of k are broadcast to the dot product.
template <int R>
struct Rows {
    const bf16* x;
    int64_t stride;
    Rows(const bf16* x, int64_t stride, int) : x(x), stride(stride) {}
};
constexpr int kBlock = 1 << 30;  // elements of k that a Rows holds: all

template <int R, int V, bool Whole>
AFD_INLINE void multiply(const bf16* from, int valid, const Rows<R>& rows, int i, Vf (&sums)[R][V]) {
    Vi weights[V];
    for (int v = 0; v < V; ++v) weights[v] = load_weights<Whole>(from, v, valid);
    for (int r = 0; r < R; ++r) {
        int32_t word;
        __builtin_memcpy(&word, rows.x + r * rows.stride + i, sizeof word);
        for (int v = 0; v < V; ++v) sums[r][v] = dot_words(sums[r][v], weights[v], Vi{} + word);
    }
}

#else

constexpr int kBlock = 256;  // elements of k that a Rows holds: five rows of floats leave most of the L1 cache to weights

// Rows of x in float32, even elements apart from odd ones: then a multiplication needs a broadcast load and nothing else.
template <int R>
struct Rows {
    float even[R][kBlock / 2], odd[R][kBlock / 2];
    Rows(const bf16* x, int64_t stride, int count) {
        for (int r = 0; r < R; ++r) {
            const bf16* const row = x + r * stride;
            int i = 0;
            for (; i + kChunk <= count; i += kChunk) {
                const Chunk c = load(row + i);
                store_vector(even[r] + i / 2, c.a);
                store_vector(odd[r] + i / 2, c.b);
            }
            for (; i < count; i += 2) {
                even[r][i / 2] = to_float(row[i]);
                odd[r][i / 2] = to_float(row[i + 1]);
            }
        }
    }
};

template <int R, int V, bool Whole>
AFD_INLINE void multiply(const bf16* from, int valid, const Rows<R>& rows, int i, Vf (&sums)[R][V]) {
    Vf w[V];
    for (int v = 0; v < V; ++v) w[v] = even_elements(load_weights<Whole>(from, v, valid));
    for (int r = 0; r < R; ++r) {
        const Vf x = splat(rows.even[r][i / 2]);
        for (int v = 0; v < V; ++v) sums[r][v] += w[v] * x;
    }
    asm("" : "+r"(from));  // weights are loaded again: there is no register to keep them in
    for (int v = 0; v < V; ++v) w[v] = odd_elements(load_weights<Whole>(from, v, valid));
    for (int r = 0; r < R; ++r) {
        const Vf x = splat(rows.odd[r][i / 2]);
        for (int v = 0; v < V; ++v) sums[r][v] += w[v] * x;
    }
}

#endif

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

// sums [R, kPanel] += the products of R rows with V vectors of columns from `column` on, over the `count` elements of k in
// `rows`. `panel` points at the first of these; its pairs of k are `width` columns apart. The last vector has `valid`
// columns (whole vectors are loaded if Whole).
template <int R, int V, bool Whole>
AFD_INLINE void multiply_tile(const bf16* panel, int width, int column, int valid, Fetch& fetch, const Rows<R>& rows,
                              int count, float (&sums)[R][kPanel]) {
    Fetch ahead = fetch;
    Vf acc[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) acc[r][v] = load_vector<Vf>(sums[r] + column + v * kLanes);
    for (int i = 0; i < count; i += 2) {
        const bf16* const from = panel + static_cast<int64_t>(i) * width + 2 * column;
        ahead.step();
        multiply<R, V, Whole>(from, valid, rows, i, acc);
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store_vector(sums[r] + column + v * kLanes, acc[r][v]);
    fetch = ahead;
}

#if AFD_BF16_DOT
// R rows against a whole panel, whose sums go from the registers straight to the output. At each step of k the line at
// `next` is fetched, which moves on by `stride`, at most a line: no branch, where one costs 3 % of a GEMM.
template <int R, class Put>
void multiply_whole_panel(const bf16* panel, const char* next, int stride, const bf16* x, int64_t x_stride, int k,
                          typename Put::Out* out, int64_t out_stride) {
    constexpr int V = kPanel / kLanes;
    static_assert(V == tile_vectors(R), "there are registers for so many");
    const Rows<R> rows(x, x_stride, k);
    Vf acc[R][V] = {};
    for (int i = 0; i < k; i += 2) {
        prefetch(next);
        next += stride;
        multiply<R, V, true>(panel + static_cast<int64_t>(i) * kPanel, kLanes, rows, i, acc);
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; v += 2) Put::put(out + r * out_stride + v * kLanes, acc[r][v], acc[r][v + 1]);
}
#endif

// R rows against one panel of `width` columns. Fetches fetch_bytes from `next` on meanwhile.
template <int R, class Put>
void multiply_panel(const bf16* panel, int width, const char* next, int64_t fetch_bytes, const bf16* x, int64_t x_stride,
                    int k, typename Put::Out* out, int64_t out_stride) {
#if AFD_BF16_DOT
    if (width == kPanel && fetch_bytes <= 32 * k) {
        const int stride = fetch_bytes > 0 ? static_cast<int>((2 * fetch_bytes + k - 1) / k) : 0;
        const char* const first = fetch_bytes > 0 ? next : reinterpret_cast<const char*>(panel);
        multiply_whole_panel<R, Put>(panel, first, stride, x, x_stride, k, out, out_stride);
        return;
    }
#endif
    constexpr int V = tile_vectors(R);
    const int64_t num_steps = static_cast<int64_t>((width + V * kLanes - 1) / (V * kLanes)) * (k / 2);
    Fetch fetch{next, fetch_bytes == 0 ? 0 : static_cast<int>((fetch_bytes + num_steps - 1) / num_steps)};
    alignas(64) float sums[R][kPanel] = {};
    for (int begin = 0; begin < k; begin += kBlock) {
        const int count = k - begin < kBlock ? k - begin : kBlock;
        const bf16* const from = panel + static_cast<int64_t>(begin) * width;
        const Rows<R> rows(x + begin, x_stride, count);
        int column = 0;
        for (; column + V * kLanes <= width; column += V * kLanes)
            multiply_tile<R, V, true>(from, width, column, kLanes, fetch, rows, count, sums);
        for (; column < width; column += kLanes) {
            const int valid = width - column < kLanes ? width - column : kLanes;
            multiply_tile<R, 1, false>(from, width, column, valid, fetch, rows, count, sums);
        }
    }
    for (int r = 0; r < R; ++r) {
        typename Put::Out* const to = out + r * out_stride;
        int column = 0;
        for (; column + kChunk <= width; column += kChunk)
            Put::put(to + column, load_vector<Vf>(sums[r] + column), load_vector<Vf>(sums[r] + column + kLanes));
        for (; column < width; ++column) Put::put(to + column, sums[r][column]);
    }
}

// Columns [n_begin, n_end); n_begin is a multiple of kPanel.
template <class Put>
void gemm(const afd::GemmArgs& a, int n_begin, int n_end) {
    const bf16* const x = static_cast<const bf16*>(a.x);
    typename Put::Out* const out = static_cast<typename Put::Out*>(a.out);
    const int groups = (a.m + kTileRows - 1) / kTileRows;
    for (int n = n_begin; n < n_end; n += kPanel) {
        const bf16* const panel = static_cast<const bf16*>(a.w.data) + static_cast<int64_t>(n) * a.k;
        const int width = a.n - n < kPanel ? a.n - n : kPanel;
        // With one pass over a panel, what comes a little later in it; else the next panel, a part at each pass. Another
        // thread may compute that one: then it is in a cache near by.
        const int64_t bytes = 2 * static_cast<int64_t>(width) * a.k;
        const bool last = n + width == a.n;
        const char* next = reinterpret_cast<const char*>(panel) + (groups == 1 ? kAheadBytes : bytes);
        if (groups > 1 && last) next = static_cast<const char*>(a.after);
        const int64_t fetch_bytes = next == nullptr ? 0 : bytes / groups;
        for (int group = 0, row = 0; group < groups; ++group, next += fetch_bytes) {
            const int count = (a.m - row + groups - group - 1) / (groups - group);
            const bf16* const from = x + row * a.x_stride;
            typename Put::Out* const to = out + row * a.out_stride + n;
#define AFD_PANEL(R)                                                                                  \
    case R:                                                                                           \
        multiply_panel<R, Put>(panel, width, next, fetch_bytes, from, a.x_stride, a.k, to, a.out_stride); \
        break;
            switch (count) {
                AFD_PANEL(1)
                AFD_PANEL(2)
                AFD_PANEL(3)
                AFD_PANEL(4)
#if AFD_LANES >= 8
                AFD_PANEL(5)
#endif
#if AFD_LANES == 16
                AFD_PANEL(6)
#endif
            }
#undef AFD_PANEL
            row += count;
        }
    }
}

}  // namespace AFD_ISA
