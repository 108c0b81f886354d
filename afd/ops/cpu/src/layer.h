// Several kernels in one call: what a layer's half does between two exchanges. bf16 activations, packed weights (of
// either kind).  Each throws std::bad_alloc.
#pragma once

#include "api.h"
#include "kernels.h"

namespace afd {

int32_t swiglu(const KernelTable& kernels, const AfdSwiGlu& ffn, const void* x, int64_t x_stride, int num_rows,
               void* out, int num_threads);

struct Routed {
    const void* x;       // bf16 [num_rows, hidden]
    const int32_t* ids;  // [num_rows, top_k]
    const float* weights;
    int32_t num_rows, top_k;
    float* out;
    int32_t* counts;
    double* squares;
};
int32_t run_experts(const KernelTable& kernels, const AfdExperts& experts, const Routed& routed, int num_threads);

struct KvBlocks {
    void *k_cache, *v_cache;  // as in AttentionArgs
    int32_t num_blocks, block_size;
};
struct Residual {
    float* x;                            // [num_tokens, hidden]
    const void* partials[kMaxPartials];  // each like x; to be added first
    int32_t num_partials;
    DType partial_dtype;
};
int32_t attention_layer(const KernelTable& kernels, const AfdAttentionLayer& layer, const AfdBatch& batch,
                        const KvBlocks& kv, const Residual& residual, void* rows, int num_threads, int32_t* error_detail);

}  // namespace afd
