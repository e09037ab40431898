// y = x W^T + b by a bfloat16 W of which each number is kept in 11 bits and a little, and those numbers. A number's sign and
// fraction are kept as they are, a byte; of exponents a tile has a table of 7, and 3 bits point to one. Where all three are
// set the exponent is the next byte of those that stand beside. Exponents are kept rotated, their lowest bit on top, so that
// the two bytes of a number are two choices between bits of two bytes.
//
// Of 32 columns a tile has 704 bytes: 128 of the pointers' lower two bits, 64 of their highest and 512 of sign and fraction.
// Numbers are taken 64 at a time, four columns; 16 bytes in a row are for four rows, first their first two columns. Of the
// first 128 bytes 64 are for four times 64 numbers, from their lowest bits on, and of the next each 8 for 64, a bit a number.
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define PAIRS 1  // bfloat16 products by vdpbf16ps, two columns at a time
#else
#define PAIRS 0
#endif
#define TOGETHER 1
#define AHEAD 7168
#define MANY 6  // rows of x at a time, with two tiles, where they are more than MOST
#define BLOCK(m, half) (PAIRS && (half) && (m) > MOST ? MANY : MOST)
#include "columns.h"

#define STEP 32
#define BYTES (TILE * STEP * 11 / 8)
#define GROUPS 8  // of 64 numbers, in a step
#define PAIR (STEP / 2)

INLINE int64_t steps_of(int64_t n) { return (n + STEP - 1) / STEP; }
INLINE int64_t unit_bytes(int64_t n, const int bits) { return steps_of(n) * BYTES; }

// What stands beside the codes: where each tile's exponents begin and the last one's end, 8 bytes a tile for its table, of
// which 7 are used, those exponents in the order of the numbers' bytes, and 192 bytes that are read and not used.
typedef struct {
    const int32_t *starts;
    const uint8_t *tables, *exponents;
} Side;

#define TABLE 7
#define BESIDE 7  // what points to no exponent of the table
#define EARLY 3  // times 64 numbers are unpacked before they are needed: it takes longer than multiplying those before

INLINE Side side_of(const void *s, int64_t rows) {
    const int64_t all = units_of(rows);
    const int32_t *at = s;
    return (Side){at, (const uint8_t *)(at + all + 1), (const uint8_t *)(at + 3 * all + 1)};
}

#if defined(__AVX512BW__) && defined(__AVX512VBMI2__)
typedef __m512i Bytes;
#elif defined(__AVX2__)
typedef __m256i Bytes;
#else
typedef uint8_t Bytes __attribute__((vector_size(16)));
#endif

INLINE Bytes table_of(Side side, int64_t tile) {
    typedef int64_t Eights __attribute__((vector_size(sizeof(Bytes))));
    int64_t own;
    memcpy(&own, side.tables + 8 * tile, 8);
    return (Bytes)(own + (Eights){});
}

// The j-th 64 numbers of a step at w, columns 2 p and 2 p + 1 of a tile's 16 rows in the low and high halves of v[p].
INLINE void numbers(const char *w, const int j, Bytes table, const uint8_t **next, vu (*v)[PARTS]) {
    const char *lower = w + j / 4 * 64, *highest = w + 128 + 8 * j, *own = w + 192 + 64 * j;
    const int shift = 2 * (j % 4);
#if defined(__AVX512BW__) && defined(__AVX512VBMI2__)
    const __m512i top = _mm512_set1_epi8(-128), two = _mm512_loadu_si512(lower);
    __m512i byte = _mm512_loadu_si512(own);
    __asm__("" : "+v"(byte));  // or it is read twice
    uint64_t third;
    memcpy(&third, highest, 8);
    __m512i pointer = _mm512_and_si512(shift ? _mm512_srli_epi16(two, shift) : two, _mm512_set1_epi8(3));
    pointer = _mm512_mask_add_epi8(pointer, third, pointer, _mm512_set1_epi8(4));
    const __mmask64 beside = _mm512_cmpeq_epi8_mask(pointer, _mm512_set1_epi8(BESIDE));
    __m512i exponent = _mm512_shuffle_epi8(table, pointer);
    exponent = _mm512_mask_expand_epi8(exponent, beside, _mm512_loadu_si512(*next));
    *next += __builtin_popcountll(beside);
    const __m512i low = _mm512_ternarylogic_epi32(top, exponent, byte, 0xca);  // top ? second : third
    const __m512i high = _mm512_ternarylogic_epi32(top, byte, exponent, 0xca);
    v[0][0] = (vu)_mm512_unpacklo_epi8(low, high), v[1][0] = (vu)_mm512_unpackhi_epi8(low, high);
#elif defined(__AVX2__)
    const __m256i bit = _mm256_set1_epi64x(0x8040201008040201), every = _mm256_set1_epi8(-1);
    const __m256i eight = _mm256_setr_epi64x(0, 0x101010101010101, 0x202020202020202, 0x303030303030303);
    for (int h = 0; h < 2; h++) {
        const __m256i byte = _mm256_loadu_si256((const void *)(own + 32 * h));
        int32_t third;
        memcpy(&third, highest + 4 * h, 4);
        const __m256i third_of = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(third), eight), bit);
        __m256i pointer = _mm256_srli_epi16(_mm256_loadu_si256((const void *)(lower + 32 * h)), shift);
        pointer = _mm256_and_si256(pointer, _mm256_set1_epi8(3));
        pointer = _mm256_or_si256(pointer, _mm256_and_si256(_mm256_cmpeq_epi8(third_of, bit), _mm256_set1_epi8(4)));
        const __m256i beside = _mm256_cmpeq_epi8(pointer, _mm256_set1_epi8(BESIDE));
        __m256i before = beside;  // minus how many of 16 bytes up to each stand beside
        before = _mm256_add_epi8(before, _mm256_slli_si256(before, 1));
        before = _mm256_add_epi8(before, _mm256_slli_si256(before, 2));
        before = _mm256_add_epi8(before, _mm256_slli_si256(before, 4));
        before = _mm256_add_epi8(before, _mm256_slli_si256(before, 8));
        const uint32_t where = _mm256_movemask_epi8(beside);
        const __m128i first = _mm_loadu_si128((const void *)*next);
        *next += __builtin_popcount(where & 0xffff);
        const __m256i some = _mm256_inserti128_si256(_mm256_castsi128_si256(first), _mm_loadu_si128((const void *)*next), 1);
        *next += __builtin_popcount(where >> 16);
        const __m256i found = _mm256_shuffle_epi8(some, _mm256_xor_si256(before, every));
        const __m256i exponent = _mm256_blendv_epi8(_mm256_shuffle_epi8(table, pointer), found, beside);
        const __m256i swap = _mm256_and_si256(_mm256_xor_si256(byte, exponent), _mm256_set1_epi8(-128));
        const __m256i low = _mm256_xor_si256(byte, swap), high = _mm256_xor_si256(exponent, swap);
        const __m256i pairs[2] = {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
        for (int p = 0; p < 2; p++) memcpy((char *)v[p] + 32 * h, pairs + p, 32);
    }
#else
    const Bytes first = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    const Bytes bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    for (int i = 0; i < 64; i += 16) {
        uint64_t third[2], beside[2];
        for (int k = 0; k < 2; k++) third[k] = (uint8_t)highest[i / 8 + k] * 0x101010101010101;
        Bytes lowers, thirds, byte;
        memcpy(&lowers, lower + i, 16), memcpy(&thirds, third, 16), memcpy(&byte, own + i, 16);
        const Bytes pointer = (lowers >> shift & 3) | ((Bytes)((thirds & bit) != 0) & 4), where = (Bytes)(pointer == BESIDE);
        Bytes exponent = __builtin_shuffle(table, pointer);
        memcpy(beside, &where, 16);
        if (beside[0] | beside[1])
            for (int k = 0; k < 16; k++)
                if (where[k]) exponent[k] = *(*next)++;
        const Bytes low = (byte & 127) | (exponent & 128), high = (byte & 128) | (exponent & 127);
        const Bytes pairs[2] = {__builtin_shuffle(low, high, first), __builtin_shuffle(low, high, first + 8)};
        for (int p = 0; p < 2; p++) memcpy((char *)v[p] + i, pairs + p, 16);
    }
#endif
}

INLINE void step_numbers(const char *w, Bytes table, const uint8_t **next, vu (*v)[PARTS]) {
    for (int j = 0; j < GROUPS; j++) numbers(w, j, table, next, v + 2 * j);
}

#if PAIRS
// Adds a step's `numbers` at w, of which the first EARLY groups are in v already and those of the step after it will be, times M
// rows of packed x to acc[M][2]; even and odd pairs of columns apart, so that sums do not wait for each other.
INLINE const uint8_t *pairs(const char *w, const char *after, const char *x, Bytes table, const uint8_t *next, vu (*v)[2][PARTS],
                            vf *acc, const int M) {
#pragma GCC unroll 8
    for (int j = 0; j < GROUPS; j++) {
        const int then = (j + EARLY) % GROUPS;
        numbers(then < j ? after : w, then, table, &next, v[then]);
        for (int p = 0; p < 2; p++) {
            __asm__("" : "+v"(v[then][p][0]));  // or the compiler unpacks them late
            for (int i = 0; i < M; i++) {
                int32_t both;
                memcpy(&both, x + (p * M + i) * 4, 4);
                vf *own = acc + i * 2 + p;
                *own = (vf)_mm512_dpbf16_ps((__m512)*own, (__m512bh)v[j][p][0], (__m512bh)_mm512_set1_epi32(both));
            }
        }
        x += 4 * M * 2;
    }
    return next;
}
#endif

// Adds K columns of numbers v times rows [first, first + N) of the M of packed x to acc[M][PARTS].
INLINE void columns(vu (*v)[PARTS], const float *x, vf *acc, const int K, const int first, const int N, const int M) {
    vf own[8];
    for (int i = 0; i < N * PARTS; i++) own[i] = acc[first * PARTS + i];
#pragma GCC unroll 4
    for (int k = 0; k < K; k++)
        for (int part = 0; part < PARTS; part++) {
            const vu pair = v[k / 2][part];
            const vf number = (vf)(k % 2 ? pair & 0xffff0000 : pair << 16);
            for (int i = 0; i < N; i++) own[i * PARTS + part] += number * x[k * M + first + i];
            IN_ORDER;
        }
    for (int i = 0; i < N * PARTS; i++) acc[first * PARTS + i] = own[i];
}

// Adds a step's numbers at w times M rows of packed x to acc[M][PARTS]. Sums of many rows take turns in the registers.
INLINE const uint8_t *step(const char *w, const float *x, Bytes table, const uint8_t *next, vf *acc, const int M) {
    const int most = 8 / PARTS;
    vu v[GROUPS][2][PARTS];
#pragma GCC unroll 8
    for (int j = 0; j < GROUPS; j++) {
        numbers(w, j, table, &next, v[j]);
        if (M <= most) columns(v[j], x + 4 * j * M, acc, 4, 0, M, M);
    }
    for (int first = 0; first < M && M > most; first += most) columns(v[0], x, acc, STEP, first, MIN(most, M - first), M);
    return next;
}

INLINE void one(const Map *map, int64_t n, const char *x, int64_t tile, int64_t row, const int M, const int bits, const int half) {
    const Side side = side_of(map->s, map->out);
    const Bytes table = table_of(side, tile);
    const char *w = map->w + tile * unit_bytes(n, bits);
    const uint8_t *next = side.exponents + side.starts[tile];
    vf acc[MOST * 2];
    for (int i = 0; i < M * 2; i++) acc[i] = splat(0);
#if PAIRS
    vu v[GROUPS][2][PARTS];
    for (int j = 0; j < EARLY && half; j++) numbers(w, j, table, &next, v[j]);
#endif
#pragma GCC unroll 1
    for (int64_t g = 1; g <= steps_of(n); g++, w += BYTES) {
        fetch(w, BYTES);
        __builtin_prefetch(next + AHEAD / 16, 0, 0);
#if PAIRS
        if (half) {
            next = pairs(w, g < steps_of(n) ? w + BYTES : w, x, table, next, v, acc, M);
            x += STEP * M * 2;
            continue;
        }
#endif
        next = step(w, (const float *)x, table, next, acc, M);
        x += STEP * M * 4;
    }
    vf total[MOST * PARTS];
    for (int i = 0; i < M * PARTS; i++) total[i] = PAIRS && half ? acc[2 * i] + acc[2 * i + 1] : acc[i];
    finish(map, total, tile, row, 1, M, half);
}

INLINE void units(const Map *map, int64_t n, const char *x, int64_t from, int64_t to, int64_t row, const int M, const int bits,
                  const int half) {
#pragma GCC unroll 1
    for (; from < to; from++) one(map, n, x, from, row, M, bits, half);
}

#if PAIRS
#define DEEP 256          // columns of W that are unpacked at a time
#define NEAR (86 * MANY)  // rows of x that meet them

#define MANY_OF(some, run)       \
    switch (some) {              \
        case 1: run(1); break;   \
        case 2: run(2); break;   \
        case 3: run(3); break;   \
        case 4: run(4); break;   \
        case 5: run(5); break;   \
        default: run(MANY);      \
    }

// sums [R M][2] += R tiles' numbers w [R][DEEP / 2] times M rows of packed x from column `from` on; even and odd pairs
// of columns apart, as in `one`.
INLINE void block(const __m512i *w, const char *x, __m512 *sums, int64_t from, int64_t pairs, const int R, const int M) {
    __m512 acc[2][2 * MANY];
    for (int i = 0; i < R * M; i++)
        for (int c = 0; c < 2; c++) acc[c][i] = from ? sums[2 * i + c] : _mm512_setzero_ps();
    x += from * M * 2;
#pragma GCC unroll 1
    for (int64_t p = 0; p < pairs; p += 2)
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++)
#pragma GCC unroll 6
            for (int i = 0; i < M; i++) {
                int32_t both;
                memcpy(&both, x + ((p + c) * M + i) * 4, 4);
                const __m512bh y = (__m512bh)_mm512_set1_epi32(both);
                for (int r = 0; r < R; r++)
                    acc[c][r * M + i] = _mm512_dpbf16_ps(acc[c][r * M + i], (__m512bh)w[r * DEEP / 2 + p + c], y);
            }
    for (int i = 0; i < R * M; i++)
        for (int c = 0; c < 2; c++) sums[2 * i + c] = acc[c][i];
}

// What `one` does, for `rows` rows of packed x. The next columns of W are fetched meanwhile.
INLINE void near_rows(const Map *map, int64_t n, const char *x, int64_t tile, int64_t row, int64_t rows, const int R) {
    const int64_t steps = steps_of(n);
    __m512i w[2 * DEEP / 2];
    __m512 sums[2 * 2 * NEAR];
    Bytes table[2];
    const uint8_t *next[2];
    const Side side = side_of(map->s, map->out);
    for (int r = 0; r < R; r++) table[r] = table_of(side, tile + r), next[r] = side.exponents + side.starts[tile + r];
    for (int64_t from = 0; from < steps; from += DEEP / STEP) {
        const int64_t count = MIN(DEEP / STEP, steps - from);
        for (int r = 0; r < R; r++)
            for (int64_t s = 0; s < count; s++)
                step_numbers(map->w + (tile + r) * unit_bytes(n, 11) + (from + s) * BYTES, table[r], next + r,
                             (vu(*)[PARTS])(w + r * DEEP / 2 + s * PAIR));
        for (int64_t i = 0; i < rows; i += MANY) {
            const char *own = x + i * row_bytes(n, 1);
            for (int64_t b = i / MANY * 64; b < count * BYTES; b += (rows + MANY - 1) / MANY * 64)
                for (int r = 0; r < R; r++)
                    __builtin_prefetch(map->w + (tile + r) * unit_bytes(n, 11) + (from + count) * BYTES + b, 0, 2);
#define RUN(M) block(w, own, sums + 2 * R * i, from * STEP, count * PAIR, R, M)
            MANY_OF(rows - i, RUN)
#undef RUN
        }
    }
    for (int64_t i = 0; i < rows; i += MANY) {
        const int64_t M = MIN(MANY, rows - i);
        vf all[2 * MANY];
        for (int j = 0; j < R * M; j++) all[j] = (vf)(sums[2 * (R * i + j)] + sums[2 * (R * i + j) + 1]);
        finish(map, all, tile, row + i, R, M, 1);
    }
}
#endif

// Tiles [from, to) times all rows of x. Of many each number of W is unpacked once for NEAR of them; what a row comes to does
// not depend on how many there are.
INLINE void all_rows(const Map *map, const char *packed, int64_t m, int64_t n, int64_t from, int64_t to, const int bits,
                     const int half) {
#if PAIRS
    if (half && m > MOST) {
        for (; from < to; from += 2)
            for (int64_t row = 0; row < m; row += NEAR) {
                const char *x = packed + row * row_bytes(n, 1);
                if (to - from > 1)
                    near_rows(map, n, x, from, row, MIN(NEAR, m - row), 2);
                else
                    near_rows(map, n, x, from, row, MIN(NEAR, m - row), 1);
            }
        return;
    }
#endif
    part(map, packed, m, n, from, to, bits, half);
}

TILED(11, f32, 0, all_rows)
TILED(11, bf16, 1, all_rows)
const int64_t most_rows_f32 = 96, most_rows_bf16 = PAIRS ? INT64_MAX : 96;  // beyond them restored weights are as fast

// `count` numbers of a row become elements of y from `at` on; as bfloat16 every bit of them.
INLINE void put_row(char *y, int64_t at, const bf16 *v, int64_t count, const int half) {
    if (half)
        memcpy((bf16 *)y + at, v, count * 2);
    else
        for (int64_t j = 0; j < count; j++) ((float *)y)[at + j] = widen(v[j]);
}

INLINE void restore_unit(const Map *map, int64_t n, int64_t t, char *y, const int bits, const int half) {
    const Side side = side_of(map->s, map->out);
    const Bytes table = table_of(side, t);
    const char *w = map->w + t * unit_bytes(n, bits);
    const uint8_t *next = side.exponents + side.starts[t];
    const int64_t rows = MIN(TILE, map->out - t * TILE);
    for (int64_t k = 0; k < n; k += STEP, w += BYTES) {
        vu v[PAIR][PARTS];
        step_numbers(w, table, &next, v);
        for (int64_t first = 0; first < MIN(PAIR, (n - k + 1) / 2); first += W)
            for (int part = 0; part < PARTS; part++) {
                vf own[W];
                for (int p = 0; p < W; p++) own[p] = (vf)v[first + p][part];
                transpose(own);
                const int64_t at = part * W * n + k + 2 * first;
                for (int r = 0; r < MIN(W, rows - part * W); r++)
                    put_row(y, at + r * n, (const bf16 *)(own + r), MIN(2 * W, n - k - 2 * first), half);
            }
    }
}

RESTORED(11, f32, 0)
RESTORED(11, bf16, 1)

INLINE void restore_row(const Map *map, int64_t n, int64_t row, char *y, const int bits, const int half) {
    const int64_t t = row / TILE, r = row % TILE;
    const Side side = side_of(map->s, map->out);
    const Bytes table = table_of(side, t);
    const char *w = map->w + t * unit_bytes(n, bits);
    const uint8_t *next = side.exponents + side.starts[t];
    for (int64_t k = 0; k < n; k += STEP, w += BYTES) {
        vu v[PAIR][PARTS];
        step_numbers(w, table, &next, v);
        bf16 own[STEP];
        for (int p = 0; p < PAIR; p++) memcpy(own + 2 * p, (const char *)v[p] + 4 * r, 4);
        put_row(y, k, own, MIN(STEP, n - k), half);
    }
}

PICKED(11, f32, 0)
PICKED(11, bf16, 1)

// Exponents are kept rotated: the lowest bit on top.
INLINE uint8_t exponent_of(bf16 v) { return v >> 8 & 127 | v & 128; }

// Tables of w [rows, n], the 7 exponents that most numbers have, the lesser first where as many have them; starts[t + 1]
// becomes how many of tile t have others.
void tables(const bf16 *w, int32_t *side, int64_t rows, int64_t n, int threads) {
    const Side all = side_of(side, rows);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < units_of(rows); t++) {
        const int64_t own = MIN(rows - t * TILE, TILE) * n;
        int32_t count[256] = {0}, left = own;
        for (int64_t i = 0; i < own; i++) count[exponent_of(w[t * TILE * n + i])]++;
        for (int c = 0; c < TABLE; c++) {
            int most = 0;
            for (int j = 1; j < 256; j++)
                if (count[j] > count[most]) most = j;
            ((uint8_t *)all.tables)[8 * t + c] = most, left -= count[most], count[most] = -1;
        }
        side[t + 1] = left;
    }
}

// Codes of w [rows, n], and what exponents stand beside, where tables and starts stand in `side` already.
void encode(const bf16 *w, char *codes, int32_t *side, int64_t rows, int64_t n, int threads) {
    const Side all = side_of(side, rows);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < units_of(rows); t++) {
        char *step = codes + t * unit_bytes(n, 11);
        uint8_t *next = (uint8_t *)all.exponents + all.starts[t], code[256];
        memset(code, BESIDE, sizeof code);
        for (int c = TABLE - 1; c >= 0; c--) code[all.tables[8 * t + c]] = c;
        memset(step, 0, unit_bytes(n, 11));
        for (int64_t k = 0; k < n; k += STEP, step += BYTES) {
            const int64_t down = MIN(TILE, rows - t * TILE), across = MIN(STEP, n - k);
            bf16 near[TILE][STEP];
            for (int r = 0; r < down; r++) memcpy(near[r], w + (t * TILE + r) * n + k, across * 2);
            for (int j = 0; j < GROUPS; j++)
                for (int i = 0; i < 64; i++) {
                    const int row = i / 16 * 4 + i / 2 % 4, column = 4 * j + i / 8 % 2 * 2 + i % 2;
                    if (row >= down || column >= across) continue;
                    const bf16 v = near[row][column];
                    const int exponent = exponent_of(v), own = code[exponent];
                    if (own == BESIDE) *next++ = exponent;
                    step[j / 4 * 64 + i] |= (own & 3) << 2 * (j % 4);
                    step[128 + 8 * j + i / 8] |= own >> 2 << i % 8;
                    step[192 + 64 * j + i] = v >> 8 & 128 | v & 127;
                }
        }
    }
}
