/* One stream of a pair in shared memory, driven by native code while the mesh looks elsewhere (stepmesh/lane.py).

   Whoever drives it posts one frame and awaits the answer, again and again. What is not the frame that it expects, in all
   that can be expected, is left where it is: the mesh finds it, judges it, and says what is wrong with it. */
#pragma once

#include <sched.h>
#if defined(__linux__)
#include <poll.h>
#include <sys/uio.h>
#endif

#include "frame.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Mirrored by stepmesh.lane.SmLane. By parity: slots of this stream. Boards are the channel's own. */
typedef struct {
    SmBoard *out, *in;
    uint8_t *out_slots[SM_NUM_PARITIES];
    const uint8_t *in_slots[SM_NUM_PARITIES];
    uint64_t out_slot_bytes, in_slot_bytes;
    SmRules rules; /* of what comes in */
    uint64_t stream;
    int64_t bell_fd;
    int64_t own_bell_fd, wakeups_fd; /* wakeups: readable when anything at all wants this rank, its own bell included */
} SmLane;

static inline void *sm_out_rows(const SmLane *lane, uint64_t seq) { return lane->out_slots[seq & 1] + SM_HEADER_BYTES; }
static inline const void *sm_in_rows(const SmLane *lane, uint64_t seq) { return lane->in_slots[seq & 1] + SM_HEADER_BYTES; }

/* Which good frame native code takes on a lane. What each has to say stands in stepmesh/wire.py (answers, follows, begins),
   against which tests/unit/stepmesh/test_native.py holds these three. */

static inline int sm_answers(const SmHeader *frame, const SmHeader *sent)
{
    return frame->epoch == sent->epoch && frame->step == sent->step && frame->layer == sent->layer &&
           frame->num_tokens == sent->num_tokens && frame->payload_bytes == sent->payload_bytes;
}

static inline int sm_follows(const SmHeader *frame, const SmHeader *last)
{
    return frame->kind == SM_DISPATCH && frame->epoch == last->epoch && frame->step == last->step &&
           frame->gang_id == last->gang_id && frame->member_mask_low == last->member_mask_low &&
           frame->member_mask_high == last->member_mask_high && frame->num_tokens == last->num_tokens &&
           frame->layer == last->layer + 1 && frame->top_k == 0 && frame->payload_bytes == last->payload_bytes;
}

static inline int sm_begins(const SmHeader *frame, const SmHeader *last, uint64_t max_tokens, uint64_t row_bytes)
{
    return frame->kind == SM_DISPATCH && frame->epoch == last->epoch && frame->step != last->step &&
           frame->gang_id == 0 && frame->member_mask_low == 0 && frame->member_mask_high == 0 && frame->layer == 0 &&
           frame->top_k == 0 && frame->num_tokens > 0 && frame->num_tokens <= max_tokens &&
           frame->payload_bytes == frame->num_tokens * row_bytes;
}

/* The header of the dispatch that comes behind `sent`. */
static inline void sm_next_layer(SmHeader *sent)
{
    sent->seq += 1;
    sent->layer += 1;
}

/* The frame of a step that begins becomes one of the gang that `named` names. */
static inline void sm_name_gang(SmHeader *frame, const SmHeader *named)
{
    frame->gang_id = named->gang_id;
    frame->member_mask_low = named->member_mask_low;
    frame->member_mask_high = named->member_mask_high;
}

/* The header of the answer to a dispatch of one attention rank alone. */
static inline SmHeader sm_answer_to(const SmHeader *dispatch, int64_t compute_ns)
{
    SmHeader answer = *dispatch;
    answer.kind = SM_COMBINE;
    answer.flags = 0;
    answer.compute_ns = (uint64_t)compute_ns;
    answer.gang_tokens = dispatch->num_tokens;
    return answer;
}

/* Post the frame whose payload is in the slot of header->seq. 0, errno of the bell, or EMSGSIZE. */
static inline int sm_lane_post(const SmLane *lane, SmHeader *header)
{
    uint64_t parity = header->seq & 1;
    if (!sm_write_frame(lane->out_slots[parity], lane->out_slot_bytes, header))
        return EMSGSIZE;
    return sm_post(lane->out, SM_NUM_PARITIES * lane->stream + parity, header->seq, (int)lane->bell_fd);
}

/* Whether a good frame with this seq is the next post. It stays untaken. */
static inline int sm_lane_look(const SmLane *lane, uint64_t seq, SmHeader *header)
{
    uint64_t parity = seq & 1;
    volatile uint64_t *place = sm_place(lane->in, lane->in->seen);
    return place[0] == SM_NUM_PARITIES * lane->stream + parity && place[1] == seq &&
           sm_read_frame(lane->in_slots[parity], lane->in_slot_bytes, &lane->rules, lane->stream, parity, seq, header);
}

/* The frame that was looked at is this lane's from now on. */
static inline void sm_lane_take(const SmLane *lane) { lane->in->seen += 1; }

/* Polls until something is posted: 0 when nothing was until then. Whoever else wants the core gets it in between. */
static inline int sm_lane_await(const SmLane *lane, int64_t until_ns)
{
    for (;;) {
        for (int look = 0; look < SM_LOOKS_PER_YIELD; look++) {
            if (sm_has_news(lane->in))
                return 1;
            sm_pause();
        }
        if (sm_now_ns() >= until_ns)
            return 0;
        sched_yield();
    }
}

#if defined(__linux__)
/* Sleeps until something is posted, 1; 0 when nothing was until then; -1 when anything else wants this rank first.
   (In C with _GNU_SOURCE.) */
static inline int sm_lane_sleep(const SmLane *lane, int64_t until_ns)
{
    uint64_t rings;
    struct iovec into = {&rings, sizeof rings};
    struct pollfd wakeups = {(int)lane->wakeups_fd, POLLIN, 0};
    for (;;) {
        /* For posts that were seen. Others who ring say so elsewhere, too, and are found by the mesh's next look. The peer
           has this bell as well and could have made it a blocking one: it is read only if that takes no time. */
        ssize_t heard = preadv2((int)lane->own_bell_fd, &into, 1, -1, RWF_NOWAIT);
        (void)heard;
        if (sm_has_news(lane->in))
            return 1;
        int64_t left_ns = until_ns - sm_now_ns();
        struct timespec left = {left_ns / 1000000000, left_ns % 1000000000};
        if (left_ns <= 0)
            return 0;
        int ready = ppoll(&wakeups, 1, &left, NULL);
        if (ready > 0 && !sm_has_news(lane->in))
            return -1;
    }
}
#else
static inline int sm_lane_sleep(const SmLane *lane, int64_t until_ns) { return sm_lane_await(lane, until_ns); }
#endif

#ifdef __cplusplus
}
#endif
