/* Elements of one width: included by segments.c for each, with TYPE and NAME (a name for this width) defined. */

/* Of each segment a number as many bits long as its largest element. */
EXPORT FAST void NAME(segment_longest)(const TYPE *restrict values, const int64_t *restrict elements, int64_t segments,
                                      uint64_t *restrict longest) {
    for (int64_t s = 0; s < segments; s++) {
        TYPE all = 0; /* the bits that any has */
        for (int64_t i = 0; i < elements[s]; i++) all |= values[i];
        longest[s] = all;
        values += elements[s];
    }
}

/* Several elements to a byte and back; `bits` of each is known when this is compiled. */
INLINE void NAME(pack)(const TYPE *restrict values, int64_t total, int bits, uint8_t *restrict out) {
    const int each = 8 / bits;
    const TYPE mask = (TYPE)((1 << bits) - 1);
    for (int64_t i = 0; i < total / each; i++) {
        unsigned packed = 0;
        for (int j = 0; j < each; j++) packed |= (unsigned)(values[i * each + j] & mask) << (j * bits);
        out[i] = (uint8_t)packed;
    }
    if (total % each) {
        unsigned packed = 0;
        for (int j = 0; j < total % each; j++)
            packed |= (unsigned)(values[total / each * each + j] & mask) << (j * bits);
        out[total / each] = (uint8_t)packed;
    }
}

INLINE int NAME(unpack)(const uint8_t *restrict stored, int64_t total, int bits, TYPE *restrict out) {
    const int each = 8 / bits;
    const unsigned mask = (1u << bits) - 1;
    for (int64_t i = 0; i < total / each; i++)
        for (int j = 0; j < each; j++) out[i * each + j] = (TYPE)((stored[i] >> (j * bits)) & mask);
    if (total % each == 0) return FINE;
    unsigned packed = stored[total / each];
    for (int j = 0; j < total % each; j++, packed >>= bits) out[total / each * each + j] = (TYPE)(packed & mask);
    return packed ? BITS_LEFT_OVER : FINE;
}

/* All planes of all segments, one behind the other: of each segment `low_bits` of each element, several to a byte, then
   eight higher bits after the other; `planes` in all. */
EXPORT FAST void NAME(split_segments)(const TYPE *restrict values, const int64_t *restrict elements,
                                      const int64_t *restrict low_bits, const int64_t *restrict planes,
                                      int64_t segments, uint8_t *restrict out) {
    for (int64_t s = 0; s < segments; s++) {
        const int bits = (int)low_bits[s];
        const int64_t total = elements[s];
        if (planes[s] > 0) {
            if (bits == 1) NAME(pack)(values, total, 1, out);
            else if (bits == 2) NAME(pack)(values, total, 2, out);
            else if (bits == 4) NAME(pack)(values, total, 4, out);
            else NAME(pack)(values, total, 8, out);
            out += (total * bits + 7) / 8;
        }
        for (int64_t plane = 1; plane < planes[s]; plane++) {
            const int shift = bits + 8 * (int)(plane - 1);
            for (int64_t i = 0; i < total; i++) out[i] = (uint8_t)(values[i] >> shift);
            out += total;
        }
        values += total;
    }
}

/* Undoes it. `data`: of each plane, in order. Nothing but zeros where there is no plane. Says what is wrong. */
EXPORT FAST int NAME(merge_segments)(const uint8_t *const *restrict data, const int64_t *restrict elements,
                                     const int64_t *restrict low_bits, const int64_t *restrict planes,
                                     int64_t segments, TYPE *restrict out) {
    for (int64_t s = 0; s < segments; s++) {
        const int bits = (int)low_bits[s];
        const int64_t total = elements[s];
        if (planes[s] == 0) {
            memset(out, 0, (size_t)total * sizeof(TYPE));
        } else {
            const uint8_t *stored = *data++;
            const int problem = bits == 1   ? NAME(unpack)(stored, total, 1, out)
                                : bits == 2 ? NAME(unpack)(stored, total, 2, out)
                                : bits == 4 ? NAME(unpack)(stored, total, 4, out)
                                            : NAME(unpack)(stored, total, 8, out);
            if (problem) return problem;
        }
        for (int64_t plane = 1; plane < planes[s]; plane++) {
            const uint8_t *stored = *data++;
            const int shift = bits + 8 * (int)(plane - 1), room = 8 * (int)sizeof(TYPE) - shift;
            if (room < 8) {
                uint8_t all = 0;
                for (int64_t i = 0; i < total; i++) all |= stored[i];
                if (room <= 0 ? all != 0 : all >> room) return TOO_LARGE;
            }
            if (room > 0)
                for (int64_t i = 0; i < total; i++) out[i] |= (TYPE)((TYPE)stored[i] << shift);
        }
        out += total;
    }
    return FINE;
}
