/* Elements that move by as many last places as their mantissa tells (deltafmt/operators/decayed.py). */

#include "native.h"

/* `steps[i]` is for mantissas that `i` of the ascending `bounds` do not exceed; `first[k]` of them do not exceed
   `k << shift`: between two of these most mantissas find nothing to search. */
#define MOVE(type, width, move)                                                                                        \
    EXPORT FAST void move(const uint32_t *bounds, const uint32_t *steps, const uint32_t *first, int shift,             \
                          int mantissa_bits, int64_t total, type *bits) {                                              \
        const uint32_t sign = (uint32_t)1 << (8 * width - 1), low = ((uint32_t)1 << mantissa_bits) - 1;                \
        const uint32_t exponents = (sign - 1) & ~low;                                                                  \
        for (int64_t i = 0; i < total; i++) {                                                                          \
            const uint32_t element = bits[i], mantissa = element & low, exponent = element & exponents;                \
            uint32_t lo = first[mantissa >> shift], hi = first[(mantissa >> shift) + 1];                               \
            while (lo < hi) {                                                                                          \
                const uint32_t middle = (lo + hi) / 2;                                                                 \
                if (bounds[middle] <= mantissa) lo = middle + 1;                                                       \
                else hi = middle;                                                                                      \
            }                                                                                                          \
            const uint32_t step = exponent && exponent != exponents ? steps[lo] : 0;                                   \
            bits[i] = (type)(((element - step) & (sign - 1)) | (element & sign));                                      \
        }                                                                                                              \
    }

MOVE(uint16_t, 2, move_by_steps_2)
MOVE(uint32_t, 4, move_by_steps_4)
