/* The elements of one group, moved together: for groups.c, on processors that have AVX2. Elsewhere HAS_COMPACTION is 0. */

#ifndef DELTAFMT_COMPACTION_H
#define DELTAFMT_COMPACTION_H

#include "native.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define HAS_COMPACTION (__builtin_cpu_supports("avx2") != 0)
#define STEP 32 /* elements of which the numbers are compared at once; blocks are padded to it */

/* Of each set of eight elements, where its members stand, in order; and the same as a shuffle of 16-bit elements. */
static uint8_t MEMBERS[256][8], SHUFFLES[256][16];

__attribute__((constructor)) static void fill_tables(void) {
    for (int set = 0; set < 256; set++)
        for (int i = 0, count = 0; i < 8; i++)
            if (set >> i & 1) {
                MEMBERS[set][count] = (uint8_t)i;
                SHUFFLES[set][2 * count] = (uint8_t)(2 * i);
                SHUFFLES[set][2 * count++ + 1] = (uint8_t)(2 * i + 1);
            }
}

/* Move the elements whose number is `group` to `out`, in order; returns how many. `out` is written to 8 elements beyond. */
#define COMPACT(name, type, move)                                                                                      \
    __attribute__((target("avx2,popcnt"))) static int64_t name(const type *values, const uint8_t *numbers,             \
                                                               int64_t total, uint8_t group, type *out) {              \
        type *const begin = out;                                                                                       \
        for (int64_t at = 0; at < total; at += STEP) {                                                                 \
            const __m256i found = _mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i *)(numbers + at)),               \
                                                    _mm256_set1_epi8((char)group));                                    \
            const uint32_t members = (uint32_t)_mm256_movemask_epi8(found);                                            \
            for (int part = 0; part < 4; part++) {                                                                     \
                const uint32_t set = members >> 8 * part & 0xFF;                                                       \
                const type *from = values + at + 8 * part;                                                             \
                move;                                                                                                  \
                out += _mm_popcnt_u32(set);                                                                            \
            }                                                                                                          \
        }                                                                                                              \
        return out - begin;                                                                                            \
    }

COMPACT(compact_2, uint16_t,
        _mm_storeu_si128((__m128i *)out, _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)from),
                                                          _mm_loadu_si128((const __m128i *)SHUFFLES[set]))))
COMPACT(compact_4, uint32_t,
        _mm256_storeu_si256((__m256i *)out,
                            _mm256_permutevar8x32_epi32(
                                _mm256_loadu_si256((const __m256i *)from),
                                _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)MEMBERS[set])))))

#else
#define HAS_COMPACTION 0
#define STEP 1
#define compact_2(values, numbers, total, group, out) 0
#define compact_4(values, numbers, total, group, out) 0
#endif

#define compact_8(values, numbers, total, group, out) 0

#endif
