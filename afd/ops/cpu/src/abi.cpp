// What this library really has of api.h, as text that the loader (afd/ops/cpu/abi.py) compares with its own mirror: a
// line for each function with its types, for each structure with the place and type of its fields, for each constant.
#include <cstddef>
#include <string>
#include <type_traits>

#include "attention_plan.h"
#include "run.h"
#include "sample.h"

using namespace afd;

namespace {

template <class T>
std::string code() {
    if constexpr (std::is_array_v<T>)
        return code<std::remove_extent_t<T>>() + "*" + std::to_string(std::extent_v<T>);
    else if constexpr (std::is_pointer_v<T>)
        return "ptr";
    else if constexpr (std::is_void_v<T>)
        return "void";
    else if constexpr (std::is_class_v<T>)
        return "struct" + std::to_string(sizeof(T));
    else {
        static_assert(std::is_arithmetic_v<T>);
        const char* const kind = std::is_floating_point_v<T> ? "f" : std::is_signed_v<T> ? "i" : "u";
        return kind + std::to_string(8 * sizeof(T));
    }
}

template <class Result, class... Arguments>
std::string signature(Result (*)(Arguments...)) {
    std::string text = code<Result>() + "(";
    ((text += code<Arguments>() + ","), ...);
    return text + ")";
}

struct Text {
    std::string lines;
    void add(const std::string& name, const std::string& value) { lines += name + "=" + value + "\n"; }
};

#define FUNCTION(name) text.add(#name, signature(name))
#define CONSTANT(name) text.add(#name, std::to_string(static_cast<int64_t>(name)))
// A structure's size, and of each of its fields the place and the type.
#define STRUCT(type, fields)               \
    do {                                   \
        using T = type;                    \
        const std::string of = #type;      \
        text.add(of, code<T>());           \
        fields                             \
    } while (false)
#define F(name) text.add(of + "." #name, code<decltype(T::name)>() + "@" + std::to_string(offsetof(T, name)));

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
    FUNCTION(afd_relay_attention);
    FUNCTION(afd_relay_ffn);
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
    STRUCT(AfdRelayBounds, F(until_ns) F(patience_ns) F(step_patience_ns));
    STRUCT(AfdLap, F(begun_ns) F(computed_ns) F(posted_ns) F(answered_ns));
    STRUCT(AfdRelayed, F(laps) F(num_laps) F(num_answered) F(outcome) F(gang_tokens) F(began_ns) F(ended_ns)
           F(compute_ns) F(post_ns) F(wait_ns) F(ffn_ns) F(exposed_ns) F(open_wait_ns));
    STRUCT(AfdRelayLayer, F(layer) F(k_cache) F(v_cache) F(num_blocks) F(block_size) F(batch));
    STRUCT(AfdAttentionRelay, F(lane) F(last) F(partial) F(layers) F(batches) F(x) F(num_layers) F(begins));
    STRUCT(AfdFfnRelay, F(lane) F(last) F(layers) F(num_layers) F(max_tokens));
    // stepmesh/lane.h: Python makes one, and a header, for the relays.
    STRUCT(SmLane, F(out) F(in) F(out_slots) F(in_slots) F(out_slot_bytes) F(in_slot_bytes) F(rules) F(stream)
           F(bell_fd) F(own_bell_fd) F(wakeups_fd));
    STRUCT(SmHeader, );
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
    CONSTANT(kPostFailed);
    CONSTANT(kRelayDone);
    CONSTANT(kRelayTimeOver);
    CONSTANT(kRelayLate);
    CONSTANT(kRelayOther);
    CONSTANT(kRelaySent);
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
