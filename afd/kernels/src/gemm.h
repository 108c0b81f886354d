// out[m, n] = x[m, k] . w[n, k], bf16 in, float32 sums: a dot product of rows, the weights streamed once from memory.
//
// At a few rows of x the weights' bytes are the cost, so nothing is repacked: w is read as it lies. kWeightTile rows
// of w and up to kRowTileX rows of x are held against each other in registers; kBlockRows rows of w stay in the L1
// cache while all of x passes, and the next block is fetched meanwhile. Each output is summed in the same order for any
// m and any tiling.
#pragma once

#include "kernels.h"
#include "lookahead.h"
#include "simd.h"

namespace AFD_ISA {

constexpr int kWeightTile = 4;
constexpr int kRowTileX = AFD_LANES == 16 ? 6 : 2;
constexpr int kBlockBytes = 16 * 1024;

// sums[r] = the dot products of R rows of x with kWeightTile rows of w.
template <int R>
void dot_rows(const bf16* const* w, const bf16* x, int64_t x_stride, int k, Lookahead& lookahead, Quad* sums) {
    Lookahead ahead = lookahead;
    Vf acc[R][kWeightTile] = {};
    int i = 0;
    for (; i + kChunk <= k; i += kChunk) {
        Vi weights[kWeightTile];
        for (int j = 0; j < kWeightTile; ++j) weights[j] = load_vector<Vi>(w[j] + i);
        ahead.step();
        for (int r = 0; r < R; ++r) {
            const Vi row = load_vector<Vi>(x + r * x_stride + i);
            for (int j = 0; j < kWeightTile; ++j) acc[r][j] = dot_words(acc[r][j], weights[j], row);
        }
    }
    if (i < k) {
        bf16 buffer[kChunk] = {};
        Vi weights[kWeightTile];
        const size_t bytes = static_cast<size_t>(k - i) * sizeof(bf16);
        for (int j = 0; j < kWeightTile; ++j) {
            std::memcpy(buffer, w[j] + i, bytes);
            weights[j] = load_vector<Vi>(buffer);
        }
        for (int r = 0; r < R; ++r) {
            std::memcpy(buffer, x + r * x_stride + i, bytes);
            const Vi row = load_vector<Vi>(buffer);
            for (int j = 0; j < kWeightTile; ++j) acc[r][j] = dot_words(acc[r][j], weights[j], row);
        }
    }
    for (int r = 0; r < R; ++r) sums[r] = sums_of(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
    lookahead = ahead;
}

template <class Out>
void gemm(const afd::GemmArgs& a, int n_begin, int n_end) {
    const bf16* const x = static_cast<const bf16*>(a.x);
    const bf16* const w = static_cast<const bf16*>(a.w);
    Out* const out = static_cast<Out*>(a.out);
    const int64_t row_bytes = a.w_stride * static_cast<int64_t>(sizeof(bf16));
    const int fit = static_cast<int>(kBlockBytes / (row_bytes + 1)) / kWeightTile * kWeightTile;
    const int block_rows = fit < kWeightTile ? kWeightTile : fit;
    const int row_groups = (a.m + kRowTileX - 1) / kRowTileX;
    const int64_t num_steps = static_cast<int64_t>(row_groups) * (block_rows / kWeightTile) * (a.k / kChunk);
    for (int block = n_begin; block < n_end; block += block_rows) {
        const int block_end = block + block_rows < n_end ? block + block_rows : n_end;
        const int next_rows = block_end + block_rows < n_end ? block_rows : n_end - block_end;
        const Run next = {reinterpret_cast<const char*>(w + block_end * a.w_stride), next_rows * row_bytes};
        Lookahead ahead;
        if (num_steps > 0 && next_rows > 0) ahead = Lookahead(&next, 1, num_steps);
        for (int group = 0, row = 0; group < row_groups; ++group) {
            const int count = (a.m - row + row_groups - group - 1) / (row_groups - group);
            const bf16* from = x + row * a.x_stride;
            for (int n = block; n < block_end; n += kWeightTile) {
                const int valid = block_end - n < kWeightTile ? block_end - n : kWeightTile;
                const bf16* rows[kWeightTile];
                for (int j = 0; j < kWeightTile; ++j) rows[j] = w + (n + (j < valid ? j : valid - 1)) * a.w_stride;
                Quad sums[kRowTileX];
                switch (count) {
                    case 1:
                        dot_rows<1>(rows, from, a.x_stride, a.k, ahead, sums);
                        break;
                    case 2:
                        dot_rows<2>(rows, from, a.x_stride, a.k, ahead, sums);
                        break;
#if AFD_LANES == 16
                    case 3:
                        dot_rows<3>(rows, from, a.x_stride, a.k, ahead, sums);
                        break;
                    case 4:
                        dot_rows<4>(rows, from, a.x_stride, a.k, ahead, sums);
                        break;
                    case 5:
                        dot_rows<5>(rows, from, a.x_stride, a.k, ahead, sums);
                        break;
                    default:
                        dot_rows<6>(rows, from, a.x_stride, a.k, ahead, sums);
#endif
                }
                for (int r = 0; r < count; ++r) {
                    Out* to = out + (row + r) * a.out_stride + n;
                    if (valid == kWeightTile)
                        store_quad(to, sums[r]);
                    else
                        store_quad_part(to, sums[r], valid);
                }
            }
            row += count;
        }
    }
}

}  // namespace AFD_ISA
