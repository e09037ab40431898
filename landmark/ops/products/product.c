// out = a b + bias in float32, of matrices of float32 or bfloat16 in any strides (Goto and van de Geijn 2008): tiles of a and b
// are widened into the second-level cache, and strips of SIX rows times two vectors of columns are summed in registers.
#include "lanes.h"
#include <stdlib.h>

#define SIX 6
#define WIDE (2 * W)  // columns of a strip
#define ROWS 192      // of a tile
#define COLUMNS 128
#define DEEP 256      // of a and b at a time

typedef struct {
    char *p;
    int64_t row, column;  // elements from one to the next
    int64_t half;
} Matrix;

INLINE char *at(const Matrix *m, int64_t row, int64_t column) {
    return m->p + (row * m->row + column * m->column) * (m->half ? 2 : 4);
}

// [rows, columns] of m from (row, column) on -> floats, `apart` from row to row, with zeros up to `high` rows and `wide` columns;
// `wide`, and where m's columns lie end to end `high` too, are whole numbers of vectors.
INLINE void widened(const Matrix *m, int64_t row, int64_t column, int64_t rows, int64_t columns, float *to, int64_t apart,
                    int64_t high, int64_t wide, const int half) {
    const char *from = at(m, row, column);
    if (rows < high || columns < wide)
        for (int64_t r = 0; r < high; r++) memset(to + r * apart, 0, wide * sizeof *to);
    if (m->column == 1)
        for (int64_t r = 0; r < rows; r++, from += m->row * (half ? 2 : 4), to += apart) {
            int64_t c = 0;
            for (; c + W <= columns; c += W) store(to, c, load(from, c, half), 0);
            for (; c < columns; c++) to[c] = get(from, c, half);
        }
    else if (m->row == 1)
        for (int64_t c = 0; c < columns; c += W, from += W * m->column * (half ? 2 : 4)) {
            const int64_t across = MIN(W, columns - c);
            for (int64_t r = 0; r < rows; r += W) {
                vf v[W];
                for (int j = 0; j < W; j++) v[j] = splat(0);
                if (across == W && r + W <= rows)
                    for (int j = 0; j < W; j++) v[j] = load(from, r + j * m->column, half);
                else
                    for (int j = 0; j < across; j++) v[j] = load_n(from, r + j * m->column, MIN(W, rows - r), 0, half);
                transpose(v);
                for (int i = 0; i < W; i++) store(to, (r + i) * apart + c, v[i], 0);
            }
        }
    else
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < columns; c++) to[r * apart + c] = get(at(m, row + r, column + c), 0, half);
}

// c[SIX][COLUMNS] (+)= a [SIX][DEEP] times b [k][WIDE].
INLINE void strip(const float *a, const float *b, float *c, int64_t k, const int first) {
    vf acc[SIX][2];
    for (int i = 0; i < SIX; i++)
        for (int j = 0; j < 2; j++) acc[i][j] = first ? splat(0) : load(c, i * COLUMNS + j * W, 0);
#pragma GCC unroll 4
    for (int64_t d = 0; d < k; d++, b += WIDE) {
        const vf left = load(b, 0, 0), right = load(b, W, 0);
        for (int i = 0; i < SIX; i++) {
            const vf x = splat(a[i * DEEP + d]);
            acc[i][0] += x * left, acc[i][1] += x * right;
        }
    }
    for (int i = 0; i < SIX; i++)
        for (int j = 0; j < 2; j++) store(c, i * COLUMNS + j * W, acc[i][j], 0);
}

INLINE void widened_any(const Matrix *m, int64_t row, int64_t column, int64_t rows, int64_t columns, float *to, int64_t apart,
                        int64_t high, int64_t wide) {
    if (m->half)
        widened(m, row, column, rows, columns, to, apart, high, wide, 1);
    else
        widened(m, row, column, rows, columns, to, apart, high, wide, 0);
}

INLINE int64_t whole(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Rows [top, top + rows) and columns [left, left + columns) of the product.
static void tile(const Matrix *a, const Matrix *b, const Matrix *bias, const Matrix *out, int64_t k, int64_t top, int64_t rows,
                 int64_t left, int64_t columns, float *room) {
    float *as = room, *bs = as + ROWS * DEEP, *cs = bs + DEEP * COLUMNS;
    const int64_t high = whole(rows, SIX), wide = whole(columns, WIDE);
    for (int64_t from = 0; from < MAX(k, 1); from += DEEP) {
        const int64_t deep = MIN(DEEP, k - from);
        widened_any(a, top, from, rows, deep, as, DEEP, whole(high, W), whole(deep, W));
        for (int64_t j = 0; j < wide; j += WIDE)
            widened_any(b, from, left + j, deep, MIN(WIDE, columns - j), bs + j * DEEP, WIDE, whole(deep, W), WIDE);
        for (int64_t j = 0; j < wide; j += WIDE)
            for (int64_t i = 0; i < high; i += SIX) {
                if (from)
                    strip(as + i * DEEP, bs + j * DEEP, cs + i * COLUMNS + j, deep, 0);
                else
                    strip(as + i * DEEP, bs + j * DEEP, cs + i * COLUMNS + j, deep, 1);
            }
    }
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j += W) {
            const int64_t some = MIN(W, columns - j);
            vf v = load(cs, i * COLUMNS + j, 0);
            for (int l = 0; bias->p && l < some; l++) v[l] += get(at(bias, 0, left + j + l), 0, bias->half);
            if (out->column == 1 && some == W) {
                if (out->half)
                    store(at(out, top + i, left + j), 0, v, 1);
                else
                    store(at(out, top + i, left + j), 0, v, 0);
            } else
                for (int l = 0; l < some; l++) put(at(out, top + i, left + j + l), 0, v[l], out->half);
        }
}

// a [m, k], b [k, n], bias [1, n] or null -> out [m, n].
void product(const Matrix *a, const Matrix *b, const Matrix *bias, const Matrix *out, int64_t m, int64_t k, int64_t n, int threads) {
    const int64_t down = (m + ROWS - 1) / ROWS, across = (n + COLUMNS - 1) / COLUMNS;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *room = aligned_alloc(64, (ROWS * DEEP + DEEP * COLUMNS + ROWS * COLUMNS) * 4);
        if (!room) abort();
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < down * across; t++) {
            const int64_t top = t % down * ROWS, left = t / down * COLUMNS;
            tile(a, b, bias, out, k, top, MIN(ROWS, m - top), left, MIN(COLUMNS, n - left), room);
        }
        free(room);
    }
}
