// The vector part of sampling. Included once by each sample_*.cpp, compiled with that set's flags and without fused
// multiply-adds, so that every instruction set gives the same bits.
#pragma once

#if AFD_LANES == 4 && defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "rounding.h"
#include "sample.h"

namespace AFD_ISA {
namespace {

using afd::kGroup;
using afd::kLanesOfGroup;

constexpr int kVectors = kGroup / kLanes;
constexpr int kLineFloats = 16;               // of a line of memory
constexpr int kSummed = kVectors < 8 ? kVectors : 8;  // vectors of masses whose sums fit 32 bits

typedef uint64_t Vq __attribute__((vector_size(AFD_LANES * 4)));

// The bits of the lanes' signs.
AFD_INLINE uint32_t sign_bits(Vi v) {
#if AFD_LANES == 16
    return _mm512_movepi32_mask((__m512i)v);
#elif AFD_LANES == 8
    return static_cast<uint32_t>(_mm256_movemask_ps((__m256)v));
#else
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(v[i] < 0) << i;
    return bits;
#endif
}

// The group's elements; of one that is not whole a copy, filled up with what has no weight.
AFD_INLINE const float* elements_of(const float* x, int32_t width, int32_t group, float* room) {
    const int32_t begin = group * kGroup;
    if (width - begin >= kGroup) return x + begin;
    for (int i = 0; i < kGroup; ++i) room[i] = i < width - begin ? x[begin + i] : -__builtin_inff();
    return room;
}

bool scan(const float* x, int32_t width, afd::GroupRange groups, float* highest) {
    float room[kGroup];
    Vi unordered = {};
    for (int32_t group = groups.begin; group < groups.end; ++group) {
        const float* const from = elements_of(x, width, group, room);
        Vf most = load_vector<Vf>(from);
        unordered |= most != most;
        for (int i = 1; i < kVectors; ++i) {
            const Vf v = load_vector<Vf>(from + i * kLanes);
            unordered |= v != v;
            most = max_of(most, v);
        }
        highest[group] = max_lane(most);
    }
    return sign_bits(unordered) != 0;
}

// 2^power as a polynomial times a power of two, for powers of at least -125, by operations in a fixed order.
struct Power {
    Vf polynomial;
    Vi shifted;  // the whole part, in the lowest bits
};
AFD_INLINE Power power_of(Vf power, float magic) {  // magic: 1.5 * 2^23, to which adding rounds, and what is to be added
    const Vf shifted = power + magic, r = power - (shifted - magic), squared = r * r;
    const Vf high = 9.67151299e-3f + 1.32647273e-3f * r, middle = 2.40222424e-1f + 5.55073358e-2f * r;
    return {(1.0f + 6.93147004e-1f * r) + squared * (middle + squared * high), (Vi)shifted};
}
constexpr float kMagic = 12582912.0f;

// x of a token -> power of two that its weight is.
AFD_INLINE Vf powers_of(Vf x, Vf largest, Vf scale) { return (x - largest) * scale; }

AFD_INLINE Vf weights_of(Vf power) {
    const Vf lowest = splat(-125.0f);
    const Power p = power_of(max_of(power, lowest), kMagic);
    const Vf weight = (Vf)((Vi)p.polynomial + (p.shifted << 23));
    return power < lowest ? Vf{} : weight;
}

// The same in units of 1 / kOneMass, rounded.
AFD_INLINE Vi masses_of(Vf power) {
    constexpr int kBits = __builtin_ctz(afd::kOneMass);
    const Power p = power_of(max_of(power, splat(-125.0f)), kMagic + kBits);
    return nearest((Vf)((Vi)p.polynomial + (p.shifted << 23)));
}

void weigh(const float* x, int32_t count, float largest, float scale, float* weights) {
    const Vf most = splat(largest), by = splat(scale);
    int32_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        store_vector(weights + i, weights_of(powers_of(load_vector<Vf>(x + i), most, by)));
    if (i == count) return;
    float room[kLanes] = {};
    std::memcpy(room, x + i, sizeof(float) * (count - i));
    store_vector(room, weights_of(powers_of(load_vector<Vf>(room), most, by)));
    std::memcpy(weights + i, room, sizeof(float) * (count - i));
}

#if AFD_LANES == 8
// For each choice of lanes their numbers, one a byte.
struct LaneLists {
    uint64_t of[256];
    constexpr LaneLists() : of() {
        for (int bits = 0; bits < 256; ++bits)
            for (int lane = 0, at = 0; lane < 8; ++lane)
                if ((bits >> lane & 1) != 0) of[bits] |= static_cast<uint64_t>(lane) << 8 * at++;
    }
};
constexpr LaneLists kLaneLists;
#endif

// first + the numbers of the lanes in `bits` to `out`, which has room for all lanes -> how many there are.
AFD_INLINE int32_t store_lanes(int32_t first, uint32_t bits, int32_t* out) {
#if AFD_LANES == 16
    const __m512i lanes = _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), (__m512i)lane_index());
    _mm512_storeu_si512(out, _mm512_add_epi32(lanes, _mm512_set1_epi32(first)));
#elif AFD_LANES == 8
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(kLaneLists.of[bits])));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_add_epi32(lanes, _mm256_set1_epi32(first)));
#else
    int32_t* at = out;
    for (uint32_t left = bits; left != 0; left &= left - 1) *at++ = first + __builtin_ctz(left);
#endif
    return __builtin_popcount(bits);
}

// Adds 32-bit lanes to 64-bit ones.
AFD_INLINE Vq widened(Vq sums, Vi v) { return sums + ((Vq)v & 0xffffffffu) + ((Vq)v >> 32); }

AFD_INLINE int64_t lanes_of(Vq v) {
    uint64_t sum = 0;
    for (int i = 0; i < kLanes / 2; ++i) sum += v[i];
    return static_cast<int64_t>(sum);
}

// One group: adds to what was found. Least: there are masses that do not count.  Wanted: it may have elements in [low, high),
// or above.
template <bool kLeast, bool kWanted>
AFD_INLINE void add_masses(const afd::MassArgs& a, const float* from, int32_t place, Vq& total, Vq& above,
                           int32_t& num_found) {
    const Vf largest = splat(a.largest), scale = splat(a.scale), low = splat(a.low), high = splat(a.high);
    const Vi below_least = Vi{} + (a.least - 1);
    for (int first = 0; first < kVectors; first += kSummed) {
        Vi sum = {}, sum_above = {};
        AFD_UNROLL
        for (int i = first; i < first + kSummed; ++i) {
            const Vf x = load_vector<Vf>(from + i * kLanes);
            Vi mass = masses_of(powers_of(x, largest, scale));
            if (kLeast) mass &= mass > below_least;
            sum += mass;
            if (!kWanted) continue;
            const Vi over = x >= high;
            sum_above += mass & over;
            const uint32_t inside = sign_bits((x >= low) & ~over);
            num_found += store_lanes(place + i * kLanes, inside, a.found + num_found);
        }
        total = widened(total, sum);
        if (kWanted) above = widened(above, sum_above);
    }
}

template <bool kLeast>
afd::MassSums add_groups(const afd::MassArgs& a, afd::GroupRange groups) {
    float room[kGroup];
    Vq total = {}, above = {};
    int32_t num_found = 0;
    for (int32_t group = groups.begin; group < groups.end; ++group) {
        const float* const from = elements_of(a.x, a.width, group, room);
        if (a.after != nullptr && (group + 1) * kGroup <= a.width)
            for (int32_t i = group * kGroup; i < (group + 1) * kGroup; i += kLineFloats)
                __builtin_prefetch(a.after + i, 0, 2);
        constexpr float kNone = -30;  // a power that has no mass, roundings included
        if (a.highest[group] < a.low && (a.highest[group] - a.largest) * a.scale < kNone) continue;
        if (a.highest[group] >= a.low)
            add_masses<kLeast, true>(a, from, group * kGroup, total, above, num_found);
        else
            add_masses<kLeast, false>(a, from, group * kGroup, total, above, num_found);
    }
    while (num_found > 0 && a.found[num_found - 1] >= a.width) --num_found;  // of the filling
    return {lanes_of(total), lanes_of(above), num_found};
}

afd::MassSums sum_masses(const afd::MassArgs& a, afd::GroupRange groups) {
    return a.least > 0 ? add_groups<true>(a, groups) : add_groups<false>(a, groups);
}

// The product of the lower halves of 64 bits.
AFD_INLINE Vq product_of(Vq a, Vq b) {
#if AFD_LANES == 16
    return (Vq)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif AFD_LANES == 8
    return (Vq)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (Vq)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

AFD_INLINE Vq splat_words(uint32_t word) { return Vq{} + word; }

// Words in the lower halves; what is above is not looked at.
struct PhiloxBlocks {
    Vq c0, c1, c2, c3;

    AFD_INLINE void turn(Vq k0, Vq k1) {
        const Vq p0 = product_of(c0, splat_words(0xD2511F53u)), p1 = product_of(c2, splat_words(0xCD9E8D57u));
        c0 = (p1 >> 32) ^ c1 ^ k0;
        c1 = p1;
        c2 = (p0 >> 32) ^ c3 ^ k1;
        c3 = p0;
    }
};

AFD_INLINE void store_words(Vq even, Vq odd, uint32_t* words) {
    store_vector(words, (even & 0xffffffffu) | (odd << 32));
}

void random(const uint32_t* first, const uint32_t* counter, uint64_t key, uint32_t (*words)[kLanesOfGroup]) {
    const Vq c1 = splat_words(counter[0]), c2 = splat_words(counter[1]), c3 = splat_words(counter[2]);
    for (int i = 0; i < kLanesOfGroup; i += kLanes) {
        const Vq pairs = load_vector<Vq>(first + i);
        PhiloxBlocks even = {pairs, c1, c2, c3}, odd = {pairs >> 32, c1, c2, c3};
        uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
        for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
            even.turn(splat_words(k0), splat_words(k1));
            odd.turn(splat_words(k0), splat_words(k1));
        }
        store_words(even.c0, odd.c0, words[0] + i);
        store_words(even.c1, odd.c1, words[1] + i);
        store_words(even.c2, odd.c2, words[2] + i);
        store_words(even.c3, odd.c3, words[3] + i);
    }
}

constexpr afd::SampleTable make_sample_table() { return {scan, weigh, sum_masses, random}; }

}  // namespace
}  // namespace AFD_ISA
