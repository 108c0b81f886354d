// Row-wise kernels: KV write, RoPE, RMSNorm, SwiGLU. Float32 inside, one rounding on the way out.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace AFD_ISA {

// Calls whole(i) for each full chunk of `width` elements and part(i, n) for the rest.
template <class Whole, class Part>
AFD_INLINE void for_chunks(int width, Whole whole, Part part) {
    int i = 0;
    for (; i + kChunk <= width; i += kChunk) whole(i);
    if (i < width) part(i, width - i);
}

template <class T>
AFD_INLINE T* slot_of(void* cache, const afd::KvWriteArgs& a, int64_t slot, int head, int dim) {
    const int64_t block = slot / a.block_size, offset = slot % a.block_size;
    return static_cast<T*>(cache) + ((block * a.num_kv_heads + head) * a.block_size + offset) * dim;
}

AFD_INLINE Chunk operator+(Chunk x, Chunk y) { return {x.a + y.a, x.b + y.b}; }
AFD_INLINE Chunk operator-(Chunk x, Chunk y) { return {x.a - y.a, x.b - y.b}; }
AFD_INLINE Chunk operator*(Chunk x, Chunk y) { return {x.a * y.a, x.b * y.b}; }
AFD_INLINE Chunk operator*(Chunk x, float y) { return {x.a * y, x.b * y}; }

// One head with its first 2 * half elements rotated: pairs are (i, i + half). in == out is allowed here and below: a
// pair is read before it is written, and belongs to no other.
template <class T>
void rotate_halves(const T* in, const float* cos, const float* sin, int half, T* out) {
    int i = 0;
    for (; i + kChunk <= half; i += kChunk) {
        const Chunk x = load(in + i), y = load(in + i + half), c = load_for(in, cos + i), s = load_for(in, sin + i);
        store(out + i, x * c - y * s);
        store(out + i + half, y * c + x * s);
    }
    for (; i < half; ++i) {
        const float x = to_float(in[i]), y = to_float(in[i + half]);
        from_float(x * cos[i] - y * sin[i], out + i);
        from_float(y * cos[i] + x * sin[i], out + i + half);
    }
}

// The same for pairs (2 i, 2 i + 1).
template <class T>
void rotate_interleaved(const T* in, const float* cos, const float* sin, int half, T* out) {
    int i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        const Chunk xy = pairs_of(in, load(in + 2 * i));
        const Vf c = load_vector<Vf>(cos + i), s = load_vector<Vf>(sin + i);
        store(out + 2 * i, of_pairs(in, {xy.a * c - xy.b * s, xy.b * c + xy.a * s}));
    }
    for (; i < half; ++i) {
        const float x = to_float(in[2 * i]), y = to_float(in[2 * i + 1]);
        from_float(x * cos[i] - y * sin[i], out + 2 * i);
        from_float(y * cos[i] + x * sin[i], out + 2 * i + 1);
    }
}

template <class T>
AFD_INLINE void rotate_head(const T* in, const float* cos, const float* sin, int half, bool interleaved, T* out) {
    if (interleaved)
        rotate_interleaved(in, cos, sin, half, out);
    else
        rotate_halves(in, cos, sin, half, out);
}

template <class T>
void rope_write_kv(const afd::RopeArgs& r, const afd::KvWriteArgs& a) {
    const int rest = a.head_dim - 2 * r.half;
    for (int t = 0; t < a.num_tokens; ++t) {
        const float* cos = r.cos + static_cast<int64_t>(t) * r.half;
        const float* sin = r.sin + static_cast<int64_t>(t) * r.half;
        T* q = static_cast<T*>(r.q) + t * r.q_stride;
        for (int h = 0; h < r.num_heads; ++h)
            rotate_head(q + h * a.head_dim, cos, sin, r.half, r.interleaved, q + h * a.head_dim);
        const int64_t slot = a.slots[t];
        if (slot < 0) continue;
        const T* k = static_cast<const T*>(a.k) + t * a.k_stride;
        const T* v = static_cast<const T*>(a.v) + t * a.v_stride;
        for (int h = 0; h < a.num_kv_heads; ++h) {
            const T* from = k + h * a.head_dim;
            T* to = slot_of<T>(a.k_cache, a, slot, h, a.head_dim);
            rotate_head(from, cos, sin, r.half, r.interleaved, to);
            std::memcpy(to + 2 * r.half, from + 2 * r.half, sizeof(T) * rest);
            std::memcpy(slot_of<T>(a.v_cache, a, slot, h, a.v_dim), v + h * a.v_dim, sizeof(T) * a.v_dim);
        }
    }
}

template <class T>
AFD_INLINE void store_as(const T*, T* p, Chunk c) {
    store(p, c);
}
AFD_INLINE void store_as(const float*, bf16* p, Chunk c) { store(p, split_pairs(c)); }

template <class T, class P, class Out>
void add_rms_norm(const afd::NormArgs& a, int row_begin, int row_end) {
    const int width = a.width, whole = width / kChunk * kChunk;
    const float* weight = a.weight;
    for (int row = row_begin; row < row_end; ++row) {
        const int64_t partial_at = static_cast<int64_t>(row) * width;
        T* x = static_cast<T*>(a.x) + row * a.x_stride;
        Out* out = static_cast<Out*>(a.out) + row * a.out_stride;
        Chunk squares = {};
        float tail_squares = 0;
        for (int i = 0; i < whole; i += kChunk) {
            Chunk c = load(x + i);
            if (a.num_partials > 0) {
                for (int p = 0; p < a.num_partials; ++p)
                    c = c + load_for(x, static_cast<const P*>(a.partials[p]) + partial_at + i);
                store(x + i, c);
                c = load(x + i);  // the norm is of what the residual keeps
            }
            squares = squares + c * c;
        }
        for (int i = whole; i < width; ++i) {
            float value = to_float(x[i]);
            for (int p = 0; p < a.num_partials; ++p)
                value += to_float(static_cast<const P*>(a.partials[p])[partial_at + i]);
            from_float(value, x + i);
            tail_squares += to_float(x[i]) * to_float(x[i]);
        }
        const float mean = (sum_of(squares.a + squares.b) + tail_squares) / static_cast<float>(width);
        const float inverse = 1.0f / __builtin_sqrtf(mean + a.eps);
        for (int i = 0; i < whole; i += kChunk)
            store_as(x, out + i, load(x + i) * inverse * load_for(x, weight + i));
        for (int i = whole; i < width; ++i) from_float(to_float(x[i]) * inverse * weight[i], out + i);
    }
}

inline void add_bias(const afd::BiasArgs& a) {
    const bf16* const bias = static_cast<const bf16*>(a.bias);
    for (int row = 0; row < a.num_rows; ++row) {
        bf16* const x = static_cast<bf16*>(a.rows) + row * a.stride;
        for_chunks(
            a.width, [&](int i) { store(x + i, load(x + i) + load(bias + i)); },
            [&](int i, int n) { store_part(x + i, load_part(x + i, n) + load_part(bias + i, n), n); });
    }
}

inline void gate_heads(const afd::HeadGateArgs& a) {
    for (int row = 0; row < a.num_rows; ++row) {
        const bf16* const gates = static_cast<const bf16*>(a.gates) + row * a.gate_stride;
        bf16* x = static_cast<bf16*>(a.heads) + static_cast<int64_t>(row) * a.num_heads * a.dim;
        for (int head = 0; head < a.num_heads; ++head, x += a.dim) {
            const float power = to_float(gates[head]) * -1.44269504088896340736f;
            const float gate = 1.0f / (exp2_of(power < 125.0f ? power : 125.0f) + 1.0f);
            for_chunks(
                a.dim, [&](int i) { store(x + i, load(x + i) * gate); },
                [&](int i, int n) { store_part(x + i, load_part(x + i, n) * gate, n); });
        }
    }
}

inline void add_scaled_rows(const float* x, const float* scale, const int32_t* index, int num_rows, int width,
                            float* out) {
    for (int row = 0; row < num_rows; ++row, x += width) {
        float* const to = out + static_cast<int64_t>(index[row]) * width;
        const float factor = scale[row];
        for_chunks(
            width, [&](int i) { store(to + i, load(to + i) + load(x + i) * factor); },
            [&](int i, int n) { store_part(to + i, load_part(to + i, n) + load_part(x + i, n) * factor, n); });
    }
}

// silu(x) = x / (1 + e^-x), 0 below -86.6, where it is less than 2e-36.
AFD_INLINE Vf silu_of(Vf x) {
    const Vf power = x * -1.44269504088896340736f, highest = splat(125.0f);
    const Vf result = x / (exp2_of(min_of(power, highest)) + 1.0f);
    return power > highest ? Vf{} : result;
}

AFD_INLINE Vf gated(Vf gate, Vf up, float limit) {
    Vf g = silu_of(gate);
    if (limit > 0) {
        g = min_of(g, splat(limit));
        up = max_of(min_of(up, splat(limit)), splat(-limit));
    }
    return g * up;
}

template <class T, class Out>
void silu_mul(const afd::SiluMulArgs& a, int row_begin, int row_end) {
    for (int row = row_begin; row < row_end; ++row) {
        const T* gate = static_cast<const T*>(a.gate) + row * a.in_stride;
        const T* up = static_cast<const T*>(a.up) + row * a.in_stride;
        Out* out = static_cast<Out*>(a.out) + row * a.out_stride;
        const float limit = a.limit;
        for_chunks(
            a.width,
            [&](int i) {
                const Chunk g = load(gate + i), u = load(up + i);
                store_as(gate, out + i, {gated(g.a, u.a, limit), gated(g.b, u.b, limit)});
            },
            [&](int i, int n) {
                const Chunk g = load_part(gate + i, n), u = load_part(up + i, n);
                Out buffer[kChunk];
                store_as(gate, buffer, {gated(g.a, u.a, limit), gated(g.b, u.b, limit)});
                std::memcpy(out + i, buffer, static_cast<size_t>(n) * sizeof(Out));
            });
    }
}

inline void row_max(const afd::RowMaxArgs& a, int row_begin, int row_end) {
    constexpr int kBlock = 1024;  // looked at again for the place, while it is in the cache
    for (int row = row_begin; row < row_end; ++row) {
        const float* const x = a.x + row * a.stride;
        float largest = a.largest[row];
        if (largest != largest) continue;
        int at = -1;
        for (int begin = 0; begin < a.width; begin += kBlock) {
            const int end = begin + kBlock < a.width ? begin + kBlock : a.width;
            Vf highest = splat(x[begin]);
            Vi unordered = {};
            int i = begin;
            for (; i + kLanes <= end; i += kLanes) {
                const Vf v = load_vector<Vf>(x + i);
                unordered |= v != v;
                highest = max_of(highest, v);
            }
            bool has_nan = false;
            for (int lane = 0; lane < kLanes; ++lane) has_nan |= unordered[lane] != 0;
            float block = max_lane(highest);
            for (; i < end; ++i) {
                has_nan |= x[i] != x[i];
                block = x[i] > block ? x[i] : block;
            }
            if (has_nan) {
                at = begin;
                while (x[at] == x[at]) ++at;
                largest = x[at];
                break;
            }
            if (block > largest) {
                largest = block;
                at = begin;
            }
        }
        if (at < 0) continue;
        if (largest == largest)
            while (x[at] != largest) ++at;
        a.largest[row] = largest;
        a.idx[row] = a.first + at;
    }
}

}  // namespace AFD_ISA
