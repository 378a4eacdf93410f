/* The groups of `patch` (spec/operators/patch.md): number the group of each element, then sort residuals into groups or
   fetch them from there.

   The elements are walked in STREAMS runs side by side: neighbours are mostly of the same group, and one walk would wait
   for its own counter after each step. */

#include "compaction.h"
#include "groups.h"

#define GROUPS 256
#define KINDS 132 /* of residuals of up to 64 bits */
#define STREAMS 4
#define FEW_GROUPS 16 /* up to which it is faster to move one together after the other */
#define SPARSE 128 /* elements of a chunk to one residual of a group that is not zero: from here on they are looked for */

/* How many of the numbers are `group`. */
INLINE int64_t count_equal(const uint8_t *numbers, int64_t total, uint8_t group) {
    int64_t found = 0, i = 0;
    while (total - i >= 32) {
        uint8_t lanes[32] = {0};
        for (int round = 0; round < 255 && total - i >= 32; round++, i += 32)
            for (int lane = 0; lane < 32; lane++) lanes[lane] = (uint8_t)(lanes[lane] + (numbers[i + lane] == group));
        for (int lane = 0; lane < 32; lane++) found += lanes[lane];
    }
    for (; i < total; i++) found += numbers[i] == group;
    return found;
}

#ifdef HAS_AVX2
/* How many of PART numbers are `group`. */
INLINE WITH_AVX2 int64_t members_of_part(const uint8_t *own, uint8_t group) {
    int64_t count = 0;
    for (int64_t at = 0; at < PART; at += STEP) count += _mm_popcnt_u32(members_of(own + at, group));
    return count;
}
#endif

/* How many elements of each number below `groups` there are in each stream, `[STREAMS][GROUPS]`. The last stream is
   longer if the elements do not divide. */
INLINE void count_numbers(const uint8_t *numbers, int64_t total, int64_t groups, int64_t *counts) {
    const int64_t run = total / STREAMS;
    if (groups <= FEW_GROUPS) {
        memset(counts, 0, STREAMS * GROUPS * sizeof *counts);
        for (int64_t s = 0; s < STREAMS; s++)
            for (int64_t g = 0; g < groups; g++)
                counts[s * GROUPS + g] =
                    count_equal(numbers + s * run, s + 1 < STREAMS ? run : total - s * run, (uint8_t)g);
        return;
    }
    uint32_t partial[STREAMS][GROUPS] = {{0}};
    for (int64_t i = 0; i < run; i++)
        for (int s = 0; s < STREAMS; s++) partial[s][numbers[s * run + i]]++;
    for (int64_t i = STREAMS * run; i < total; i++) partial[STREAMS - 1][numbers[i]]++;
    for (int s = 0; s < STREAMS; s++)
        for (int g = 0; g < GROUPS; g++) counts[s * GROUPS + g] = partial[s][g];
}

/* From these counts: where each stream begins in each group. */
INLINE void begins(int64_t *counts) {
    int64_t place = 0;
    for (int g = 0; g < GROUPS; g++)
        for (int s = 0; s < STREAMS; s++) {
            const int64_t count = counts[s * GROUPS + g];
            counts[s * GROUPS + g] = place;
            place += count;
        }
}

/* Numbers of elements grouped by a field of `mask` bits of the prediction, its exponent. */
#define EXPONENT_GROUPS(type, name)                                                                                    \
    EXPORT FAST void name(const type *restrict predicted, int64_t total, int shift, int mask,                          \
                          const uint16_t *restrict bounds, int64_t bound_count, const uint8_t *restrict table,         \
                          uint8_t *restrict numbers) {                                                                 \
        const Bounds groups = {bounds, bound_count, table};                                                            \
        uint8_t keys[PART];                                                                                            \
        if (mask > 0xFF)                                                                                               \
            for (int64_t i = 0; i < total; i++) numbers[i] = table[(predicted[i] >> shift) & (type)mask];              \
        for (int64_t begin = 0; mask <= 0xFF && begin < total; begin += PART) {                                        \
            const int64_t size = total - begin < PART ? total - begin : PART;                                          \
            for (int64_t i = 0; i < size; i++) keys[i] = (uint8_t)((predicted[begin + i] >> shift) & (type)mask);      \
            number(keys, size, groups, numbers + begin);                                                               \
        }                                                                                                              \
    }

EXPONENT_GROUPS(uint16_t, exponent_groups_2)
EXPONENT_GROUPS(uint32_t, exponent_groups_4)
EXPONENT_GROUPS(uint64_t, exponent_groups_8)

EXPORT FAST void margin_groups_4(const float *restrict values, int64_t total, int taken,
                                 const uint16_t *restrict bounds, int64_t bound_count, const uint8_t *restrict table,
                                 uint8_t *restrict numbers, uint8_t *restrict up) {
    const Bounds groups = {bounds, bound_count, table};
    for (int64_t begin = 0; begin < total; begin += PART)
        margins(values + begin, total - begin < PART ? total - begin : PART, taken, groups, numbers + begin, up + begin);
}

EXPORT FAST void margin_groups_8(const double *restrict values, int64_t total, int taken,
                                 const uint16_t *restrict bounds, int64_t bound_count, const uint8_t *restrict table,
                                 uint8_t *restrict numbers, uint8_t *restrict up) {
    (void)bounds, (void)bound_count;
    const uint64_t half = (uint64_t)1 << (taken - 1), kept = ~(2 * half - 1);
    for (int64_t i = 0; i < total; i++) {
        uint64_t bits;
        double border;
        memcpy(&bits, values + i, sizeof bits);
        bits = (bits & kept) | half;
        memcpy(&border, &bits, sizeof bits);
        const double distance = values[i] - border;
        memcpy(&bits, &distance, sizeof bits);
        up[i] = distance < 0;
        numbers[i] = table[(bits >> 52) & 0x7FF];
    }
}

#define TYPE uint16_t
#ifdef HAS_AVX2
#define VECTOR __m128i /* of eight elements */
#endif
#define TOP 15
#define NAME(name) name##_2
#include "residuals.h"
#undef TYPE
#undef VECTOR
#undef TOP
#undef NAME

#define TYPE uint32_t
#ifdef HAS_AVX2
#define VECTOR __m256i /* of eight elements */
#endif
#define TOP 31
#define NAME(name) name##_4
#include "residuals.h"
#undef TYPE
#undef VECTOR
#undef TOP
#undef NAME

#define TYPE uint64_t
#define TOP 63
#define NAME(name) name##_8
#include "residuals.h"
