// out[m, n] = x[m, k] . w[n, k] over int8 weights with a scale for each of w's rows, with AVX-512 VNNI: four products of
// 8 bits are one instruction, twice as many as bf16 has.
//
// x is rounded too: kInt8Group elements of a row to int8, with a scale of their own, so that one that is large coarsens its
// neighbours only. Products of a group are summed exactly, groups in float32 in the order of k: an output depends neither on
// the batch nor on the split of the work.
//
// Packed: panels of kInt8Panel rows of w, transposed, four k together: [k / 4][rows][4], with zeros where the last panel or
// the last four are not full; scales likewise. The instruction multiplies unsigned by signed bytes: weights are 128 more than
// they mean, and a group's sum begins at -128 times that of its x.
#pragma once

#include "gemm.h"
#include "kernels.h"
#include "rounding.h"

namespace AFD_ISA {

AFD_INLINE int smaller(int a, int b) { return a < b ? a : b; }

using afd::kInt8Panel;

constexpr int kInt8Rows = 6;    // rows of x in a tile
constexpr int kInt8Group = 64;  // elements of a row of x with one scale

// Rows of x rounded.
struct Rounded {
    int64_t num_words, num_groups;  // of a row
    int32_t* words;                 // [m, num_words] of four elements
    float* scales;                  // [m, num_groups]
    int32_t* first_sums;            // likewise
    Rounded(void* memory, int m, int k)
        : num_words(afd::int8_depth(k) / 4),
          num_groups((k + kInt8Group - 1) / kInt8Group),
          words(static_cast<int32_t*>(memory)),
          scales(reinterpret_cast<float*>(words + m * num_words)),
          first_sums(words + m * (num_words + num_groups)) {}
    static size_t bytes(int m, int k) {
        const Rounded one(nullptr, 0, k);
        return sizeof(int32_t) * m * (one.num_words + 2 * one.num_groups);
    }
};

// Writes up to kInt8Group elements -> their scale and the first sum. Zeros and NaN where one is infinite or no number.
AFD_INLINE float round_group(const bf16* x, int count, int32_t* to, int32_t* first_sum) {
    const Scaling scaling = scaling_of(x, count, 127.0f);
    const Vf factor = splat(scaling.factor);
    __m512i sums = _mm512_setzero_si512();
    for (int i = 0; i < count; i += kChunk) {
        const Chunk c = count - i < kChunk ? load_part(x + i, count - i) : load(x + i);
        const __m512i pairs = scaling.finite ? (__m512i)nearest_pairs(c, factor) : _mm512_setzero_si512();
        sums = _mm512_dpwssd_epi32(sums, pairs, _mm512_set1_epi16(1));
        const int num_words = (smaller(kChunk, count - i) + 3) / 4;
        _mm256_mask_storeu_epi32(to + i / 4, static_cast<__mmask8>((1 << num_words) - 1), _mm512_cvtepi16_epi8(pairs));
    }
    *first_sum = -128 * _mm512_reduce_add_epi32(sums);
    return scaling.scale;
}

inline void round_rows(const afd::GemmArgs& a, void* memory, int row_begin, int row_end) {
    const Rounded rounded(memory, a.m, a.k);
    for (int row = row_begin; row < row_end; ++row) {
        const bf16* const x = static_cast<const bf16*>(a.x) + row * a.x_stride;
        int32_t* const words = rounded.words + row * rounded.num_words;
        const int64_t first = row * rounded.num_groups;
        for (int group = 0; group < rounded.num_groups; ++group) {
            const int begin = group * kInt8Group;
            rounded.scales[first + group] = round_group(x + begin, smaller(kInt8Group, a.k - begin), words + begin / 4,
                                                        rounded.first_sums + first + group);
        }
    }
}

// sums + the dot product of unsigned bytes (weights) and signed ones in each word. As assembly: GCC 12 otherwise moves the
// sums of a tile through memory.
AFD_INLINE Vi add_dot_words(Vi sums, Vi weights, Vi x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(x));
    return sums;
}

// R rows of x against a panel, of whose columns `valid` are written. Sums of a group and of all groups are in registers: half
// as many columns as there would be room for without the latter, but their way through memory takes a tenth of the time.
// At each step of k the line at `next` is fetched, and a second one if it then moves on by more than one.
template <int R, class Put, bool kTwoLines>
void multiply_panel_words(const uint8_t* panel, const float* weight_scales, const Rounded& rounded, int row, int k,
                          const char* next, int stride, typename Put::Out* out, int64_t out_stride, int valid) {
    constexpr int V = kInt8Panel / kLanes;
    static_assert(V == 2);
    const int32_t* x = rounded.words + row * rounded.num_words;
    const float* scales = rounded.scales + row * rounded.num_groups;
    const int32_t* first_sums = rounded.first_sums + row * rounded.num_groups;
    Vf sums[R][V];
    AFD_UNROLL
    for (int r = 0; r < R; ++r)
        AFD_UNROLL
        for (int v = 0; v < V; ++v) sums[r][v] = Vf{};
    for (int begin = 0; begin < k; begin += kInt8Group, ++scales, ++first_sums) {
        Vi words[R][V];
        AFD_UNROLL
        for (int r = 0; r < R; ++r)
            AFD_UNROLL
            for (int v = 0; v < V; ++v) words[r][v] = Vi{} + first_sums[r * rounded.num_groups];
        const int32_t* const end = x + (smaller(kInt8Group, k - begin) + 3) / 4;
        for (; x < end; ++x, panel += 4 * kInt8Panel) {
            prefetch(next);
            if (kTwoLines) prefetch(next + 64);
            next += stride;
            Vi w[V];
            AFD_UNROLL
            for (int v = 0; v < V; ++v) w[v] = load_vector<Vi>(panel + v * 4 * kLanes);
            AFD_UNROLL
            for (int r = 0; r < R; ++r)
                AFD_UNROLL
                for (int v = 0; v < V; ++v) words[r][v] = add_dot_words(words[r][v], w[v], Vi{} + x[r * rounded.num_words]);
        }
        AFD_UNROLL
        for (int r = 0; r < R; ++r) {
            const __m512 scale = _mm512_set1_ps(scales[r * rounded.num_groups]);
            AFD_UNROLL
            for (int v = 0; v < V; ++v)
                sums[r][v] = (Vf)_mm512_fmadd_ps(_mm512_cvtepi32_ps((__m512i)words[r][v]), scale, (__m512)sums[r][v]);
        }
    }
    const Vf scale[V] = {load_vector<Vf>(weight_scales), load_vector<Vf>(weight_scales + kLanes)};
    for (int r = 0; r < R; ++r, out += out_stride) {
        const Vf scaled[V] = {sums[r][0] * scale[0], sums[r][1] * scale[1]};
        if (valid == kInt8Panel)
            Put::put(out, scaled[0], scaled[1]);
        else
            for (int i = 0; i < valid; ++i) Put::put(out + i, scaled[i / kLanes][i % kLanes]);
    }
}

// `count` rows, at most R.
template <int R, class Put>
void multiply_row_group(int count, const uint8_t* panel, const float* weight_scales, const Rounded& rounded, int row, int k,
                        const char* next, int stride, typename Put::Out* out, int64_t out_stride, int valid) {
    if constexpr (R > 1)
        if (count < R)
            return multiply_row_group<R - 1, Put>(count, panel, weight_scales, rounded, row, k, next, stride, out,
                                                  out_stride, valid);
    const auto multiply = stride > 64 ? multiply_panel_words<R, Put, true> : multiply_panel_words<R, Put, false>;
    multiply(panel, weight_scales, rounded, row, k, next, stride, out, out_stride, valid);
}

// Columns [n_begin, n_end); n_begin is a multiple of kInt8Panel.
template <class Put>
void gemm_int8(const afd::GemmArgs& a, const void* memory, int n_begin, int n_end) {
    const Rounded rounded(const_cast<void*>(memory), a.m, a.k);
    const RowGroups rows(a.m, kInt8Rows);
    const int64_t panel_bytes = static_cast<int64_t>(afd::int8_depth(a.k)) * kInt8Panel;
    for (int n = n_begin; n < n_end; n += kInt8Panel) {
        const int width = smaller(kInt8Panel, a.n - n);
        const uint8_t* const panel = static_cast<const uint8_t*>(a.w.data) + n / kInt8Panel * panel_bytes;
        // With one pass over a panel, what comes a little later; else the next panel, a part at each pass.
        const char* next = reinterpret_cast<const char*>(panel) + (rows.num == 1 ? kAheadBytes : panel_bytes);
        if (rows.num > 1 && n + width == a.n) next = static_cast<const char*>(a.after);
        const int stride = next == nullptr ? 0 : (4 * kInt8Panel + rows.num - 1) / rows.num;
        if (next == nullptr) next = reinterpret_cast<const char*>(panel);
        for (int group = 0; group < rows.num; ++group, next += stride * rounded.num_words) {
            const int row = rows.begin(group);
            multiply_row_group<kInt8Rows, Put>(rows.begin(group + 1) - row, panel, a.w.scales + n, rounded, row, a.k, next,
                                               stride, static_cast<typename Put::Out*>(a.out) + row * a.out_stride + n,
                                               a.out_stride, width);
        }
    }
}

}  // namespace AFD_ISA
