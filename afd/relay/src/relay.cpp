#include "relay.h"

#include <algorithm>
#include <cstring>

#include "layer.h"
#include "run.h"

namespace afd {
namespace {

constexpr uint32_t kBf16Bytes = 2;
constexpr int64_t kPollNs = 50'000;  // before it sleeps: a wake-up takes about as long

// What is awaited next on the lane: kRelayDone = it is here, in `frame`, untaken. Who sleeps leaves the core to others.
RelayOutcome await(const SmLane& lane, int64_t patience_ns, int64_t until_ns, bool sleeps, uint64_t seq, SmHeader* frame) {
    const int64_t now_ns = sm_now_ns(), late_ns = now_ns + patience_ns, end_ns = std::min(late_ns, until_ns);
    int found = sm_lane_await(&lane, sleeps ? std::min(end_ns, now_ns + kPollNs) : end_ns);
    if (!found && sleeps) found = sm_lane_sleep(&lane, end_ns);
    if (!found) return late_ns < until_ns ? kRelayLate : kRelayTimeOver;
    return found > 0 && sm_lane_look(&lane, seq, frame) ? kRelayDone : kRelayOther;
}

// x [count] += bf16 rows.
void add_rows(float* x, const void* rows, int64_t count) {
    const uint16_t* const bits = static_cast<const uint16_t*>(rows);
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t wide = static_cast<uint32_t>(bits[i]) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        x[i] += value;
    }
}

int32_t relay_attention(const KernelTable& kernels, const AfdAttentionRelay& relay, const AfdRelayBounds& bounds,
                        AfdRelayed* done, int num_threads, int32_t* error_detail) {
    const SmLane& lane = *relay.lane;
    SmHeader& sent = *relay.last;
    const void* partial = relay.partial;
    done->began_ns = done->ended_ns = sm_now_ns();
    while (done->num_laps < relay.num_layers) {
        if (done->ended_ns >= bounds.until_ns) {
            done->outcome = kRelayTimeOver;
            break;
        }
        AfdLap& lap = done->laps[done->num_laps];
        lap = {};
        lap.begun_ns = done->ended_ns;
        const AfdRelayLayer& l = relay.layers[done->num_laps];
        const Residual residual{relay.x, {partial}, partial == nullptr ? 0 : 1, kBfloat16};
        sm_next_layer(&sent);
        const int32_t status =
            attention_layer(kernels, *l.layer, *relay.batches[l.batch], {l.k_cache, l.v_cache, l.num_blocks, l.block_size},
                            residual, sm_out_rows(&lane, sent.seq), num_threads, error_detail);
        if (status != kOk) return status;
        lap.computed_ns = sm_now_ns();
        if (const int error = sm_lane_post(&lane, &sent)) return kPostFailed + error;
        lap.posted_ns = done->ended_ns = sm_now_ns();
        done->num_laps += 1;
        done->compute_ns += lap.computed_ns - lap.begun_ns;
        done->post_ns += lap.posted_ns - lap.computed_ns;
        if (relay.begins) {
            done->outcome = kRelaySent;
            return kOk;
        }
        SmHeader answer;
        done->outcome = await(lane, bounds.patience_ns, bounds.until_ns, false, sent.seq, &answer);
        if (done->outcome == kRelayDone && !sm_answers(&answer, &sent)) done->outcome = kRelayOther;
        if (done->outcome != kRelayDone) {  // sent, not answered
            done->open_wait_ns = sm_now_ns() - lap.posted_ns;
            return kOk;
        }
        sm_lane_take(&lane);
        partial = sm_in_rows(&lane, sent.seq);
        lap.answered_ns = done->ended_ns = sm_now_ns();
        const int64_t took_ns = lap.answered_ns - lap.posted_ns;
        // Whatever the peer says, it cannot have computed for longer.
        const int64_t ffn_ns = static_cast<int64_t>(std::min<uint64_t>(answer.compute_ns, took_ns));
        done->num_answered += 1;
        done->gang_tokens = static_cast<int32_t>(std::min<uint32_t>(answer.gang_tokens, INT32_MAX));
        done->wait_ns += took_ns;
        done->ffn_ns += ffn_ns;
        done->exposed_ns += took_ns - ffn_ns;
    }
    if (done->num_answered > 0)
        add_rows(relay.x, partial, static_cast<int64_t>(sent.payload_bytes / kBf16Bytes));
    return kOk;
}

int32_t relay_ffn(const KernelTable& kernels, const AfdFfnRelay& relay, const AfdRelayBounds& bounds, AfdRelayed* done,
                  int num_threads) {
    const SmLane& lane = *relay.lane;
    SmHeader& last = *relay.last;
    done->began_ns = done->ended_ns = sm_now_ns();
    while (done->num_laps < relay.num_layers) {
        if (done->ended_ns >= bounds.until_ns) {
            done->outcome = kRelayTimeOver;
            return kOk;
        }
        SmHeader frame;
        const bool is_begin = done->num_laps == 0 && relay.max_tokens > 0;
        const int64_t patience_ns = is_begin ? bounds.step_patience_ns : bounds.patience_ns;
        done->outcome = await(lane, patience_ns, bounds.until_ns, is_begin, last.seq + 1, &frame);
        if (done->outcome == kRelayDone &&
            !(is_begin ? sm_begins(&frame, &last, relay.max_tokens, kBf16Bytes * relay.layers[0]->hidden)
                       : sm_follows(&frame, &last)))
            done->outcome = kRelayOther;
        const int64_t begun_ns = sm_now_ns();
        done->wait_ns += begun_ns - done->ended_ns;
        done->ended_ns = begun_ns;
        if (done->outcome != kRelayDone) return kOk;
        sm_lane_take(&lane);
        if (is_begin) sm_name_gang(&frame, &last);
        AfdLap& lap = done->laps[done->num_laps];
        lap.begun_ns = begun_ns;
        const AfdSwiGlu& ffn = *relay.layers[done->num_laps];
        const int32_t status = swiglu(kernels, ffn, sm_in_rows(&lane, frame.seq), ffn.hidden, frame.num_tokens,
                                      sm_out_rows(&lane, frame.seq), num_threads);
        if (status != kOk) return status;
        lap.computed_ns = sm_now_ns();
        SmHeader answer = sm_answer_to(&frame, lap.computed_ns - lap.begun_ns);
        if (const int error = sm_lane_post(&lane, &answer)) return kPostFailed + error;
        lap.posted_ns = lap.answered_ns = done->ended_ns = sm_now_ns();
        done->num_laps += 1;
        done->num_answered += 1;
        done->compute_ns += lap.computed_ns - lap.begun_ns;
        done->post_ns += lap.posted_ns - lap.computed_ns;
        last = frame;
    }
    return kOk;
}

}  // namespace
}  // namespace afd

using namespace afd;

int32_t afd_relay_attention(int32_t isa, int32_t num_threads, const AfdAttentionRelay* relay,
                            const AfdRelayBounds* bounds, AfdRelayed* done, int32_t* error_detail) {
    return guarded([&] { return relay_attention(table_of(isa), *relay, *bounds, done, num_threads, error_detail); });
}

int32_t afd_relay_ffn(int32_t isa, int32_t num_threads, const AfdFfnRelay* relay, const AfdRelayBounds* bounds,
                      AfdRelayed* done, int32_t*) {
    return guarded([&] { return relay_ffn(table_of(isa), *relay, *bounds, done, num_threads); });
}
