/* base + B^T A, the heart of a low-rank rebuild: one pass over the base and the result, nothing wide in between.

   The factors come in panels, padded with zeros: B as [m / ROWS][r][ROWS]; A as [n / COLUMNS][2][r][HALF], a panel of the
   even columns and one of the odd ones, so that two bf16 values in one word meet their sums without a shuffle. A tile of
   ROWS x HALF sums stays in registers for all of r (Goto and van de Geijn, "Anatomy of high-performance matrix
   multiplication", 2008); r is small, so there is no need to block it. Each sum starts from +0, in order of the
   components, and is added to the base when it is complete. */

#include "groups.h"

EXPORT int deltafmt_abi(void) { return ABI; }

#define ROWS 4
#define HALF 24
#define COLUMNS (2 * HALF)
#define CACHED (1 << 16) /* floats of A that stay in the cache while all rows pass: half of a usual second level */
#define PACKED 16        /* panels, or pairs of them, that are filled side by side, so that rows are read in runs */

/* A factor [r][n] in panels: of each `width * apart` columns, column j is in panel j % apart. */
INLINE void pack(const float *restrict factor, int64_t r, int64_t n, int64_t width, int64_t apart,
                 float *restrict out) {
    const int64_t group = width * apart;
    for (int64_t left = 0; left < n; left += PACKED * group)
        for (int64_t k = 0; k < r; k++)
            for (int64_t at = left; at < n && at < left + PACKED * group; at += group) {
                const float *row = factor + k * n + at;
                float whole[COLUMNS], *panel = out + at * r + k * width;
                if (n - at < group) {
                    memset(whole, 0, sizeof whole);
                    row = memcpy(whole, row, (size_t)(n - at) * sizeof *row);
                }
                for (int64_t p = 0; p < apart; p++, panel += r * width)
                    for (int64_t j = 0; j < width; j++) panel[j] = row[j * apart + p];
            }
}

EXPORT FAST void pack_a(const float *restrict factor, int64_t r, int64_t n, float *restrict out) {
    pack(factor, r, n, HALF, 2, out);
}

EXPORT FAST void pack_b(const float *restrict factor, int64_t r, int64_t n, float *restrict out) {
    pack(factor, r, n, ROWS, 1, out);
}

typedef float lanes __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t two __attribute__((aligned(2), may_alias)); /* bf16 values: the even one is the lower half */

/* Elements of a row-major matrix from some place on; NOTHING is zero wherever it is read. */
typedef enum { NOTHING, FLOAT, BF16 } Kind;
typedef struct {
    Kind kind;
    char *at;
    int64_t stride; /* elements from row to row */
} Matrix;

INLINE int64_t width_of(Kind kind) { return kind == NOTHING ? 0 : kind == FLOAT ? 4 : 2; }

INLINE Matrix moved(Matrix matrix, int64_t rows, int64_t columns) {
    if (matrix.kind != NOTHING) matrix.at += (rows * matrix.stride + columns) * width_of(matrix.kind);
    return matrix;
}

INLINE void half_tile(const float *a, const float *b, int64_t r, float sums[ROWS][HALF]) {
    lanes s[ROWS][3] = {{{0}}};
    for (int64_t k = 0; k < r; k++) {
        const lanes x = *(const lanes *)(a + k * HALF);
        const lanes y = *(const lanes *)(a + k * HALF + 8);
        const lanes z = *(const lanes *)(a + k * HALF + 16);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++) {
            const float factor = b[k * ROWS + i];
            s[i][0] += x * factor;
            s[i][1] += y * factor;
            s[i][2] += z * factor;
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++) memcpy(sums[i], s[i], sizeof s[i]);
}

INLINE void tile(Matrix base, Matrix out, const float *a, const float *b, int64_t r) {
    float evens[ROWS][HALF] __attribute__((aligned(32))), odds[ROWS][HALF] __attribute__((aligned(32)));
    half_tile(a, b, r, evens);
    half_tile(a + r * HALF, b, r, odds);
    for (int i = 0; i < ROWS; i++) {
        float *even = evens[i], *odd = odds[i];
        const char *onto = moved(base, i, 0).at;
        char *place = moved(out, i, 0).at;
        if (base.kind == FLOAT)
            for (int j = 0; j < HALF; j++) {
                even[j] += ((const float *)onto)[2 * j];
                odd[j] += ((const float *)onto)[2 * j + 1];
            }
        if (base.kind == BF16)
            for (int j = 0; j < HALF; j++) {
                even[j] += float_of(((const two *)onto)[j] << 16);
                odd[j] += float_of(((const two *)onto)[j] & 0xFFFF0000);
            }
        if (out.kind == FLOAT)
            for (int j = 0; j < HALF; j++) {
                ((float *)place)[2 * j] = even[j];
                ((float *)place)[2 * j + 1] = odd[j];
            }
        else
            for (int j = 0; j < HALF; j++)
                ((two *)place)[j] = in_high_half(even[j]) >> 16 | (in_high_half(odd[j]) & 0xFFFF0000);
    }
}

INLINE void copy_rows(Matrix from, Matrix to, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows && to.kind != NOTHING; i++)
        memcpy(moved(to, i, 0).at, moved(from, i, 0).at, (size_t)(columns * width_of(to.kind)));
}

/* A tile of which only rows [above, below) and the first `columns` exist. */
INLINE void part_of_tile(Matrix base, Matrix out, const float *a, const float *b, int64_t r, int64_t above,
                         int64_t below, int64_t columns) {
    float around_base[ROWS * COLUMNS] = {0}, around_out[ROWS * COLUMNS];
    const Matrix whole_base = {base.kind, (char *)around_base, COLUMNS};
    const Matrix whole_out = {out.kind, (char *)around_out, COLUMNS};
    copy_rows(moved(base, above, 0), moved(whole_base, above, 0), below - above, columns);
    tile(whole_base, whole_out, a, b, r);
    copy_rows(moved(whole_out, above, 0), moved(out, above, 0), below - above, columns);
}

/* Rows [top, bottom) and columns [left, right) of the product onto `base`; both matrices begin at (top, left). */
INLINE void product(Matrix base, Matrix out, int64_t top, int64_t bottom, int64_t left, int64_t right, int64_t r,
                    const float *a, const float *b) {
    for (int64_t first = top / ROWS * ROWS; first < bottom; first += ROWS)
        for (int64_t column = left; column < right; column += COLUMNS) {
            const Matrix onto = moved(base, first - top, column - left), to = moved(out, first - top, column - left);
            const float *of_a = a + column * r, *of_b = b + first * r;
            if (first >= top && bottom - first >= ROWS && right - column >= COLUMNS)
                tile(onto, to, of_a, of_b, r);
            else
                part_of_tile(onto, to, of_a, of_b, r, first < top ? top - first : 0,
                             bottom - first < ROWS ? bottom - first : ROWS,
                             right - column < COLUMNS ? right - column : COLUMNS);
        }
}

/* Columns of A that stay in the cache: whole panels. */
INLINE int64_t cached_columns(int64_t r) { return CACHED / r < COLUMNS ? COLUMNS : CACHED / r / COLUMNS * COLUMNS; }

INLINE void product_in_blocks(Matrix base, Matrix out, int64_t top, int64_t bottom, int64_t n, int64_t r,
                              const float *a, const float *b) {
    const int64_t block = cached_columns(r);
    for (int64_t left = 0; left < n; left += block)
        product(moved(base, 0, left), moved(out, 0, left), top, bottom, left, n - left < block ? n : left + block, r, a,
                b);
}

/* Rows [top, bottom) of an m x n product: set, or added to what is there or to a base. */
EXPORT FAST void set_product(float *out, int64_t top, int64_t bottom, int64_t n, int64_t r, const float *a,
                             const float *b) {
    product_in_blocks((Matrix){NOTHING, NULL, 0}, (Matrix){FLOAT, (char *)out, n}, top, bottom, n, r, a, b);
}

EXPORT FAST void add_product(float *out, int64_t top, int64_t bottom, int64_t n, int64_t r, const float *a,
                             const float *b) {
    const Matrix both = {FLOAT, (char *)out, n};
    product_in_blocks(both, both, top, bottom, n, r, a, b);
}

EXPORT FAST void add_product_in_bf16(uint16_t *out, int64_t top, int64_t bottom, int64_t n, int64_t r, const float *a,
                                     const float *b) {
    const Matrix both = {BF16, (char *)out, n};
    product_in_blocks(both, both, top, bottom, n, r, a, b);
}

EXPORT FAST void add_product_onto_bf16(const uint16_t *base, float *out, int64_t top, int64_t bottom, int64_t n,
                                       int64_t r, const float *a, const float *b) {
    product_in_blocks((Matrix){BF16, (char *)base, n}, (Matrix){FLOAT, (char *)out, n}, top, bottom, n, r, a, b);
}

/* As add_product_in_bf16, and groups what is rounded by its margin, while it is at hand. */
EXPORT FAST void add_product_with_margins(uint16_t *restrict out, int64_t top, int64_t bottom, int64_t n, int64_t r,
                                          const float *a, const float *b, const uint16_t *bounds, int64_t bound_count,
                                          const uint8_t *table, uint8_t *restrict numbers, uint8_t *restrict up) {
    const Bounds groups = {bounds, bound_count, table};
    const int64_t cached = cached_columns(r), block = cached < PART ? cached : PART / COLUMNS * COLUMNS;
    float sums[ROWS * PART] __attribute__((aligned(64)));
    for (int64_t left = 0; left < n; left += block) {
        const int64_t right = n - left < block ? n : left + block;
        for (int64_t first = top; first < bottom; first = (first / ROWS + 1) * ROWS) {
            const int64_t last = bottom < (first / ROWS + 1) * ROWS ? bottom : (first / ROWS + 1) * ROWS;
            const Matrix base = {BF16, (char *)(out + (first - top) * n + left), n};
            product(base, (Matrix){FLOAT, (char *)sums, PART}, first, last, left, right, r, a, b);
            for (int64_t i = first; i < last; i++) {
                const float *sum = sums + (i - first) * PART;
                const int64_t at = (i - top) * n + left;
                for (int64_t j = 0; j < right - left; j++) out[at + j] = rounded(sum[j]);
                margins(sum, right - left, 16, groups, numbers + at, up + at);
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
