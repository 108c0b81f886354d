// Vectors of the instruction set a translation unit is compiled for.
//
// Written once with GCC/Clang vector extensions; intrinsics appear only where the compiler cannot find the
// instruction by itself (bf16 dot product, masked loads, horizontal sums, transposes). The including file defines
//   AFD_ISA        namespace of this instruction set: the same code compiled for two of them must not share a symbol,
//                  or the linker would keep one copy and run AVX-512 code on a machine without it
//   AFD_LANES      float lanes of a vector: 16 (AVX-512), 8 (AVX2), 4 (SSE2, NEON)
//   AFD_BF16_DOT   1 if vdpbf16ps is there
// For the same reason only functions of this namespace are called here: no inline code of the C++ library.
#pragma once

#include <cstdint>
#include <cstring>

#if AFD_LANES > 4
#include <immintrin.h>
#endif

#define AFD_INLINE inline __attribute__((always_inline))

// The elements of a and b (numbered through) at the constant indices given; MASK is the integer vector of their size.
#if defined(__clang__)
#define AFD_SHUFFLE(MASK, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define AFD_SHUFFLE(MASK, a, b, ...) __builtin_shuffle(a, b, MASK{__VA_ARGS__})
#endif

#if AFD_LANES == 16
#define AFD_EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define AFD_ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define AFD_ZIP_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define AFD_ZIP_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif AFD_LANES == 8
#define AFD_EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14
#define AFD_ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15
#define AFD_ZIP_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define AFD_ZIP_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define AFD_EVEN_LANES 0, 2, 4, 6
#define AFD_ODD_LANES 1, 3, 5, 7
#define AFD_ZIP_LOW 0, 4, 1, 5
#define AFD_ZIP_HIGH 2, 6, 3, 7
#endif

namespace AFD_ISA {

constexpr int kLanes = AFD_LANES;

typedef float Vf __attribute__((vector_size(AFD_LANES * 4)));
typedef int32_t Vi __attribute__((vector_size(AFD_LANES * 4)));
typedef uint32_t Vu __attribute__((vector_size(AFD_LANES * 4)));
typedef float Quad __attribute__((vector_size(16)));
typedef int32_t Vi4 __attribute__((vector_size(16)));

struct bf16 {
    uint16_t bits;
};

// Two vectors that hold 2 * kLanes consecutive elements. A bf16 chunk is split into its even and odd elements (a
// shift and a mask, no shuffle); a float chunk into its first and second half. Sums and products do not care, and
// store() restores the order of the type it writes.
struct Chunk {
    Vf a, b;
};
constexpr int kChunk = 2 * kLanes;

// Vf{} + x would really add, for the sake of -0.
AFD_INLINE Vf splat(float x) {
#if AFD_LANES == 16
    return (Vf)_mm512_set1_ps(x);
#elif AFD_LANES == 8
    return (Vf)_mm256_set1_ps(x);
#else
    return Vf{x, x, x, x};
#endif
}

template <class V>
AFD_INLINE V load_vector(const void* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <class V>
AFD_INLINE void store_vector(void* p, V v) {
    __builtin_memcpy(p, &v, sizeof v);
}

AFD_INLINE Vf max_of(Vf a, Vf b) { return a > b ? a : b; }
AFD_INLINE Vf min_of(Vf a, Vf b) { return a < b ? a : b; }

AFD_INLINE Vi lane_index() {
    Vi v;
    for (int i = 0; i < kLanes; ++i) v[i] = i;
    return v;
}

// First `n` (0..kLanes) 32-bit words at p, zeros behind; reads nothing past them.
AFD_INLINE Vi load_words(const void* p, int n) {
#if AFD_LANES == 16
    return (Vi)_mm512_maskz_loadu_epi32((__mmask16)((1u << n) - 1), p);
#elif AFD_LANES == 8
    return (Vi)_mm256_maskload_epi32(static_cast<const int*>(p), (__m256i)(lane_index() < n));
#else
    Vi v = {};
    std::memcpy(&v, p, static_cast<size_t>(n) * 4);
    return v;
#endif
}

AFD_INLINE float sum_of(Vf v) {
#if AFD_LANES == 16
    return _mm512_reduce_add_ps((__m512)v);
#elif AFD_LANES == 8
    const Vf halves = v + AFD_SHUFFLE(Vi, v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    const Vf quarters = halves + AFD_SHUFFLE(Vi, halves, halves, 2, 3, 0, 1, 6, 7, 4, 5);
    return quarters[0] + quarters[1];
#else
    float s = 0;
    for (int i = 0; i < kLanes; ++i) s += v[i];
    return s;
#endif
}

AFD_INLINE float max_lane(Vf v) {
#if AFD_LANES == 16
    return _mm512_reduce_max_ps((__m512)v);
#elif AFD_LANES == 8
    const Vf halves = max_of(v, AFD_SHUFFLE(Vi, v, v, 4, 5, 6, 7, 0, 1, 2, 3));
    const Vf quarters = max_of(halves, AFD_SHUFFLE(Vi, halves, halves, 2, 3, 0, 1, 6, 7, 4, 5));
    return quarters[0] > quarters[1] ? quarters[0] : quarters[1];
#else
    float m = v[0];
    for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
    return m;
#endif
}

// Sums of four vectors: {sum(a), sum(b), sum(c), sum(d)}.
AFD_INLINE Quad sums_of(Vf a, Vf b, Vf c, Vf d) {
#if AFD_LANES == 16
    const __m512 A = (__m512)a, B = (__m512)b, C = (__m512)c, D = (__m512)d;
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(A, B), _mm512_unpackhi_ps(A, B));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(C, D), _mm512_unpackhi_ps(C, D));
    const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd),
                                      _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(abcd), 1)));
    return (Quad)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif AFD_LANES == 8
    const __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
    const __m256 abcd = _mm256_hadd_ps(ab, cd);
    return (Quad)_mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
#else
    return Quad{sum_of(a), sum_of(b), sum_of(c), sum_of(d)};
#endif
}

#if AFD_LANES < 16
// The sums of kLanes vectors, as one vector.
AFD_INLINE Vf lane_sums(const Vf* v) {
#if AFD_LANES == 8
    Vf pairs[4], quads[2];
    for (int i = 0; i < 4; ++i)
        pairs[i] = AFD_SHUFFLE(Vi, v[2 * i], v[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13) +
                   AFD_SHUFFLE(Vi, v[2 * i], v[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    for (int i = 0; i < 2; ++i)
        quads[i] = AFD_SHUFFLE(Vi, pairs[2 * i], pairs[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
                   AFD_SHUFFLE(Vi, pairs[2 * i], pairs[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return AFD_SHUFFLE(Vi, quads[0], quads[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           AFD_SHUFFLE(Vi, quads[0], quads[1], 4, 5, 6, 7, 12, 13, 14, 15);
#else
    const Vf first = AFD_SHUFFLE(Vi, v[0], v[1], 0, 4, 1, 5) + AFD_SHUFFLE(Vi, v[0], v[1], 2, 6, 3, 7);
    const Vf last = AFD_SHUFFLE(Vi, v[2], v[3], 0, 4, 1, 5) + AFD_SHUFFLE(Vi, v[2], v[3], 2, 6, 3, 7);
    return AFD_SHUFFLE(Vi, first, last, 0, 1, 4, 5) + AFD_SHUFFLE(Vi, first, last, 2, 3, 6, 7);
#endif
}
#endif

// ---- bf16 <-> float ------------------------------------------------------------------------------------------

AFD_INLINE Vf even_elements(Vi words) { return (Vf)(words << 16); }
AFD_INLINE Vf odd_elements(Vi words) { return (Vf)((Vu)words & 0xffff0000u); }

// Round to nearest even, in the upper half of each word; a NaN stays a NaN.
AFD_INLINE Vu round_bf16(Vf x) {
    const Vu bits = (Vu)x;
    const Vu rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return (Vi)(x == x) ? rounded : (bits | 0x00400000u);
}

AFD_INLINE float to_float(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
}
AFD_INLINE float to_float(float x) { return x; }

AFD_INLINE void from_float(float x, float* out) { *out = x; }
AFD_INLINE void from_float(float x, bf16* out) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    bits = x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : (bits | 0x00400000u);
    out->bits = static_cast<uint16_t>(bits >> 16);
}

AFD_INLINE void store_quad(float* p, Quad x) { store_vector(p, x); }
AFD_INLINE void store_quad(bf16* p, Quad x) {
    typedef uint32_t Words __attribute__((vector_size(16)));
    typedef uint16_t Halves __attribute__((vector_size(16)));
    const Words bits = (Words)x;
    const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const Words kept = (Vi4)(x == x) ? rounded : (bits | 0x00400000u);
    const Halves halves = (Halves)kept, packed = AFD_SHUFFLE(Halves, halves, halves, 1, 3, 5, 7, 1, 3, 5, 7);
    __builtin_memcpy(p, &packed, 4 * sizeof(bf16));
}

template <class T>
AFD_INLINE void store_quad_part(T* p, Quad x, int n) {
    T buffer[4];
    store_quad(buffer, x);
    std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

// ---- chunks --------------------------------------------------------------------------------------------------

AFD_INLINE Chunk load(const bf16* p) {
    const Vi words = load_vector<Vi>(p);
    return {even_elements(words), odd_elements(words)};
}
AFD_INLINE Chunk load(const float* p) { return {load_vector<Vf>(p), load_vector<Vf>(p + kLanes)}; }

AFD_INLINE void store(bf16* p, Chunk c) { store_vector(p, (round_bf16(c.a) >> 16) | (round_bf16(c.b) & 0xffff0000u)); }
AFD_INLINE void store(float* p, Chunk c) {
    store_vector(p, c.a);
    store_vector(p + kLanes, c.b);
}

// The lanes of a chunk of floats in the order of a chunk of bf16 (even elements, odd elements), and back.
AFD_INLINE Chunk split_pairs(Chunk c) {
    return {AFD_SHUFFLE(Vi, c.a, c.b, AFD_EVEN_LANES), AFD_SHUFFLE(Vi, c.a, c.b, AFD_ODD_LANES)};
}
AFD_INLINE Chunk join_pairs(Chunk c) {
    return {AFD_SHUFFLE(Vi, c.a, c.b, AFD_ZIP_LOW), AFD_SHUFFLE(Vi, c.a, c.b, AFD_ZIP_HIGH)};
}

// A chunk of T as {even elements, odd elements}, and back.
AFD_INLINE Chunk pairs_of(const bf16*, Chunk c) { return c; }
AFD_INLINE Chunk pairs_of(const float*, Chunk c) { return split_pairs(c); }
AFD_INLINE Chunk of_pairs(const bf16*, Chunk c) { return c; }
AFD_INLINE Chunk of_pairs(const float*, Chunk c) { return join_pairs(c); }

// A chunk of From in the lane order of a chunk of T.
AFD_INLINE Chunk load_for(const bf16*, const bf16* p) { return load(p); }
AFD_INLINE Chunk load_for(const float*, const float* p) { return load(p); }
AFD_INLINE Chunk load_for(const bf16*, const float* p) { return split_pairs(load(p)); }
AFD_INLINE Chunk load_for(const float*, const bf16* p) { return join_pairs(load(p)); }

// First n (1..kChunk - 1) elements, zeros behind.
template <class T>
AFD_INLINE Chunk load_part(const T* p, int n) {
    T buffer[kChunk] = {};
    std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
    return load(buffer);
}
template <class T>
AFD_INLINE void store_part(T* p, Chunk c, int n) {
    T buffer[kChunk];
    store(buffer, c);
    std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

// As load_part, for n a multiple of 8: masked loads, fast enough for an inner loop.
AFD_INLINE Chunk load_part8(const bf16* p, int n) {
    const Vi words = load_words(p, n / 2);
    return {even_elements(words), odd_elements(words)};
}
AFD_INLINE Chunk load_part8(const float* p, int n) {
    const int first = n < kLanes ? n : kLanes;
    return {(Vf)load_words(p, first), (Vf)load_words(p + first, n - first)};
}

// ---- functions -----------------------------------------------------------------------------------------------

// 2^x for x in [-inf, 125], relative error < 2e-7; below 2^-125 it is 0.
AFD_INLINE Vf exp2_of(Vf x) {
    const Vf lowest = splat(-125.0f), magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vi dead = x < lowest;
    const Vf clamped = dead ? lowest : x;
    const Vf shifted = clamped + magic;
    const Vi exponent = (Vi)shifted - (Vi)magic;
    const Vf r = clamped - (shifted - magic);
    Vf y = splat(1.5403530e-4f);  // ln(2)^k / k!, Horner
    y = y * r + 1.3333558e-3f;
    y = y * r + 9.6181291e-3f;
    y = y * r + 5.5504109e-2f;
    y = y * r + 2.4022651e-1f;
    y = y * r + 6.9314718e-1f;
    y = y * r + 1.0f;
    y = (Vf)((Vi)y + (exponent << 23));
    return dead ? Vf{} : y;
}

AFD_INLINE float exp2_of(float x) { return exp2_of(splat(x))[0]; }

// a + sum over the pairs of bf16 in each word of x * y.
AFD_INLINE Vf dot_words(Vf a, Vi x, Vi y) {
#if AFD_BF16_DOT
    return (Vf)_mm512_dpbf16_ps((__m512)a, (__m512bh)x, (__m512bh)y);
#else
    a += even_elements(x) * even_elements(y);
    a += odd_elements(x) * odd_elements(y);
    return a;
#endif
}

#if AFD_LANES < 16
// Sixteen registers are few: two hints where the compiler, left alone, spills a sum.
// p, for the compiler another address than before: it will not keep in a register what was read there.
AFD_INLINE const float* read_again(const float* p) {
    __asm__ volatile("" : "+r"(p));
    return p;
}
// x, which is to be loaded once, however often it is used.
AFD_INLINE Vf load_once(Vf x) {
#if defined(__x86_64__)
    __asm__ volatile("" : "+x"(x));
#endif
    return x;
}
#else
AFD_INLINE const float* read_again(const float* p) { return p; }
AFD_INLINE Vf load_once(Vf x) { return x; }
#endif

// Into the L2 cache with AVX-512: on Zen 4 attention over KV from memory is 1.3 to 1.9 times as fast as with prefetches
// into L1, which keep the core waiting for one of its few places for missing lines.
AFD_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, AFD_LANES == 16 ? 2 : 3); }

}  // namespace AFD_ISA
