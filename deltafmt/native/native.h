/* What the kernels share. Plain C11; vectors are GCC's and Clang's. No kernel allocates, and none reads a length or an
   offset from data: the caller has checked every size (native/library.py). */

#ifndef DELTAFMT_NATIVE_H
#define DELTAFMT_NATIVE_H

#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* Each loop is compiled for processors of 2013 and newer (AVX2, FMA) and for all others; the loader chooses, if it can
   (glibc's does). */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FAST __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define FAST
#endif

#define ABI 7 /* raised with every change of a function or of what it means: see native/library.py */

#define INLINE static inline __attribute__((always_inline))

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE float widened(uint16_t bf16) { return float_of((uint32_t)bf16 << 16); }

/* To nearest, ties to even; a NaN is quiet and has no sign (spec/arithmetic.md). The bf16 value is the upper half. */
INLINE uint32_t in_high_half(float value) {
    const uint32_t bits = bits_of(value);
    return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC00000 : bits + 0x7FFF + ((bits >> 16) & 1);
}

INLINE uint16_t rounded(float value) { return (uint16_t)(in_high_half(value) >> 16); }

#endif
