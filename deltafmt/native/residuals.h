/* Residuals of floats of one width: included by groups.c for each, with TYPE (of their bits), TOP (the number of the
   highest bit), NAME (a name for this width) and, where few groups are moved by vectors, VECTOR defined. */

/* Bit patterns of floats, in the order of the numbers that they stand for, and back. */
#define ORDERED(bits) ((TYPE)((bits) ^ (TYPE)((TYPE)-((bits) >> TOP) | (TYPE)1 << TOP)))
#define UNORDERED(order) ((TYPE)((order) ^ (TYPE)(((TYPE)((order) >> TOP) - 1) | (TYPE)1 << TOP)))

/* `to_groups`: the residual of `bits` given what was predicted, in order of groups; and `lengths`, elements of each.
   `from_groups`: undoes it, in place of the prediction. `up` may be NULL. Each chunk has groups of its own.
   Arithmetic is done PART elements at a time, apart from the walk, so that it is vectorised. */

INLINE void NAME(fold)(const TYPE *restrict bits, const TYPE *restrict predicted, const uint8_t *restrict up,
                       int64_t size, TYPE *restrict folded) {
    for (int64_t i = 0; i < size; i++) {
        TYPE residual = (TYPE)(ORDERED(bits[i]) - ORDERED(predicted[i]));
        if (up) residual = (TYPE)((residual ^ (TYPE)-(TYPE)up[i]) + up[i]);
        folded[i] = (TYPE)((TYPE)(residual << 1) ^ (TYPE)-(residual >> TOP));
    }
}

INLINE void NAME(unfold)(const TYPE *restrict folded, const uint8_t *restrict up, int64_t size,
                         TYPE *restrict predicted) {
    for (int64_t i = 0; i < size; i++) {
        TYPE residual = (TYPE)((TYPE)(folded[i] >> 1) ^ (TYPE)-(folded[i] & 1));
        if (up) residual = (TYPE)((residual ^ (TYPE)-(TYPE)up[i]) + up[i]);
        const TYPE order = (TYPE)(ORDERED(predicted[i]) + residual);
        predicted[i] = UNORDERED(order);
    }
}

/* Of every `step`-th element: how many there are of each exponent, and among them of each kind of residual: 0, then two
   kinds for each length in bits. `[mask + 1][KINDS]`, zeros before. */
EXPORT FAST void NAME(kinds_by_exponent)(const TYPE *restrict bits, const TYPE *restrict predicted, int64_t total,
                                         int64_t step, int shift, int mask, int64_t *restrict counts) {
    TYPE some[2][PART], folded[PART];
    for (int64_t at = 0; at < total;) {
        int64_t size = 0;
        for (; size < PART && at < total; at += step, size++) {
            some[0][size] = bits[at];
            some[1][size] = predicted[at];
        }
        NAME(fold)(some[0], some[1], NULL, size, folded);
        for (int64_t i = 0; i < size; i++) {
            const int32_t kind = (int32_t)(bits_of((float)folded[i]) >> 22) - 253; /* 253: the last before 1.0 */
            counts[((some[1][i] >> shift) & (TYPE)mask) * KINDS + (kind > 0 ? kind : 0)]++;
        }
    }
}

INLINE void NAME(to_groups_of_chunk)(const TYPE *restrict bits, const TYPE *restrict predicted,
                                     const uint8_t *restrict up, const uint8_t *restrict numbers, int64_t total,
                                     int64_t *restrict lengths, TYPE *restrict grouped) {
    TYPE folded[STREAMS][PART];
    int64_t places[STREAMS * GROUPS];
    count_numbers(numbers, total, GROUPS, places);
    begins(places);
    for (int g = 0; g < GROUPS; g++) lengths[g] = (g + 1 < GROUPS ? places[g + 1] : total) - places[g];
    const int64_t run = total / STREAMS, last = STREAMS * run;
    for (int64_t begin = 0; begin < run; begin += PART) {
        const int64_t size = run - begin < PART ? run - begin : PART;
        for (int64_t s = 0, at = begin; s < STREAMS; s++, at += run)
            NAME(fold)(bits + at, predicted + at, up ? up + at : NULL, size, folded[s]);
        for (int64_t i = 0; i < size; i++)
            for (int64_t s = 0; s < STREAMS; s++)
                grouped[places[s * GROUPS + numbers[s * run + begin + i]]++] = folded[s][i];
    }
    NAME(fold)(bits + last, predicted + last, up ? up + last : NULL, total - last, folded[0]);
    for (int64_t i = last; i < total; i++) grouped[places[(STREAMS - 1) * GROUPS + numbers[i]]++] = folded[0][i - last];
}

#ifdef VECTOR
/* The same for few groups: of each block, group after group is moved together. */
INLINE void NAME(to_few_groups_of_chunk)(const TYPE *restrict bits, const TYPE *restrict predicted,
                                         const uint8_t *restrict up, const uint8_t *restrict numbers, int64_t total,
                                         int64_t groups, int64_t *restrict lengths, TYPE *restrict grouped) {
    TYPE folded[PART], together[PART + STEP];
    uint8_t own[PART];
    int64_t places[FEW_GROUPS] = {0};
    memset(lengths, 0, GROUPS * sizeof *lengths);
    for (int64_t g = 0, place = 0; g < groups; g++) {
        lengths[g] = count_equal(numbers, total, (uint8_t)g);
        places[g] = place;
        place += lengths[g];
    }
    for (int64_t begin = 0; begin < total; begin += PART) {
        const int64_t size = total - begin < PART ? total - begin : PART;
        NAME(fold)(bits + begin, predicted + begin, up ? up + begin : NULL, size, folded);
        memset(own + size, 0xFF, (size_t)(PART - size)); /* no group's */
        memcpy(own, numbers + begin, (size_t)size);
        for (int64_t g = 0; g < groups; g++) {
            const int64_t count = NAME(compress)(folded, own, size, (uint8_t)g, together);
            memcpy(grouped + places[g], together, (size_t)count * sizeof(TYPE));
            places[g] += count;
        }
    }
}
#endif

EXPORT FAST void NAME(to_groups)(const TYPE *restrict bits, const TYPE *restrict predicted, const uint8_t *restrict up,
                                 const uint8_t *restrict numbers, int64_t total, int64_t chunk,
                                 int64_t *restrict lengths, TYPE *restrict grouped) {
    uint8_t most = 0;
    for (int64_t i = 0; i < total; i++) most = numbers[i] > most ? numbers[i] : most;
    for (int64_t at = 0; at < total; at += chunk, lengths += GROUPS) {
        const int64_t size = total - at < chunk ? total - at : chunk;
        const uint8_t *of_chunk = up ? up + at : NULL;
#ifdef VECTOR
        if (HAS_AVX2 && most < FEW_GROUPS) {
            NAME(to_few_groups_of_chunk)(bits + at, predicted + at, of_chunk, numbers + at, size, most + 1, lengths,
                                         grouped + at);
            continue;
        }
#endif
        NAME(to_groups_of_chunk)(bits + at, predicted + at, of_chunk, numbers + at, size, lengths, grouped + at);
    }
}

#ifdef VECTOR
/* The next residual in [place, end) that is not zero; `end` if there is none. */
INLINE int64_t NAME(next_miss)(const TYPE *grouped, int64_t place, int64_t end) {
    for (; end - place >= 32; place += 32) {
        TYPE any = 0;
        for (int64_t i = 0; i < 32; i++) any |= grouped[place + i];
        if (any) break;
    }
    while (place < end && grouped[place] == 0) place++;
    return place;
}

/* How many residuals in [place, end) are not zero. */
INLINE int64_t NAME(count_misses)(const TYPE *grouped, int64_t place, int64_t end) {
    int64_t misses = 0;
    for (; place < end; place += PART) {
        const int64_t stop = end - place < PART ? end : place + PART;
        TYPE some = 0; /* of the same width, so that it is vectorised */
        for (int64_t i = place; i < stop; i++) some = (TYPE)(some + (grouped[i] != 0));
        misses += (int64_t)some;
    }
    return misses;
}

/* Undoes `to_groups` of one chunk of few groups: PART elements at a time, group after group. Of a group of which most
   residuals are zero, nothing is done where all are; of the others there is no branch to mispredict. */
WITH_AVX2 static void NAME(from_few_groups_of_chunk)(const TYPE *restrict grouped, const uint8_t *restrict up,
                                                     const uint8_t *restrict numbers, int64_t total, int64_t groups,
                                                     TYPE *restrict predicted) {
    int64_t places[FEW_GROUPS], ends[FEW_GROUPS], next[FEW_GROUPS];
    int dense[FEW_GROUPS];
    for (int64_t g = 0, place = 0; g < groups; g++) {
        places[g] = place;
        ends[g] = place += count_equal(numbers, total, (uint8_t)g);
        dense[g] = SPARSE * NAME(count_misses)(grouped, places[g], ends[g]) > total;
        next[g] = dense[g] ? place : NAME(next_miss)(grouped, places[g], ends[g]);
    }
    for (int64_t begin = 0; begin < total; begin += PART) {
        const int64_t size = total - begin < PART ? total - begin : PART;
        uint8_t last[PART];
        const uint8_t *own = numbers + begin;
        if (size < PART) {
            memset(last, 0xFF, PART); /* no group's */
            memcpy(last, own, (size_t)size);
            own = last;
        }
        TYPE folded[PART] __attribute__((aligned(sizeof(VECTOR)))) = {0};
        int any = 0;
        for (int64_t g = 0; g < groups; g++) {
            int64_t place = places[g];
            if (!dense[g]) {
                const int64_t end = place + members_of_part(own, (uint8_t)g);
                places[g] = end;
                if (next[g] >= end) continue;
                next[g] = NAME(next_miss)(grouped, end, ends[g]);
            }
            any = 1;
            for (int64_t at = 0; at < PART; at += STEP) {
                const uint32_t members = members_of(own + at, (uint8_t)g);
                NAME(expand)(grouped + place, total - place, members, (VECTOR *)(folded + at));
                place += _mm_popcnt_u32(members);
            }
            places[g] = place;
        }
        if (!any) continue;
        NAME(unfold)(folded, up ? up + begin : NULL, size, predicted + begin);
    }
}
#endif

INLINE void NAME(from_groups_of_chunk)(const TYPE *restrict grouped, const uint8_t *restrict up,
                                       const uint8_t *restrict numbers, int64_t total, int groups,
                                       TYPE *restrict predicted) {
    TYPE folded[STREAMS][PART];
    int64_t places[STREAMS * GROUPS];
    count_numbers(numbers, total, groups, places);
    begins(places);
    const int64_t run = total / STREAMS, last = STREAMS * run;
    for (int64_t begin = 0; begin < run; begin += PART) {
        const int64_t size = run - begin < PART ? run - begin : PART;
        for (int64_t i = 0; i < size; i++)
            for (int64_t s = 0; s < STREAMS; s++)
                folded[s][i] = grouped[places[s * GROUPS + numbers[s * run + begin + i]]++];
        for (int64_t s = 0, at = begin; s < STREAMS; s++, at += run)
            NAME(unfold)(folded[s], up ? up + at : NULL, size, predicted + at);
    }
    for (int64_t i = last; i < total; i++) folded[0][i - last] = grouped[places[(STREAMS - 1) * GROUPS + numbers[i]]++];
    NAME(unfold)(folded[0], up ? up + last : NULL, total - last, predicted + last);
}

EXPORT FAST void NAME(from_groups)(const TYPE *restrict grouped, const uint8_t *restrict up,
                                   const uint8_t *restrict numbers, int64_t total, int64_t chunk, int groups,
                                   TYPE *restrict predicted) {
    for (int64_t at = 0; at < total; at += chunk) {
        const int64_t size = total - at < chunk ? total - at : chunk;
        const uint8_t *of_chunk = up ? up + at : NULL;
#ifdef VECTOR
        if (HAS_AVX2 && groups <= FEW_GROUPS) {
            NAME(from_few_groups_of_chunk)(grouped + at, of_chunk, numbers + at, size, groups, predicted + at);
            continue;
        }
#endif
        NAME(from_groups_of_chunk)(grouped + at, of_chunk, numbers + at, size, groups, predicted + at);
    }
}

/* `from_groups` of elements whose groups the exponents of `predicted` tell: chunk by chunk, while it is in the cache.
   `numbers` is room for those of a chunk, `bound_count` at most 255. Not FAST: what it calls is. */
EXPORT void NAME(from_exponent_groups)(const TYPE *restrict grouped, int64_t total, int64_t chunk, int shift, int mask,
                                       const uint16_t *restrict bounds, int64_t bound_count,
                                       const uint8_t *restrict table, uint8_t *restrict numbers,
                                       TYPE *restrict predicted) {
    for (int64_t at = 0; at < total; at += chunk) {
        const int64_t size = total - at < chunk ? total - at : chunk;
        NAME(exponent_groups)(predicted + at, size, shift, mask, bounds, bound_count, table, numbers);
        NAME(from_groups)(grouped + at, NULL, numbers, size, size, (int)bound_count + 1, predicted + at);
    }
}

#undef ORDERED
#undef UNORDERED
