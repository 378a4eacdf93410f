/* How elements get the number of their group: for groups.c, and for product.c, which does so as it goes. */

#ifndef DELTAFMT_GROUPS_H
#define DELTAFMT_GROUPS_H

#include "native.h"

#define PART 512 /* elements (of each stream) at a time */
#define FEW 8    /* bounds that are faster compared with one after the other than looked up */

/* Bounds that keys are compared with: the number of a group is how many of them are at most the key. */
typedef struct {
    const uint16_t *bounds;
    int64_t count;
    const uint8_t *table; /* the number of each key */
} Bounds;

/* Numbers of up to PART keys of eight bits. */
INLINE void number(const uint8_t *restrict keys, int64_t size, Bounds groups, uint8_t *restrict numbers) {
    if (groups.count > FEW) {
        for (int64_t i = 0; i < size; i++) numbers[i] = groups.table[keys[i]];
        return;
    }
    memset(numbers, 0, (size_t)size);
    for (int64_t bound = 0; bound < groups.count && groups.bounds[bound] < 256; bound++) {
        const uint8_t least = (uint8_t)groups.bounds[bound];
        for (int64_t i = 0; i < size; i++) numbers[i] = (uint8_t)(numbers[i] + (keys[i] >= least));
    }
}

/* Up to PART values grouped by margin: the exponent of the distance to where rounding, which takes `taken` bits away,
   changes over. `up`: whether that is above. */
INLINE void margins(const float *restrict values, int64_t size, int taken, Bounds groups, uint8_t *restrict numbers,
                    uint8_t *restrict up) {
    const uint32_t half = (uint32_t)1 << (taken - 1), kept = ~(2 * half - 1);
    uint8_t keys[PART];
    for (int64_t i = 0; i < size; i++) {
        const float distance = values[i] - float_of((bits_of(values[i]) & kept) | half);
        keys[i] = (uint8_t)(bits_of(distance) >> 23);
        up[i] = distance < 0;
    }
    number(keys, size, groups, numbers);
}

#endif
