// bf16 to integers, for the GEMMs over int8 weights.
#pragma once

#include "simd.h"

// GCC keeps an array of vectors in registers only if loops over it are unrolled before it looks at the array's uses.
#if defined(__clang__)
#define AFD_UNROLL _Pragma("unroll")
#else
#define AFD_UNROLL _Pragma("GCC unroll 16")
#endif

namespace AFD_ISA {

// To the nearest integer, to even from the middle.
AFD_INLINE Vi nearest(Vf x) {
#if AFD_LANES == 16
    return (Vi)_mm512_cvtps_epi32((__m512)x);
#elif AFD_LANES == 8
    return (Vi)_mm256_cvtps_epi32((__m256)x);
#else
    Vi v;
    for (int i = 0; i < kLanes; ++i) v[i] = static_cast<int32_t>(__builtin_lrintf(x[i]));
    return v;
#endif
}

// The bits of the largest magnitude of a row: among floats without a sign the order is that of their bits, and an
// infinity or a NaN is the largest.
AFD_INLINE int32_t largest_bits(const bf16* x, int k) {
    Vi largest = {};
    for (int i = 0; i < k; i += kChunk) {
        const Chunk c = k - i >= kChunk ? load(x + i) : load_part(x + i, k - i);
        const Vi a = (Vi)c.a & 0x7fffffff, b = (Vi)c.b & 0x7fffffff;
        largest = a > largest ? a : largest;
        largest = b > largest ? b : largest;
    }
    int32_t most = 0;
    for (int i = 0; i < kLanes; ++i) most = largest[i] > most ? largest[i] : most;
    return most;
}

AFD_INLINE Vi nearest_pairs(Chunk c, Vf factor) {
    return (nearest(c.a * factor) & 0xffff) | (nearest(c.b * factor) << 16);
}

// m rows in groups of `most` at most, as even as can be: where each begins.
struct RowGroups {
    int m, num;
    AFD_INLINE RowGroups(int m, int most) : m(m), num((m + most - 1) / most) {}
    AFD_INLINE int begin(int group) const { return m / num * group + (group < m % num ? group : m % num); }
};

// How numbers become integers of -most to most: times factor; times scale they are what they were. Not finite (one of them is
// infinite or no number): they are to become zeros, and scale is NaN.
struct Scaling {
    bool finite;
    float factor, scale;
};

AFD_INLINE Scaling scaling_of(const bf16* x, int count, float most) {
    constexpr int32_t kInfinity = 0x7f800000;
    constexpr float kSmallest = 0x1p-100f;  // of the largest magnitude: factors stay finite
    const int32_t bits = largest_bits(x, count);
    float largest;
    __builtin_memcpy(&largest, &bits, sizeof largest);
    const bool finite = bits < kInfinity;
    if (!finite || largest < kSmallest) largest = kSmallest;
    return {finite, most / largest, finite ? largest / most : __builtin_nanf("")};
}

}  // namespace AFD_ISA
