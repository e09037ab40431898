// Moving tokens into and out of the blocks of a pool [blocks, heads, size, d], of any number format.
#include <stdint.h>
#include <string.h>

// out[h, i] = pool[blocks[i], h]: `part` bytes are one head of one block.
void gather(const char *pool, const int64_t *blocks, int64_t count, int64_t heads, int64_t part, char *out, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; i++)
        for (int64_t h = 0; h < heads; h++) memcpy(out + (h * count + i) * part, pool + (blocks[i] * heads + h) * part, part);
}

// pool[block[t], h, offset[t]] = x[t, h], of `row` bytes, for x with strides in bytes.
void put(char *pool, const char *x, const int64_t *block, const int64_t *offset, int64_t tokens, int64_t heads, int64_t size,
         int64_t row, int64_t x_token, int64_t x_head) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++)
            memcpy(pool + ((block[t] * heads + h) * size + offset[t]) * row, x + t * x_token + h * x_head, row);
}
