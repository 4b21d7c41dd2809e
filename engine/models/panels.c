/* y = x . w, one core, AVX-512: w in panels of 32 outputs, [width / 32][depth][32], each read once a tile of rows.
   Owns the product alone. Every sum runs over depth from 0 on in one accumulator, so a row's result is the same
   whatever rows stand beside it. Never allocates, never checks: engine/models/panels.py does. */

#include <stddef.h>

typedef float lanes __attribute__((vector_size(64)));
typedef float loose __attribute__((vector_size(64), aligned(4)));

enum { PANEL = 32, TILE_MAX = 12 }; /* 24 accumulators, two weights and a broadcast of 32 registers */

typedef void tile_of(const float *x, const lanes *w, float *y, size_t width, size_t depth);

#define TILE(ROWS)                                                                                             \
    static void tile_##ROWS(const float *x, const lanes *w, float *y, size_t width, size_t depth) {            \
        lanes sum[ROWS][2] = {{{0}}};                                                                          \
        for (size_t k = 0; k < depth; k++, w += 2) {                                                           \
            _Pragma("GCC unroll 12") for (size_t row = 0; row < ROWS; row++) {                                 \
                sum[row][0] += x[row * depth + k] * w[0];                                                      \
                sum[row][1] += x[row * depth + k] * w[1];                                                      \
            }                                                                                                  \
        }                                                                                                      \
        for (size_t row = 0; row < ROWS; row++) {                                                              \
            *(loose *)(y + row * width) = sum[row][0];                                                         \
            *(loose *)(y + row * width + 16) = sum[row][1];                                                    \
        }                                                                                                      \
    }

TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)

static tile_of *const tiles[TILE_MAX + 1] = {
    0, tile_1, tile_2, tile_3, tile_4, tile_5, tile_6, tile_7, tile_8, tile_9, tile_10, tile_11, tile_12,
};

void product(const float *x, const float *w, float *y, size_t rows, size_t width, size_t depth) {
    size_t parts = (rows + TILE_MAX - 1) / TILE_MAX;
    for (size_t panel = 0; panel < width; panel += PANEL) {
        for (size_t part = 0; part < parts; part++) { /* of equal heights: 16 rows are 8 and 8, not 12 and 4 */
            size_t from = rows * part / parts, height = rows * (part + 1) / parts - from;
            tiles[height](x + from * depth, (const lanes *)(w + panel * depth), y + from * width + panel, width, depth);
        }
    }
}
