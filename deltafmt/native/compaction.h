/* The elements of one group, moved together and back: for groups.c, on processors that have AVX2. For others, HAS_AVX2
   is not defined when this is compiled, or false when it runs. */

#ifndef DELTAFMT_COMPACTION_H
#define DELTAFMT_COMPACTION_H

#include "native.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define HAS_AVX2 (__builtin_cpu_supports("avx2") != 0)
#define STEP 32 /* elements of which the numbers are compared at once; blocks are padded to it */

#define WITH_AVX2 __attribute__((target("avx2,popcnt")))
#define NOWHERE 0x80

/* Of each set of eight elements, where its members stand, in order; and the same as a shuffle of 16-bit elements. The
   way back: of each of eight elements, which of the members it is. */
static uint8_t MEMBERS[256][8], SHUFFLES[256][16], RANKS[256][8], SHUFFLES_BACK[256][16];

__attribute__((constructor)) static void fill_tables(void) {
    memset(RANKS, NOWHERE, sizeof RANKS);
    memset(SHUFFLES_BACK, NOWHERE, sizeof SHUFFLES_BACK);
    for (int set = 0; set < 256; set++)
        for (int i = 0, count = 0; i < 8; i++)
            if (set >> i & 1) {
                MEMBERS[set][count] = (uint8_t)i;
                RANKS[set][i] = (uint8_t)count;
                for (int half = 0; half < 2; half++) {
                    SHUFFLES[set][2 * count + half] = (uint8_t)(2 * i + half);
                    SHUFFLES_BACK[set][2 * i + half] = (uint8_t)(2 * count + half);
                }
                count++;
            }
}

/* Which of STEP numbers are `group`: a bit for each. */
INLINE WITH_AVX2 uint32_t members_of(const uint8_t *numbers, uint8_t group) {
    const __m256i found =
        _mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i *)numbers), _mm256_set1_epi8((char)group));
    return (uint32_t)_mm256_movemask_epi8(found);
}

/* Move the elements whose number is `group` to `out`, in order; returns how many. `out` is written to 8 elements beyond. */
#define COMPRESS(name, type, move)                                                                                      \
    WITH_AVX2 static int64_t name(const type *values, const uint8_t *numbers, int64_t total, uint8_t group,            \
                                  type *out) {                                                                         \
        type *const begin = out;                                                                                       \
        for (int64_t at = 0; at < total; at += STEP) {                                                                 \
            const uint32_t members = members_of(numbers + at, group);                                                  \
            for (int part = 0; part < 4; part++) {                                                                     \
                const uint32_t set = members >> 8 * part & 0xFF;                                                       \
                const type *from = values + at + 8 * part;                                                             \
                move;                                                                                                  \
                out += _mm_popcnt_u32(set);                                                                            \
            }                                                                                                          \
        }                                                                                                              \
        return out - begin;                                                                                            \
    }

COMPRESS(compress_2, uint16_t,
        _mm_storeu_si128((__m128i *)out, _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)from),
                                                          _mm_loadu_si128((const __m128i *)SHUFFLES[set]))))
COMPRESS(compress_4, uint32_t,
        _mm256_storeu_si256((__m256i *)out,
                            _mm256_permutevar8x32_epi32(
                                _mm256_loadu_si256((const __m256i *)from),
                                _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)MEMBERS[set])))))

/* Put values, one behind the other, where the members of STEP elements stand: a bit for each in `members`. All of `out`
   that is not a member's yet is zero. `left`: of the values; there are no more members. */
#define EXPAND(name, type, vector, moved)                                                                              \
    INLINE WITH_AVX2 void name(const type *values, int64_t left, uint32_t members, vector *out) {                      \
        type last[STEP + 8];                                                                                           \
        if (__builtin_expect(left < STEP + 8, 0)) { /* nothing may be read behind them */                              \
            memset(last, 0, sizeof last);                                                                              \
            memcpy(last, values, (size_t)left * sizeof *last);                                                         \
            values = last;                                                                                             \
        }                                                                                                              \
        _Pragma("GCC unroll 4") for (int part = 0; part < 4; part++) {                                                 \
            const uint32_t set = members >> 8 * part & 0xFF;                                                           \
            moved;                                                                                                     \
            values += _mm_popcnt_u32(set);                                                                             \
        }                                                                                                              \
    }

EXPAND(expand_2, uint16_t, __m128i,
       out[part] = _mm_or_si128(out[part], _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)values),
                                                            _mm_loadu_si128((const __m128i *)SHUFFLES_BACK[set]))))
EXPAND(expand_4, uint32_t, __m256i,
       const __m256i where = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)RANKS[set]));
       const __m256i value = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *)values), where);
       out[part] = _mm256_or_si256(out[part], _mm256_andnot_si256(_mm256_srai_epi32(where, 31), value)))

#endif
#endif
