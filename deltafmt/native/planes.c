/* Filters `planes` and `float-planes` (spec/encodings/): elements to byte planes, most significant first, and back. Of
   floats the first plane is the exponent (of F64 and F16 eight bits around it), the second has the sign on top. */

#include "native.h"

#define TOP_PLANES(high, floats, first, second)                                                                        \
    do {                                                                                                               \
        const unsigned top = (unsigned)(high);                                                                         \
        (first) = (uint8_t)((floats) ? top >> 7 : top >> 8);                                                           \
        (second) = (uint8_t)((floats) ? (top & 0x7F) | ((top >> 8) & 0x80) : top);                                     \
    } while (0)

#define TOP_BITS(first, second, floats)                                                                                \
    ((floats) ? (((unsigned)(second) & 0x80) << 8) | ((unsigned)(first) << 7) | ((unsigned)(second) & 0x7F)            \
              : ((unsigned)(first) << 8) | (unsigned)(second))

/* `out`: one plane of `total` bytes behind the other; `planes`: where each is. */
#define PLANES(type, width, split, merge, split_planes, merge_planes)                                                  \
    INLINE void split(const type *restrict bits, int64_t total, int floats, uint8_t *restrict out) {                   \
        for (int64_t i = 0; i < total; i++)                                                                            \
            TOP_PLANES(bits[i] >> (8 * (width - 2)), floats, out[i], out[total + i]);                                  \
        for (int plane = 2; plane < width; plane++)                                                                    \
            for (int64_t i = 0; i < total; i++)                                                                        \
                out[plane * total + i] = (uint8_t)(bits[i] >> (8 * (width - 1 - plane)));                              \
    }                                                                                                                  \
    INLINE void merge(const uint8_t *const *planes, int64_t total, int floats, type *restrict out) {                   \
        const uint8_t *restrict first = planes[0], *restrict second = planes[1];                                       \
        for (int64_t begin = 0; begin < total; begin += PART) { /* in parts, which stay in the cache */                \
            const int64_t end = total - begin < PART ? total : begin + PART;                                           \
            for (int64_t i = begin; i < end; i++)                                                                      \
                out[i] = (type)((type)TOP_BITS(first[i], second[i], floats) << (8 * (width - 2)));                     \
            for (int plane = 2; plane < width; plane++) {                                                              \
                const uint8_t *restrict bytes = planes[plane];                                                         \
                for (int64_t i = begin; i < end; i++) out[i] |= (type)((type)bytes[i] << (8 * (width - 1 - plane)));   \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    EXPORT FAST void split_planes(const type *bits, int64_t total, int floats, uint8_t *out) {                         \
        if (floats) split(bits, total, 1, out);                                                                        \
        else split(bits, total, 0, out);                                                                               \
    }                                                                                                                  \
    EXPORT FAST void merge_planes(const uint8_t *const *planes, int64_t total, int floats, type *out) {                \
        if (floats) merge(planes, total, 1, out);                                                                      \
        else merge(planes, total, 0, out);                                                                             \
    }

#define PART 4096

PLANES(uint16_t, 2, split_2, merge_2, split_planes_2, merge_planes_2)
PLANES(uint32_t, 4, split_4, merge_4, split_planes_4, merge_planes_4)
PLANES(uint64_t, 8, split_8, merge_8, split_planes_8, merge_planes_8)
