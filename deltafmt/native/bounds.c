/* Which bounds of groups cost the fewest bits (methods/grouping.py): a shortest path over all of them. */

#include "native.h"

/* `before[end]`: where the last of the groups of the first `end` values begins, `[values + 1]`.
   `sums`: `[values + 1][kinds]`, how many of each kind there are in the first so many values. `weighted`: `n log2 n` for
   each number up to the last of their sums, as `learnt` in fractions of a bit; `group` in these times the elements of the
   sample. `elements`: of a chunk. `least`: room for `values + 1`. */
EXPORT FAST void cheapest_begins(const int64_t *restrict sums, int64_t values, int64_t kinds,
                                 const int64_t *restrict weighted, int64_t learnt, int64_t elements, int64_t group,
                                 int64_t *restrict least, int64_t *restrict before) {
    least[0] = before[0] = 0;
    for (int64_t end = 1; end <= values; end++) {
        for (int64_t begin = 0; begin < end; begin++) {
            int64_t all = 0, bits = 0;
            for (int64_t kind = 0; kind < kinds; kind++) {
                const int64_t count = sums[end * kinds + kind] - sums[begin * kinds + kind];
                all += count;
                bits += (count > 0) * learnt - weighted[count];
            }
            const int64_t cost = least[begin] + (bits + weighted[all]) * elements + group;
            if (begin == 0 || cost < least[end]) {
                least[end] = cost;
                before[end] = begin;
            }
        }
    }
}
