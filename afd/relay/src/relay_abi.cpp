// What this library really has of relay.h, for afd/relay/native.py: see afd/ops/cpu/src/abi.cpp.
#include "abi.h"
#include "relay.h"

using namespace afd;

const char* afd_relay_abi() {
    static const std::string all = [] {
        Text text;
        FUNCTION(afd_relay_abi);
        FUNCTION(afd_relay_attention);
        FUNCTION(afd_relay_ffn);
        STRUCT(AfdRelayBounds, F(until_ns) F(patience_ns) F(step_patience_ns));
        STRUCT(AfdLap, F(begun_ns) F(computed_ns) F(posted_ns) F(answered_ns));
        STRUCT(AfdRelayed, F(laps) F(num_laps) F(num_answered) F(outcome) F(gang_tokens) F(began_ns) F(ended_ns)
               F(compute_ns) F(post_ns) F(wait_ns) F(ffn_ns) F(exposed_ns) F(open_wait_ns));
        STRUCT(AfdRelayLayer, F(layer) F(k_cache) F(v_cache) F(num_blocks) F(block_size) F(batch));
        STRUCT(AfdAttentionRelay, F(lane) F(last) F(partial) F(layers) F(batches) F(x) F(num_layers) F(begins));
        STRUCT(AfdFfnRelay, F(lane) F(last) F(layers) F(num_layers) F(max_tokens));
        // stepmesh/lane.h: Python makes one, and a header, for the relays.
        STRUCT(SmRules, F(kind) F(other_kind) F(generation) F(num_streams) F(max_tokens) F(max_top_k) F(wire_dtype));
        STRUCT(SmLane, F(out) F(in) F(out_slots) F(in_slots) F(out_slot_bytes) F(in_slot_bytes) F(rules) F(stream)
               F(bell_fd) F(own_bell_fd) F(wakeups_fd));
        CONSTANT(kPostFailed);
        CONSTANT(kRelayDone);
        CONSTANT(kRelayTimeOver);
        CONSTANT(kRelayLate);
        CONSTANT(kRelayOther);
        CONSTANT(kRelaySent);
        text.add("sizeof(SmHeader)", std::to_string(sizeof(SmHeader)));
        return text.lines;
    }();
    return all.c_str();
}
