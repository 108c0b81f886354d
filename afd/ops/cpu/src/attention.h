// Attention of one tile of query rows over the blocks of a paged KV cache: flash-style online softmax, float32 sums.
//
// A tile of `Keys` keys goes through three stages, each reading K or V once for all rows:
//   pack        K transposed, so that one vector holds the same dimension(s) of kLanes keys: scores come out as
//               vectors over keys, without horizontal sums
//   score       rows x keys products, then scale, mask, maximum, 2^x
//               With few query heads for a KV head and no bf16 dot product there is no transpose: it costs more than
//               the sums it saves (`score_direct`).
//   accumulate  acc += weight * V
// Every row sees the same arithmetic in the same order wherever it stands in a tile and however the keys are split
// among threads: keys are cut at multiples of Keys and kChunkKeys from position 0, and a tile in which the row sees
// nothing leaves its state as it was. So a token's result does not depend on its batch or on the number of threads.
#pragma once

#include "attention_stages.h"

namespace AFD_ISA {

// ---- one tile of rows ----------------------------------------------------------------------------------------

template <class T>
struct Scratch {
    typename Operand<T>::Word *q, *keys;
    float *scores, *factors;
    SoftmaxState chunk;

    static size_t bytes(const AttentionArgs& a) {
        const size_t words = static_cast<size_t>(a.head_dim / Operand<T>::kPerWord);
        return 4 * (words * (kMaxRows + kMaxKeys) + kMaxRows * (kMaxKeys + 1)) + 4 * state_size(a);
    }
    static size_t state_size(const AttentionArgs& a) { return static_cast<size_t>(kMaxRows) * (2 + padded(a.v_dim)); }

    Scratch(const AttentionArgs& a, void* memory);
};

AFD_INLINE SoftmaxState make_state(float* memory) { return {memory, memory + kMaxRows, memory + 2 * kMaxRows}; }

template <class T>
Scratch<T>::Scratch(const AttentionArgs& a, void* memory) {
    typedef typename Operand<T>::Word Word;
    const size_t words = static_cast<size_t>(a.head_dim / Operand<T>::kPerWord);
    q = static_cast<Word*>(memory);
    keys = q + words * kMaxRows;
    scores = reinterpret_cast<float*>(keys + words * kMaxKeys);
    factors = scores + kMaxRows * kMaxKeys;
    chunk = make_state(factors + kMaxRows);
}

// direct: for score_direct, in the lane order of a chunk of keys.
template <class T>
void load_queries(const AttentionArgs& a, const AttentionTile& t, bool direct, typename Operand<T>::Word* q) {
    const int dim = a.head_dim;
    for (int row = 0; row < t.num_rows(); ++row) {
        const T* from =
            static_cast<const T*>(a.q) + t.token_of(row) * a.q_stride + static_cast<int64_t>(t.head_of(row)) * dim;
        if (direct) {
            for (int i = 0; i < dim; i += kChunk) store(reinterpret_cast<float*>(q) + row * dim + i, load(from + i));
        } else if (Operand<T>::kPerWord == 2 || sizeof(T) == 4) {
            std::memcpy(q + row * (dim / Operand<T>::kPerWord), from, static_cast<size_t>(dim) * sizeof(T));
        } else {
            for (int i = 0; i < dim; ++i) q[row * dim + i] = to_float(from[i]);
        }
    }
}

// Rows are taken kRowTile at a time, as evenly as they divide: 9 rows are 5 + 4.
template <class Function>
AFD_INLINE void for_row_groups(int num_rows, Function function) {
    const int groups = (num_rows + kRowTile - 1) / kRowTile;
    for (int g = 0, row = 0; g < groups; ++g) {
        const int count = (num_rows - row + groups - g - 1) / (groups - g);
        function(row, count);
        row += count;
    }
}

#define AFD_BY_ROWS(COUNT, CALL) \
    switch (COUNT) {             \
        case 1:                  \
            CALL(1);             \
            break;               \
        case 2:                  \
            CALL(2);             \
            break;               \
        case 3:                  \
            CALL(3);             \
            break;               \
        case 4:                  \
            CALL(4);             \
            break;               \
        case 5:                  \
            CALL(5);             \
            break;               \
        default:                 \
            CALL(6);             \
    }

// Where the 8-key groups of one KV head lie in one tile of keys.
template <class T, int Keys>
struct TileGroups {
    static constexpr int kGroups = Keys / kKeyGroup;
    const T *k[kGroups], *v[kGroups];

    // Of the h-th KV head of range.tile. Groups without a key in the range repeat a valid one: their block may be gone
    // (behind a window) or not be there yet.
    void find(const AttentionArgs& a, const afd::TileRange& range, int h, int tile_key) {
        const int begin = range.begin > tile_key ? range.begin - tile_key : 0;
        const int end = range.end < tile_key + Keys ? range.end - tile_key : Keys;
        const int first = begin / kKeyGroup, last = (end - 1) / kKeyGroup, kv_head = range.tile->kv_head + h;
        const int key = tile_key + first * kKeyGroup;
        const int32_t* block = a.block_table + range.tile->seq * a.table_stride + key / a.block_size;
        int offset = key % a.block_size;
        for (int g = first; g <= last; ++g) {
            const int64_t row = (static_cast<int64_t>(*block) * a.num_kv_heads + kv_head) * a.block_size + offset;
            k[g] = static_cast<const T*>(a.k_cache) + row * a.head_dim;
            v[g] = static_cast<const T*>(a.v_cache) + row * a.v_dim;
            offset += kKeyGroup;
            if (offset == a.block_size) {
                offset = 0;
                ++block;
            }
        }
        for (int g = 0; g < kGroups; ++g) {
            const int valid = g < first ? first : g > last ? last : g;
            k[g] = k[valid];
            v[g] = v[valid];
        }
    }

    // What will be read, in that order, groups that touch as one run. Returns how many there are, at most 2 * kGroups.
    int list_runs(const AttentionArgs& a, Run* runs) const {
        const int num_k = join_groups(k, kKeyGroup * a.head_dim, runs);
        return num_k + join_groups(v, kKeyGroup * a.v_dim, runs + num_k);
    }

  private:
    static int join_groups(const T* const* groups, int size, Run* runs) {
        int count = 0;
        for (int g = 0; g < kGroups; ++g) {
            if (g > 0 && groups[g] == groups[g - 1] + size)
                runs[count - 1].bytes += size * static_cast<int>(sizeof(T));
            else
                runs[count++] = {reinterpret_cast<const char*>(groups[g]), size * static_cast<int>(sizeof(T))};
        }
        return count;
    }
};

// K and V of the whole blocks in a tile of keys, and of the pieces of blocks at its two ends for every KV head.
template <int Keys>
constexpr int kMaxRuns = 2 * (Keys / kKeyGroup + 2 * kMaxRows);

// K and V of all KV heads of range.tile in one tile of keys, in the order of memory: of whole blocks the KV heads lie
// side by side.
template <class T, int Keys>
int list_runs(const AttentionArgs& a, const afd::TileRange& range, int tile_key, Run* runs) {
    const int begin = (range.begin > tile_key ? range.begin : tile_key) / kKeyGroup * kKeyGroup;
    const int end = range.end < tile_key + Keys ? range.end : tile_key + Keys;
    const int num_heads = range.tile->num_kv_heads;
    int count = 0;
    for (int values = 0; values < 2; ++values) {
        const char* cache = static_cast<const char*>(values ? a.v_cache : a.k_cache);
        const int64_t row_bytes = (values ? a.v_dim : a.head_dim) * static_cast<int64_t>(sizeof(T));
        for (int key = begin, keys; key < end; key += keys) {
            const int offset = key % a.block_size;
            keys = a.block_size - offset < end - key ? a.block_size - offset : end - key;
            const int32_t block = a.block_table[range.tile->seq * a.table_stride + key / a.block_size];
            const int64_t row = (static_cast<int64_t>(block) * a.num_kv_heads + range.tile->kv_head) * a.block_size + offset;
            if (keys == a.block_size) {
                runs[count++] = {cache + row * row_bytes, num_heads * keys * row_bytes};
            } else {
                for (int h = 0; h < num_heads; ++h)
                    runs[count++] = {cache + (row + h * a.block_size) * row_bytes, keys * row_bytes};
            }
        }
    }
    return count;
}

// Steps of the inner loops for one KV head over the keys [lo, hi) of a tile, over which the prefetches are spread.
template <class T, int Keys, bool Direct>
int64_t inner_steps(const AttentionArgs& a, int rows, int lo, int hi) {
    const int words = a.head_dim / Operand<T>::kPerWord, row_groups = (rows + kRowTile - 1) / kRowTile;
    const int tile = (rows <= 3 ? kChunkTile<3> : kChunkTile<kRowTile>) * kChunk, columns = (a.v_dim + tile - 1) / tile;
    const int score = words * (Keys / kLanes) / kVectorTile<Keys>, accumulate = (hi - lo + 1) / Operand<T>::kPerWord * columns;
    if (Direct) return static_cast<int64_t>(row_groups) * (hi * direct_steps<T>(a.head_dim) + accumulate);
    const int pack = a.head_dim * static_cast<int>(sizeof(T)) / 16 * ((hi + 15) / 16 * 16 / (AFD_LANES == 16 ? 16 : 4));
    return pack + static_cast<int64_t>(row_groups) * (score + accumulate);
}

// One KV head of the tile over the keys [lo, hi) after tile_key.
template <class T, int Keys, bool Direct>
AFD_INLINE void attend_tile(const AttentionArgs& a, const AttentionTile& t, int h, int tile_key, int lo, int hi,
                            const TileGroups<T, Keys>& groups, const Scratch<T>& s, Lookahead& ahead,
                            SoftmaxState state) {
    const int rows = t.rows_per_kv_head(), first_row = h * rows;
    const int words = a.head_dim / Operand<T>::kPerWord, acc_stride = padded(a.v_dim);
    const float scale = a.scale * kLog2e;
    const typename Operand<T>::Word* q = s.q + first_row * words;
    float* acc = state.acc + first_row * acc_stride;
    if constexpr (Direct) {
        for_row_groups(rows, [&](int row, int count) {
#define AFD_SCORE(R) \
    score_direct<T, Keys, R>(q + row * words, groups.k, hi, a.head_dim, ahead, s.scores + row * Keys)
            AFD_BY_ROWS(count, AFD_SCORE)
#undef AFD_SCORE
        });
    } else {
        for (int g = 0; g * kKeyGroup < hi; g += 2)
            pack_keys<T, Keys>(groups.k[g], groups.k[g + 1], a.head_dim, ahead, s.keys + g * kKeyGroup);
        for_row_groups(rows, [&](int row, int count) {
#define AFD_SCORE(R) score_rows<T, Keys, R>(q + row * words, s.keys, words, ahead, s.scores + row * Keys)
            AFD_BY_ROWS(count, AFD_SCORE)
#undef AFD_SCORE
        });
    }
    for (int r = 0; r < rows; ++r) {
        const int visible_end = t.first_position + r / t.num_heads + 1 - tile_key;
        const int visible_begin = a.window > 0 && visible_end - a.window > lo ? visible_end - a.window : lo;
        s.factors[r] = soften_row<T, Keys>(s.scores + r * Keys, visible_begin, visible_end < hi ? visible_end : hi,
                                           scale, state.max + first_row + r, state.sum + first_row + r);
    }
    for (int strip = 0; strip < a.v_dim; strip += kStrip)
        for_row_groups(rows, [&](int row, int count) {
#define AFD_ACCUMULATE_ROWS(R)                                                                                    \
    accumulate_rows<T, Keys, R>(groups.v, lo, hi, a.v_dim, strip, ahead, s.scores + row * Keys, s.factors + row, \
                                acc + row * acc_stride, acc_stride)
            AFD_BY_ROWS(count, AFD_ACCUMULATE_ROWS)
#undef AFD_ACCUMULATE_ROWS
        });
}

// The keys [begin, end), which lie in one chunk. Prefetches up to fetch_end, and then what `next` begins with.
template <class T, int Keys, bool Direct>
void attend_keys(const AttentionArgs& a, const AttentionTile& t, int begin, int end, int fetch_end,
                 const afd::TileRange& next, const Scratch<T>& s, SoftmaxState state) {
    const int rows = t.num_rows(), acc_stride = padded(a.v_dim);
    for (int r = 0; r < rows; ++r) {
        state.max[r] = kMinusInfinity;
        state.sum[r] = 0;
    }
    std::memset(state.acc, 0, static_cast<size_t>(rows) * acc_stride * sizeof(float));

    // A step is one KV head in one tile of keys. What the next step reads is fetched during this one; without a
    // transpose, during all steps of a tile what the next tile reads, in the order of memory: there the work is so
    // little that memory decides, which gives more in long runs.
    const afd::TileRange here{&t, begin, fetch_end};
    TileGroups<T, Keys> groups[2];
    Run runs[kMaxRuns<Keys>];
    int side = 0;
    groups[0].find(a, here, 0, begin / Keys * Keys);
    for (int tile_key = begin / Keys * Keys; tile_key < end; tile_key += Keys) {
        const int next_key = tile_key + Keys;
        const int lo = begin > tile_key ? begin - tile_key : 0, hi = (end < next_key ? end : next_key) - tile_key;
        const int64_t num_steps = inner_steps<T, Keys, Direct>(a, t.rows_per_kv_head(), lo, hi);
        const bool more = next_key < fetch_end;
        const afd::TileRange& then = more ? here : next;
        const int then_key = more ? next_key : next.begin / Keys * Keys;
        Lookahead ahead;
        if (Direct && then.tile != nullptr)
            ahead = Lookahead(runs, list_runs<T, Keys>(a, then, then_key, runs), num_steps * t.num_kv_heads);
        for (int h = 0; h < t.num_kv_heads; ++h, side ^= 1) {
            const bool same_tile = h + 1 < t.num_kv_heads;
            if (same_tile)
                groups[side ^ 1].find(a, here, h + 1, tile_key);
            else if (then.tile != nullptr)
                groups[side ^ 1].find(a, then, 0, then_key);
            if (!Direct && (same_tile || then.tile != nullptr))
                ahead = Lookahead(runs, groups[side ^ 1].list_runs(a, runs), num_steps);
            attend_tile<T, Keys, Direct>(a, t, h, tile_key, lo, hi, groups[side], s, ahead, state);
        }
    }
}

// into = the softmax over the keys of both.
inline void merge_states(const AttentionArgs& a, int num_rows, SoftmaxState into, SoftmaxState from) {
    const int stride = padded(a.v_dim);
    for (int r = 0; r < num_rows; ++r) {
        if (from.max[r] == kMinusInfinity) continue;  // the row sees no key of `from`
        const float max = into.max[r] > from.max[r] ? into.max[r] : from.max[r];
        const float x = exp2_of(into.max[r] - max), y = exp2_of(from.max[r] - max);
        into.max[r] = max;
        into.sum[r] = into.sum[r] * x + from.sum[r] * y;
        float* p = into.acc + r * stride;
        const float* q = from.acc + r * stride;
        for (int i = 0; i < stride; i += kLanes)
            store_vector(p + i, load_vector<Vf>(p + i) * x + load_vector<Vf>(q + i) * y);
    }
}

// By the model's shape alone, since it changes the rounding. Decode takes 0.6 to 0.9 of the time, a prefill 1.1 times.
AFD_INLINE bool scores_directly(const AttentionArgs& a) {
    constexpr int kDirectHeads = 8;  // for each KV head: with 12 both ways take as long
    return AFD_LANES < 16 && a.head_dim % kChunk == 0 && a.num_heads / a.num_kv_heads <= kDirectHeads;
}

template <class T>
void attend_chunks(const AttentionArgs& a, const AttentionTile& t, int begin, int end, const afd::TileRange& next,
                   SoftmaxState state, void* memory) {
    const Scratch<T> scratch(a, memory);
    const bool direct = scores_directly(a);
    load_queries<T>(a, t, direct, scratch.q);
    // Two tiles of K and V and the packed K have to fit into the L1 cache, or the prefetched one falls out before it is
    // used. With many rows the arithmetic counts, not the memory, and a large tile has less overhead. A choice by the
    // model's shape alone: it changes the rounding.
    const bool large = a.head_dim <= 64 || a.num_heads / a.num_kv_heads >= 32;
    auto attend = large ? attend_keys<T, kMaxKeys, false> : attend_keys<T, kMaxKeys / 2, false>;
#if AFD_LANES < 16
    if (direct) attend = large ? attend_keys<T, kMaxKeys, true> : attend_keys<T, kMaxKeys / 2, true>;
#endif
    const int item_end = end * kChunkKeys < t.key_end ? end * kChunkKeys : t.key_end;
    for (int chunk = begin; chunk < end; ++chunk) {
        const int first = chunk * kChunkKeys, last = first + kChunkKeys;
        attend(a, t, first > t.key_begin ? first : t.key_begin, last < item_end ? last : item_end, item_end, next, scratch,
               chunk == begin ? state : scratch.chunk);
        if (chunk != begin) merge_states(a, t.num_rows(), state, scratch.chunk);
    }
}

template <class T>
void write_rows(const AttentionArgs& a, const AttentionTile& t, SoftmaxState state) {
    const int stride = padded(a.v_dim);
    for (int r = 0; r < t.num_rows(); ++r) {
        T* out = static_cast<T*>(a.out) + t.token_of(r) * a.out_stride + static_cast<int64_t>(t.head_of(r)) * a.v_dim;
        const float inverse = 1.0f / state.sum[r];
        for (int i = 0; i < a.v_dim; i += kChunk) {
            const float* p = state.acc + r * stride + i;
            const Chunk c = {load_vector<Vf>(p) * inverse, load_vector<Vf>(p + kLanes) * inverse};
            if (i + kChunk <= a.v_dim)
                store(out + i, c);
            else
                store_part(out + i, c, a.v_dim - i);
        }
    }
}

}  // namespace AFD_ISA
