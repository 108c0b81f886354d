// Consecutive layers of one micro-batch whose exchanges native code makes by itself, over a lane of stepmesh: no Python
// between the last kernel of one side and the first one of the other. Each side stops where anything but the next layer's
// frame comes, or none does, and leaves the rest to its caller. A C interface beside that of afd/ops/cpu, in its library.
// Times are CLOCK_MONOTONIC's, in ns.
#pragma once

#include "api.h"
#include "lane.h"

extern "C" {

// All that is declared here, as it was compiled: see afd_abi.
AFD_API const char* afd_relay_abi();

enum RelayStatus : int32_t {
    kPostFailed = 1000,  // + errno of a lane's bell; below it those of the kernels
};
enum RelayOutcome : int32_t {
    kRelayDone = 0,      // all layers that were asked for
    kRelayTimeOver = 1,  // until_ns has come
    kRelayLate = 2,      // nothing came for patience_ns
    kRelayOther = 3,     // something else came; it was left untaken
    kRelaySent = 4,      // attention, where a step begins: its first layer, whose answer is left to the caller
};
struct AfdRelayBounds {
    int64_t until_ns, patience_ns, step_patience_ns;  // with each frame, and with the first of a step (FFN)
};
// One layer's round trip, seen from one side.
struct AfdLap {
    int64_t begun_ns;     // the layer began: attention at once, FFN when the dispatch was seen
    int64_t computed_ns;  // its rows were in the slot
    int64_t posted_ns;
    int64_t answered_ns;  // attention: the answer was seen, 0 = not yet; FFN: posted_ns
};
struct AfdRelayed {
    AfdLap* laps;  // [num_layers]
    int32_t num_laps, num_answered, outcome, gang_tokens;  // gang_tokens: of the last answer
    int64_t began_ns, ended_ns;
    // Sums over the laps: computing here, posting, waiting for the other side; the FFN's computing as its answers say, and
    // what of the waiting was longer than it (attention). Behind ended_ns, for an answer that did not come: open_wait_ns (attention).
    int64_t compute_ns, post_ns, wait_ns, ffn_ns, exposed_ns, open_wait_ns;
};
struct AfdRelayLayer {
    const AfdAttentionLayer* layer;
    void *k_cache, *v_cache;
    int32_t num_blocks, block_size;
    int32_t batch;  // which of the relay's
};
struct AfdAttentionRelay {
    const SmLane* lane;
    // Of the newest dispatch, which was answered; then of the newest that was sent. Where a step begins: what its first
    // dispatch has, but for seq and layer, one less.
    SmHeader* last;
    const void* partial;  // the answer to `last`, [num_tokens, hidden] bf16, which the first layer adds; null = x has it
    const AfdRelayLayer* layers;
    const AfdBatch* const* batches;
    float* x;
    int32_t num_layers;
    int32_t begins;  // the first layer is sent, and not waited for
};
struct AfdFfnRelay {
    const SmLane* lane;
    SmHeader* last;  // of the dispatch that was answered last; then of the newest that was answered
    const AfdSwiGlu* const* layers;
    int32_t num_layers;
    // > 0: a step begins, of so many rows at most, whose gang is the one that `last` names.
    int32_t max_tokens;
};
// error_detail [2]: as of afd_attention_layer; unused by the FFN's.
AFD_API int32_t afd_relay_attention(int32_t isa, int32_t num_threads, const AfdAttentionRelay* relay,
                                    const AfdRelayBounds* bounds, AfdRelayed* done, int32_t* error_detail);
AFD_API int32_t afd_relay_ffn(int32_t isa, int32_t num_threads, const AfdFfnRelay* relay, const AfdRelayBounds* bounds,
                              AfdRelayed* done, int32_t* error_detail);
}
