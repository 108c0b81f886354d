// Splits a batch into work items: (sequence, KV head, query rows, context chunk). Pure: arguments in, items out.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace afd {

// A piece of work for one thread. A tile that is not split is one item with all its chunks. A split tile is one item
// per chunk, whose states are merged in chunk order by whoever finishes last.
struct AttentionItem {
    int32_t tile, chunk_begin, chunk_end;
    int32_t first_state;  // index of the split tile's first partial state, or -1
};

struct AttentionPlan {
    std::vector<AttentionTile> tiles;
    std::vector<AttentionItem> items;
    int num_states = 0;
    int num_threads = 1;  // as many of those offered as have enough to do
};

// Why a batch is refused; `seq` and `value` say where.
enum class BatchError : int32_t { kNone = 0, kQueryStart = 1, kSeqLen = 2, kTableTooShort = 3, kBlockIndex = 4 };

struct BatchCheck {
    BatchError error;
    int32_t seq, value;
};

// Checks every index that the kernels will follow, so that a wrong block table is an error and not a crash.
BatchCheck check_batch(const AttentionArgs& args);

AttentionPlan plan_attention(const AttentionArgs& args, int num_threads);

}  // namespace afd
