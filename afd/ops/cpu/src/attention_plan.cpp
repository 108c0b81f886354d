#include "attention_plan.h"

#include <algorithm>

namespace afd {
namespace {

// Items per thread below which a tile is worth splitting: enough for the threads to finish together.
constexpr int kItemsPerThread = 4;
// Query heads of a KV head up to which tiles of several KV heads pay: with more, their sums of values push K and V out
// of the L1 cache.
constexpr int kJoinedHeads = 4;
// Work, in units of one row and one dimension of one key: reading and transposing the keys of a KV head costs about as
// much as 8 rows. A microsecond is some 20,000 units (AVX-512).
constexpr int64_t kKeysCost = 8;
// Work that is worth a thread: less takes no longer than to wake one.
constexpr int64_t kCostPerThread = 200'000;

int64_t cost_of(const AttentionArgs& a, const AttentionTile& t) {
    const int64_t rows = kKeysCost * t.num_kv_heads + t.num_rows();
    return rows * (t.key_end - t.key_begin) * a.head_dim;
}

// The first key that the query at `position` sees.
int first_key(int position, int window) { return window > 0 ? std::max(0, position + 1 - window) : 0; }

// Tiles of one sequence: as many tokens and heads of one KV head as fit, so that they share the loads of K and V; where
// that leaves room (decode), several KV heads, whose K and V lie side by side in each block, if `join_kv_heads`.
void add_tiles(const AttentionArgs& a, int seq, bool join_kv_heads, std::vector<AttentionTile>* tiles) {
    const int token_begin = a.query_start[seq], num_tokens = a.query_start[seq + 1] - token_begin;
    const int heads_per_kv = a.num_heads / a.num_kv_heads;
    const int tile_heads = std::min(heads_per_kv, kMaxRows);
    const int tile_tokens = std::max(1, std::min(kMaxRows / tile_heads, num_tokens));
    const int fitting = join_kv_heads ? kMaxRows / (tile_heads * tile_tokens) : 1;
    const int tile_kv_heads = heads_per_kv > kMaxRows ? 1 : std::min(fitting, a.num_kv_heads);
    const int first_position = a.seq_lens[seq] - num_tokens;
    for (int kv_head = 0; kv_head < a.num_kv_heads; kv_head += tile_kv_heads) {
        for (int token = 0; token < num_tokens; token += tile_tokens) {
            const int tokens = std::min(tile_tokens, num_tokens - token), position = first_position + token;
            for (int head = 0; head < heads_per_kv; head += tile_heads) {
                AttentionTile t;
                t.seq = seq;
                t.token_begin = token_begin + token;
                t.num_tokens = tokens;
                t.first_position = position;
                t.kv_head = kv_head;
                t.num_kv_heads = std::min(tile_kv_heads, a.num_kv_heads - kv_head);
                t.head_begin = kv_head * heads_per_kv + head;
                t.num_heads = std::min(tile_heads, heads_per_kv - head);
                t.key_begin = first_key(position, a.window);
                t.key_end = position + tokens;
                t.chunk_begin = t.key_begin / kChunkKeys;
                t.chunk_end = (t.key_end + kChunkKeys - 1) / kChunkKeys;
                tiles->push_back(t);
            }
        }
    }
}

}  // namespace

BatchCheck check_batch(const AttentionArgs& a) {
    if (a.query_start[0] != 0) return {BatchError::kQueryStart, 0, a.query_start[0]};
    for (int seq = 0; seq < a.num_seqs; ++seq) {
        const int num_tokens = a.query_start[seq + 1] - a.query_start[seq];
        if (num_tokens < 0 || a.query_start[seq + 1] > a.num_tokens)
            return {BatchError::kQueryStart, seq, a.query_start[seq + 1]};
        if (num_tokens == 0) continue;
        const int length = a.seq_lens[seq];
        if (length < num_tokens) return {BatchError::kSeqLen, seq, length};
        const int first = first_key(length - num_tokens, a.window) / a.block_size, last = (length - 1) / a.block_size;
        if (last >= a.table_stride) return {BatchError::kTableTooShort, seq, length};
        const int32_t* table = a.block_table + seq * a.table_stride;
        for (int i = first; i <= last; ++i)
            if (table[i] < 0 || table[i] >= a.num_blocks) return {BatchError::kBlockIndex, seq, table[i]};
    }
    return {BatchError::kNone, 0, 0};
}

AttentionPlan plan_attention(const AttentionArgs& a, int num_threads) {
    AttentionPlan plan;
    const bool join_kv_heads = a.num_heads / a.num_kv_heads <= kJoinedHeads &&
                               (num_threads == 1 || a.num_seqs >= num_threads * kItemsPerThread);
    for (int seq = 0; seq < a.num_seqs; ++seq) add_tiles(a, seq, join_kv_heads, &plan.tiles);
    int64_t total = 0;
    for (const AttentionTile& t : plan.tiles) total += cost_of(a, t);
    plan.num_threads = static_cast<int>(std::clamp<int64_t>(total / kCostPerThread, 1, num_threads));
    const int64_t share = total / (static_cast<int64_t>(plan.num_threads) * kItemsPerThread);
    for (int32_t i = 0; i < static_cast<int32_t>(plan.tiles.size()); ++i) {
        const AttentionTile& t = plan.tiles[i];
        if (plan.num_threads == 1 || t.num_chunks() == 1 || cost_of(a, t) <= share) {
            plan.items.push_back({i, t.chunk_begin, t.chunk_end, -1});
            continue;
        }
        for (int chunk = t.chunk_begin; chunk < t.chunk_end; ++chunk)
            plan.items.push_back({i, chunk, chunk + 1, plan.num_states});
        plan.num_states += t.num_chunks();
    }
    return plan;
}

}  // namespace afd
