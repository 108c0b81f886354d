/* Frames in slots and posts on boards, as docs/protocol.md has them, for native code: stepmesh's own (`_native.c`) and that
   of code that drives a lane (`lane.h`). C and C++; Python's twins are in wire.py and transports/shm.py. */
#pragma once

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "frames are little-endian"
#endif

enum {
    SM_HEADER_BYTES = 128, /* in front of the payload */
    SM_TRAILER_BYTES = 8,
    SM_VERSION = 1,
    SM_DISPATCH = 1,
    SM_COMBINE = 2,
    SM_SPARSE_DISPATCH = 3,
    SM_CHECKSUM_NONE = 0,
    SM_NUM_PARITIES = 2,
    SM_LINE_WORDS = 8, /* a cache line */
    SM_LOOKS_PER_YIELD = 16, /* at boards, between two system calls */
};

/* Field for field as on the wire and in stepmesh.types.Header: 96 bytes, packed by itself. */
typedef struct {
    char magic[4];
    uint16_t version;
    uint8_t kind, flags;
    uint32_t epoch, generation;
    uint64_t seq, step, gang_id, compute_ns, member_mask_low, member_mask_high;
    uint32_t num_tokens, gang_tokens, payload_bytes, checksum;
    uint16_t stream, layer, top_k;
    uint8_t wire_dtype, checksum_kind;
    uint8_t reserved[8];
} SmHeader;

/* What stepmesh.wire.HeaderRules holds, in its order: of the frames that one end of a pair receives. */
typedef struct {
    uint64_t kind, other_kind, generation, num_streams, max_tokens, max_top_k, wire_dtype;
} SmRules;

/* The bell and the posts of a region (transports/shm.py), for the end that posts or the one that reads. */
typedef struct {
    volatile uint64_t *words;
    uint64_t num_slots;
    uint64_t seen; /* posts made or read */
} SmBoard;

static const char SM_MAGIC[4] = {'S', 'M', 'D', 'F'};

static inline uint64_t sm_trailer_offset(uint64_t payload_bytes)
{
    return SM_HEADER_BYTES + ((payload_bytes + SM_TRAILER_BYTES - 1) & ~(uint64_t)(SM_TRAILER_BYTES - 1));
}

/* Header and trailer around a payload; 0 when it exceeds the slot. Magic and version are filled in. */
static inline int sm_write_frame(void *slot, uint64_t slot_bytes, SmHeader *header)
{
    uint64_t trailer = sm_trailer_offset(header->payload_bytes);
    if (trailer + SM_TRAILER_BYTES > slot_bytes)
        return 0;
    memcpy(header->magic, SM_MAGIC, sizeof SM_MAGIC);
    header->version = SM_VERSION;
    memcpy(slot, header, sizeof *header);
    memcpy((char *)slot + trailer, &header->seq, SM_TRAILER_BYTES);
    return 1;
}

static inline int sm_frame_is_whole(const void *slot, uint64_t slot_bytes, const SmHeader *header)
{
    uint64_t trailer = sm_trailer_offset(header->payload_bytes), seq;
    if (trailer + SM_TRAILER_BYTES > slot_bytes)
        return 0;
    memcpy(&seq, (const char *)slot + trailer, SM_TRAILER_BYTES);
    return seq == header->seq;
}

static inline int sm_header_passes(const SmHeader *header, const SmRules *rules)
{
    return memcmp(header->magic, SM_MAGIC, sizeof SM_MAGIC) == 0 && header->version == SM_VERSION &&
           (header->kind == rules->kind || header->kind == rules->other_kind) &&
           header->generation == rules->generation && header->stream < rules->num_streams &&
           header->num_tokens <= rules->max_tokens && header->top_k <= rules->max_top_k &&
           (header->kind != SM_SPARSE_DISPATCH || header->gang_tokens <= rules->max_tokens) &&
           header->wire_dtype == rules->wire_dtype && header->checksum_kind == SM_CHECKSUM_NONE;
}

/* The header of a good frame without checksum that was posted as `seq` of `stream`; 0 for any other. */
static inline int sm_read_frame(const void *slot, uint64_t slot_bytes, const SmRules *rules, uint64_t stream,
                                uint64_t parity, uint64_t seq, SmHeader *header)
{
    if (slot_bytes < SM_HEADER_BYTES)
        return 0;
    memcpy(header, slot, sizeof *header); /* judged as it is now: a peer may write it again */
    return sm_header_passes(header, rules) && header->stream == stream && (header->seq & 1) == parity &&
           header->seq == seq && sm_frame_is_whole(slot, slot_bytes, header);
}

/* Where post number n lies on the board: slot, then seq. */
static inline volatile uint64_t *sm_place(const SmBoard *board, uint64_t post)
{
    return board->words + SM_LINE_WORDS * (1 + post % board->num_slots);
}

static inline int sm_has_news(const SmBoard *board)
{
    return __atomic_load_n(board->words, __ATOMIC_ACQUIRE) != board->seen;
}

/* Write the next post and ring: 0, or errno of the bell. */
static inline int sm_post(SmBoard *board, uint64_t slot, uint64_t seq, int bell_fd)
{
    uint64_t one = 1;
    volatile uint64_t *place = sm_place(board, board->seen);
    place[0] = slot;
    place[1] = seq;
    __atomic_store_n(board->words, ++board->seen, __ATOMIC_RELEASE);
    if (write(bell_fd, &one, sizeof one) < 0 && errno != EAGAIN) /* full: the peer is being woken anyway */
        return errno;
    return 0;
}

static inline int64_t sm_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline void sm_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}
