// What this library really has of api.h, as text that the loader (afd/ops/cpu/abi.py) compares with its own mirror: a
// line for each function with its types, for each structure with the place and type of its fields, for each constant.
#include "abi.h"

#include "attention_plan.h"
#include "run.h"
#include "sample.h"

using namespace afd;

namespace {

void functions(Text& text) {
    FUNCTION(afd_abi);
    FUNCTION(afd_isa_available);
    FUNCTION(afd_paged_attention);
    FUNCTION(afd_rope_write_kv);
    FUNCTION(afd_add_rms_norm);
    FUNCTION(afd_silu_mul);
    FUNCTION(afd_row_max);
    FUNCTION(afd_sample);
    FUNCTION(afd_unpack_rows);
    FUNCTION(afd_pack);
    FUNCTION(afd_gemm);
    FUNCTION(afd_gemm_row_max);
    FUNCTION(afd_swiglu);
    FUNCTION(afd_experts);
    FUNCTION(afd_attention_layer);
    FUNCTION(afd_read_memory);
    FUNCTION(afd_start_workers);
    FUNCTION(afd_stop_workers);
    FUNCTION(afd_num_workers);
}

void structures(Text& text) {
    STRUCT(AfdSampleRow, F(prompt) F(output) F(bias_ids) F(biases) F(masked) F(num_prompt) F(num_output) F(num_biases)
           F(num_masked) F(seed) F(position) F(choice) F(top_p) F(frequency) F(presence) F(repetition) F(scale)
           F(top_k) F(least) F(num_logprobs));
    STRUCT(AfdSampled, F(tokens) F(logprobs) F(top_ids) F(num_top));
    STRUCT(AfdMatrix, F(data) F(scales));
    STRUCT(AfdSwiGlu, F(gate_up) F(down) F(hidden) F(width) F(limit));
    STRUCT(AfdExperts, F(gate_up) F(down) F(first) F(num_local) F(hidden) F(width) F(limit));
    STRUCT(AfdAttentionLayer, F(attn_norm) F(ffn_norm) F(qkv) F(qkv_bias) F(q_norm) F(q_up) F(q_head_norm)
           F(k_head_norm) F(o) F(o_bias) F(hidden) F(q_rank) F(num_heads) F(num_kv_heads) F(head_dim) F(v_dim)
           F(head_gate) F(half) F(interleaved) F(window) F(scale) F(eps));
    STRUCT(AfdBatch, F(cos) F(sin) F(slots) F(block_table) F(seq_lens) F(query_start) F(table_stride) F(num_tokens)
           F(num_seqs));
}

void constants(Text& text) {
    CONSTANT(kIsaPortable);
    CONSTANT(kIsaAvx2);
    CONSTANT(kIsaAvx512);
    CONSTANT(kFloat32);
    CONSTANT(kBfloat16);
    CONSTANT(kKeyGroup);
    CONSTANT(kMaxPartials);
    CONSTANT(kPanel);
    CONSTANT(kInt8Panel);
    CONSTANT(kOneMass);
    CONSTANT(BatchError::kQueryStart);
    CONSTANT(BatchError::kSeqLen);
    CONSTANT(BatchError::kTableTooShort);
    CONSTANT(BatchError::kBlockIndex);
    CONSTANT(kSlotOutOfRange);
    CONSTANT(kNoSuchToken);
    CONSTANT(kOutOfMemory);
}

}  // namespace

const char* afd_abi() {
    static const std::string all = [] {
        Text text;
        functions(text);
        structures(text);
        constants(text);
        return text.lines;
    }();
    return all.c_str();
}
