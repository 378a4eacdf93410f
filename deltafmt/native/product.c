/* base + B^T A, the heart of a low-rank rebuild: one pass over the base and the result, nothing wide in between.

   The factors come in panels: A as [n / COLUMNS][r][COLUMNS], B as [m / ROWS][r][ROWS], padded with zeros. A tile of
   ROWS x COLUMNS sums stays in registers for all of r (Goto and van de Geijn, "Anatomy of high-performance matrix
   multiplication", 2008); r is small, so there is no need to block it. Each sum starts from +0, in order of the
   components, and is added to the base when it is complete. */

#include "groups.h"

EXPORT int deltafmt_abi(void) { return ABI; }

#define ROWS 4
#define COLUMNS 24
#define BLOCK (4 * COLUMNS) /* columns for which the panels of A stay in the cache while all rows pass */

/* `width` columns of a factor [r][n] behind the other, the last ones padded with zeros. */
EXPORT void pack_panels(const float *restrict factor, int64_t r, int64_t n, int64_t width, float *restrict out) {
    for (int64_t left = 0; left < n; left += width) {
        const int64_t count = n - left < width ? n - left : width;
        for (int64_t k = 0; k < r; k++, out += width) {
            for (int64_t j = 0; j < count; j++) out[j] = factor[k * n + left + j];
            for (int64_t j = count; j < width; j++) out[j] = 0;
        }
    }
}

typedef float lanes __attribute__((vector_size(32), aligned(4), may_alias));

INLINE void tile(const float *a, const float *b, int64_t r, float *sums) {
    lanes s[ROWS][3] = {{{0}}};
    for (int64_t k = 0; k < r; k++) {
        const lanes x = *(const lanes *)(a + k * COLUMNS);
        const lanes y = *(const lanes *)(a + k * COLUMNS + 8);
        const lanes z = *(const lanes *)(a + k * COLUMNS + 16);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++) {
            const float factor = b[k * ROWS + i];
            s[i][0] += x * factor;
            s[i][1] += y * factor;
            s[i][2] += z * factor;
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++) memcpy(sums + i * BLOCK, s[i], sizeof s[i]);
}

/* Rows [top, bottom) of an m x n product. `store` says what becomes of the sums of part of a row, which begins at `at`;
   `more` is a parameter that it needs. */
#define PRODUCT(name, more, type, store)                                                                               \
    EXPORT FAST void name(more type *out, int64_t top, int64_t bottom, int64_t n, int64_t r, const float *a,           \
                          const float *b) {                                                                            \
        float sums[ROWS * BLOCK] __attribute__((aligned(64)));                                                         \
        for (int64_t left = 0; left < n; left += BLOCK) {                                                              \
            const int64_t width = n - left < BLOCK ? n - left : BLOCK;                                                 \
            for (int64_t first = top / ROWS * ROWS; first < bottom; first += ROWS) {                                   \
                for (int64_t column = 0; column < width; column += COLUMNS)                                            \
                    tile(a + (left + column) * r, b + first * r, r, sums + column);                                    \
                for (int64_t i = first < top ? top - first : 0; i < ROWS && first + i < bottom; i++) {                 \
                    const float *sum = sums + i * BLOCK;                                                               \
                    const int64_t at = (first + i - top) * n + left;                                                   \
                    type *row = out + at;                                                                              \
                    for (int64_t j = 0; j < width; j++) row[j] = store;                                                \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }
#define ONTO const uint16_t *restrict base,

PRODUCT(set_product, , float, sum[j])
PRODUCT(add_product, , float, row[j] + sum[j])
PRODUCT(add_product_in_bf16, , uint16_t, rounded(widened(row[j]) + sum[j]))
PRODUCT(add_product_onto_bf16, ONTO, float, widened(base[at + j]) + sum[j])

/* As add_product_in_bf16, and groups what is rounded by its margin, while it is at hand. */
EXPORT FAST void add_product_with_margins(uint16_t *restrict out, int64_t top, int64_t bottom, int64_t n, int64_t r,
                                          const float *a, const float *b, const uint16_t *bounds, int64_t bound_count,
                                          const uint8_t *table, uint8_t *restrict numbers, uint8_t *restrict up) {
    const Bounds groups = {bounds, bound_count, table};
    float sums[ROWS * BLOCK] __attribute__((aligned(64)));
    for (int64_t left = 0; left < n; left += BLOCK) {
        const int64_t width = n - left < BLOCK ? n - left : BLOCK;
        for (int64_t first = top / ROWS * ROWS; first < bottom; first += ROWS) {
            for (int64_t column = 0; column < width; column += COLUMNS)
                tile(a + (left + column) * r, b + first * r, r, sums + column);
            for (int64_t i = first < top ? top - first : 0; i < ROWS && first + i < bottom; i++) {
                float *sum = sums + i * BLOCK;
                const int64_t at = (first + i - top) * n + left;
                for (int64_t j = 0; j < width; j++) sum[j] += widened(out[at + j]);
                for (int64_t j = 0; j < width; j++) out[at + j] = rounded(sum[j]);
                margins(sum, width, 16, groups, numbers + at, up + at);
            }
        }
    }
}

EXPORT FAST void widen_bf16(const uint16_t *bits, int64_t count, float *out) {
    for (int64_t i = 0; i < count; i++) out[i] = widened(bits[i]);
}

EXPORT FAST void round_bf16(const float *values, int64_t count, uint16_t *out) {
    for (int64_t i = 0; i < count; i++) out[i] = rounded(values[i]);
}
