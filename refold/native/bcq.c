/* y = x W' + bias where W is a sum of scaled binary planes, without forming W.
 *
 * Four signs of a row pick one of 16 sums of four activations: the sums are tabulated once per
 * call, then each byte of a plane (eight signs) costs two look-ups and two additions.
 *
 * Storage. Rows come in tiles of 64, columns in bytes of eight (bit 0 is the first column):
 *   planes [tiles][ceil(k / 8)][q][64]     byte 4 j + c belongs to row 16 c + j of the tile
 *   scales [tiles][groups][a][64]          in row order, float or IEEE half, a = q or 1
 * With that order of bytes, word j >> 8 c holds row 16 c + j: vectors of 32-bit lanes meet their
 * rows in order at every vector width. Rows and columns past the end are zero bytes; x is padded
 * with zeros. With a = 1, plane i has the scale times 2^(q - 1 - i).
 *
 * No libc beyond memory and threads, no global state but the pool; safe to call from many threads.
 */
#define _GNU_SOURCE /* affinities of threads */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "pool.h"

#define INLINE static inline __attribute__((always_inline))
#define TILE 64
#define MAX_PLANES 4
#define CHUNK 16 /* bytes of columns that are summed before the scale is applied */
#define SLAB 32  /* rows of x whose tables are kept at a time: they must stay in the cache */
#define LARGEST 1e18f /* of x: sums of planes that cancel must not overflow before they do */

enum { BCQ_OK = 0, BCQ_RANGE = 1, BCQ_MEMORY = 2, BCQ_ARGUMENT = 3, BCQ_ABSENT = 4 };
enum { ISA_PORTABLE = 0, ISA_AVX2 = 1, ISA_AVX512 = 2, ISA_NEON = 3 };

/* One layer. */
typedef struct {
    const uint8_t *planes;
    const void *scales;
    const float *bias;
    long n, k, group; /* group: columns that share a scale, a multiple of 8 */
    int q, a, half;
} layer_t;

/* What one row of x becomes. */
typedef struct {
    float *sums;    /* [2 ceil(k / 8)][16], exact; with codes: of the last block */
    uint8_t *codes; /* [2 ceil(k / 8)][16], sums / step + 128, rounded; or NULL */
    float *steps;   /* [blocks] */
    long block;     /* bytes of columns that share a step */
} row_t;

static inline long bytes_of(const layer_t *l) { return (l->k + 7) / 8; }
static inline long groups_of(const layer_t *l) { return (l->k + l->group - 1) / l->group; }
static inline long tiles_of(const layer_t *l) { return (l->n + TILE - 1) / TILE; }
static inline long smaller(long a, long b) { return a < b ? a : b; }

static inline const uint8_t *tile_planes(const layer_t *l, long tile) {
    return l->planes + tile * bytes_of(l) * l->q * TILE;
}

static inline const void *tile_scales(const layer_t *l, long tile, long group) {
    long at = (tile * groups_of(l) + group) * l->a * TILE;
    return (const char *)l->scales + at * (l->half ? 2 : 4);
}

/* IEEE half to float: shift the fraction into place, then let a multiplication fix the exponent. */
static inline float half_to_float(uint16_t h) {
    union { uint32_t u; float f; } v;
    v.u = (uint32_t)(h & 0x7fff) << 13;
    v.f *= 0x1p112f;
    if ((h & 0x7c00) == 0x7c00) v.u |= 0x7f800000; /* infinity and NaN */
    v.u |= (uint32_t)(h & 0x8000) << 16;
    return v.f;
}

static inline void load_scales(const layer_t *l, long tile, long group, float *out /* [q][64] */) {
    const void *from = tile_scales(l, tile, group);
    long count = (long)l->a * TILE;
    if (l->half)
        for (long i = 0; i < count; i++) out[i] = half_to_float(((const uint16_t *)from)[i]);
    else
        memcpy(out, from, (size_t)count * sizeof(float));
    for (int p = l->q - 2; l->a < l->q && p >= 0; p--) {
        if (p == l->q - 2) memcpy(out + (l->q - 1) * TILE, out, TILE * sizeof(float));
        for (int r = 0; r < TILE; r++) out[p * TILE + r] = 2 * out[(p + 1) * TILE + r];
    }
}

/* ---- activations ------------------------------------------------------------------------------*/

static int in_range(const float *x, long count) {
    int fine = 1;
    for (long i = 0; i < count; i++) fine &= fabsf(x[i]) <= LARGEST; /* false for NaN */
    return fine;
}

/* Sums over four activations: entry i adds those whose bit is set and subtracts the others. */
INLINE void tabulate(const float *x, float *sums) {
    static const float sign[4][16] = {
        {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1},
        {-1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1},
        {-1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1},
        {-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1},
    };
    for (int i = 0; i < 16; i++)
        sums[i] = sign[0][i] * x[0] + sign[1][i] * x[1] + sign[2][i] * x[2] + sign[3][i] * x[3];
}

/* What makes the inverse of a small number finite. */
static inline float lift_of(float largest) { return largest < 1e-30f ? 0x1p100f : 1; }

/* Sums of a block as bytes around 128, in steps of the largest sum / 127. */
INLINE float quantise(const float *sums, long count, uint8_t *codes) {
    int32_t bits = 0; /* positive floats are ordered like the integers of the same bits */
    for (long i = 0; i < count; i++) {
        int32_t size;
        memcpy(&size, sums + i, sizeof size);
        size &= 0x7fffffff;
        bits = size > bits ? size : bits;
    }
    float largest;
    memcpy(&largest, &bits, sizeof largest);
    float lift = lift_of(largest), inverse = largest > 0 ? 127 / (largest * lift) : 0;
    for (long i = 0; i < count; i++) codes[i] = (uint8_t)(int)(sums[i] * lift * inverse + 128.5f);
    return largest / 127;
}

/* The tables of a row; with codes, sums are needed for a block at a time alone. */
INLINE void prepare_any(const float *x, long k, const row_t *row) {
    long quads = (k + 7) / 8 * 2, per_block = row->codes ? 2 * row->block : quads;
    for (long start = 0, count; start < quads; start += count) {
        count = smaller(per_block, quads - start);
        float *sums = row->sums + (row->codes ? 0 : start * 16);
        for (long i = 0; i < count; i++) {
            float four[4] = {0};
            long at = 4 * (start + i), left = smaller(k - at, 4);
            if (left == 4)
                memcpy(four, x + at, sizeof four);
            else if (left > 0)
                memcpy(four, x + at, (size_t)left * sizeof(float));
            tabulate(four, sums + 16 * i);
        }
        if (row->codes)
            row->steps[start / per_block] = quantise(sums, 16 * count, row->codes + 16 * start);
    }
}

typedef void prepare_fn(const float *x, long k, const row_t *row);
typedef void gemv_fn(const layer_t *l, const row_t *x, long tile, float *y /* [64] */);
typedef void unpack_fn(const layer_t *l, long tile, float *out, long stride);
typedef void product_fn(const layer_t *l, const float *x, long m, long tile, float *y);

/* ---- portable ---------------------------------------------------------------------------------*/

static void exact_portable(const layer_t *l, const row_t *x, long tile, float *y) {
    const uint8_t *planes = tile_planes(l, tile);
    long columns = bytes_of(l), per_group = l->group / 8;
    float scale[MAX_PLANES * TILE];
    for (long start = 0, next; start < columns; start = next) {
        long group = start / per_group;
        next = smaller(smaller(start + CHUNK, (group + 1) * per_group), columns);
        if (start % per_group == 0) load_scales(l, tile, group, scale);
        for (int p = 0; p < l->q; p++) {
            float sum[TILE] = {0};
            for (long b = start; b < next; b++) {
                const uint8_t *byte = planes + (b * l->q + p) * TILE;
                const float *low = x->sums + b * 32, *high = low + 16;
                for (int c = 0; c < 4; c++)
                    for (int j = 0; j < 16; j++) {
                        uint8_t v = byte[4 * j + c];
                        sum[16 * c + j] += low[v & 15] + high[v >> 4];
                    }
            }
            for (int r = 0; r < TILE; r++) y[r] += scale[p * TILE + r] * sum[r];
        }
    }
}

/* The weights of a tile, transposed: out[column][row]. Signs are moved onto the scales. */
INLINE void unpack_any(const layer_t *l, long tile, float *out, long stride) {
    const uint8_t *planes = tile_planes(l, tile);
    long columns = bytes_of(l), per_group = l->group / 8;
    uint32_t scale[MAX_PLANES * TILE];
    for (long b = 0; b < columns; b++) {
        if (b % per_group == 0) {
            float read[MAX_PLANES * TILE];
            load_scales(l, tile, b / per_group, read);
            memcpy(scale, read, (size_t)l->q * TILE * sizeof *scale);
        }
        for (int bit = 0; bit < 8 && 8 * b + bit < l->k; bit++) {
            float *to = out + (8 * b + bit) * stride;
            for (int c = 0; c < 4; c++) {
                float sum[16] = {0};
                for (int p = 0; p < l->q; p++) {
                    uint32_t word[16];
                    memcpy(word, planes + (b * l->q + p) * TILE, sizeof word);
                    for (int j = 0; j < 16; j++) {
                        union { uint32_t u; float f; } v;
                        v.u = scale[p * TILE + 16 * c + j];
                        v.u ^= ~(word[j] << (31 - bit - 8 * c)) & 0x80000000u;
                        sum[j] += v.f;
                    }
                }
                memcpy(to + 16 * c, sum, sizeof sum);
            }
        }
    }
}

/* ---- vectors ----------------------------------------------------------------------------------*/

#define AHEAD 8192 /* bytes of planes that are fetched ahead; 2048 costs a quarter of the speed */

#if defined(__x86_64__)
#include "x86.h"
#elif defined(__aarch64__)
#include "neon.h"
#endif
#include "product.h"

typedef struct {
    prepare_fn *prepare;
    gemv_fn *exact, *lookup;
    unpack_fn *unpack;
    product_fn *product; /* or NULL */
} kernels_t;

static void unpack_portable(const layer_t *l, long tile, float *out, long stride) {
    unpack_any(l, tile, out, stride);
}

static void prepare_portable(const float *x, long k, const row_t *row) { prepare_any(x, k, row); }

/* Where bytes cannot be looked up in a register, floats are looked up in memory just as fast. */
static const kernels_t KERNELS[] = {
    [ISA_PORTABLE] = {prepare_portable, exact_portable, exact_portable, unpack_portable},
#if defined(__x86_64__)
    [ISA_AVX2] = {prepare_avx2, exact_avx2, lookup_avx2, unpack_avx2, product_avx2},
    [ISA_AVX512] = {prepare_avx512, exact_avx512, lookup_avx512, unpack_avx512},
#elif defined(__aarch64__)
    [ISA_NEON] = {prepare_portable, exact_portable, lookup_neon, unpack_portable},
#endif
};

/* ---- interface --------------------------------------------------------------------------------*/

#ifndef BCQ_SOURCE
#define BCQ_SOURCE "unknown"
#endif

/* What the library was built from. */
const char *bcq_source(void) { return BCQ_SOURCE; }

/* Whether this processor runs the instruction set. */
int bcq_supports(int isa) {
    switch (isa) {
    case ISA_PORTABLE: return 1;
#if defined(__x86_64__)
    case ISA_AVX2:
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("f16c");
    case ISA_AVX512:
        return bcq_supports(ISA_AVX2) && __builtin_cpu_supports("avx512f") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq");
#elif defined(__aarch64__)
    case ISA_NEON: return 1;
#endif
    default: return 0;
    }
}

typedef struct {
    layer_t layer;
    const kernels_t *kernels;
    gemv_fn *gemv;
    const float *x;
    row_t *rows;
    float *panels; /* of x */
    long m;     /* rows of x at hand */
    long tiles; /* that a piece of work multiplies with all of them */
    float *out;
    long first, stride;
} work_t;

static void prepare_row(void *context, long i) {
    const work_t *w = context;
    w->kernels->prepare(w->x + i * w->layer.k, w->layer.k, w->rows + i);
}

static void multiply_tiles(void *context, long piece) {
    const work_t *w = context;
    const layer_t *l = &w->layer;
    long end = smaller((piece + 1) * w->tiles, tiles_of(l));
    for (long i = 0; i < w->m; i++)
        for (long tile = piece * w->tiles; tile < end; tile++) {
            long start = tile * TILE, count = smaller(l->n - start, TILE);
            float y[TILE] = {0};
            if (l->bias) memcpy(y, l->bias + start, (size_t)count * sizeof(float));
            w->gemv(l, w->rows + i, tile, y);
            memcpy(w->out + i * l->n + start, y, (size_t)count * sizeof(float));
        }
}

static void pack_rows(void *context, long panel) {
    const work_t *w = context;
    pack_panel(w->x, w->m, w->layer.k, panel, w->panels);
}

static void multiply_formed(void *context, long tile) {
    const work_t *w = context;
    const layer_t *l = &w->layer;
    long start = tile * TILE, count = smaller(l->n - start, TILE);
    float y[BATCH * TILE], bias[TILE] = {0};
    if (l->bias) memcpy(bias, l->bias + start, (size_t)count * sizeof(float));
    for (long s = 0; s < count; s += STRIP)
        for (long i = 0; i < w->m; i++)
            memcpy(y + s * w->m + i * STRIP, bias + s, STRIP * sizeof(float));
    w->kernels->product(l, w->panels, w->m, tile, y);
    for (long s = 0; s < count; s += STRIP)
        for (long i = 0; i < w->m; i++)
            memcpy(w->out + i * l->n + start + s, y + s * w->m + i * STRIP,
                   (size_t)smaller(count - s, STRIP) * sizeof(float));
}

static void unpack_tile(void *context, long piece) {
    const work_t *w = context;
    w->kernels->unpack(&w->layer, w->first + piece, w->out + piece * TILE, w->stride);
}

/* Tables must not straddle cache lines. */
static void *aligned(size_t size) { return aligned_alloc(64, (size + 63) / 64 * 64); }

static int valid(const layer_t *l, int isa) {
    return l->n > 0 && l->k > 0 && l->group > 0 && l->group % 8 == 0 && l->q >= 1 &&
           l->q <= MAX_PLANES && (l->a == 1 || l->a == l->q) && bcq_supports(isa);
}

/* y[m][n] from x[m][k], both contiguous. BCQ_RANGE: x holds infinities, NaN or magnitudes beyond
 * LARGEST, and y is not written. */
int bcq_multiply(const float *x, long m, const uint8_t *planes, const void *scales, int half,
                 const float *bias, float *y, long n, long k, int q, int a, long group, int exact,
                 int isa, int threads) {
    work_t w = {.layer = {planes, scales, bias, n, k, group, q, a, half}, .x = x, .out = y};
    if (!valid(&w.layer, isa) || threads < 1) return BCQ_ARGUMENT;
    if (!in_range(x, m * k)) return BCQ_RANGE;
    if (m == 0) return BCQ_OK;
    w.kernels = KERNELS + isa;
    w.gemv = exact ? w.kernels->exact : w.kernels->lookup;
    int coded = w.gemv != w.kernels->exact;
    long entries = bytes_of(&w.layer) * 32, slab = smaller(m, SLAB);
    long block = group % 64 == 0 ? 8 : group % 32 == 0 ? 4 : group % 16 == 0 ? 2 : 1;
    long blocks = (bytes_of(&w.layer) + block - 1) / block;
    long summed = coded ? block * 32 : entries; /* both multiples of what aligns the next row */
    float *sums = aligned((size_t)slab * summed * sizeof *sums);
    float *steps = aligned((size_t)slab * blocks * sizeof *steps);
    uint8_t *codes = aligned(coded ? (size_t)slab * entries : 1);
    row_t rows[SLAB];
    int result = BCQ_MEMORY;
    if (sums && steps && codes) {
        for (long i = 0; i < slab; i++)
            rows[i] = (row_t){sums + i * summed, coded ? codes + i * entries : NULL,
                              steps + i * blocks, block};
        w.rows = rows;
        for (; m > 0; m -= w.m, w.x += w.m * k, w.out += w.m * n) {
            w.m = smaller(m, slab);
            /* Tiles stay in the cache for several rows, and their tables; every thread gets some. */
            w.tiles = w.m > 1 ? smaller(4, 1 + (tiles_of(&w.layer) - 1) / (4L * threads)) : 1;
            share_out(prepare_row, &w, w.m, w.m >= 8 ? threads : 1);
            share_out(multiply_tiles, &w, (tiles_of(&w.layer) + w.tiles - 1) / w.tiles, threads);
        }
        result = BCQ_OK;
    }
    free(sums);
    free(steps);
    free(codes);
    return result;
}

/* out[k][stride]: the weights of tiles first .. first + count - 1, transposed, whole tiles. */
int bcq_unpack(const uint8_t *planes, const void *scales, int half, float *out, long stride,
               long first, long count, long n, long k, int q, int a, long group, int isa,
               int threads) {
    work_t w = {.layer = {planes, scales, NULL, n, k, group, q, a, half},
                .out = out, .first = first, .stride = stride};
    if (!valid(&w.layer, isa)) return BCQ_ARGUMENT;
    w.kernels = KERNELS + isa;
    share_out(unpack_tile, &w, count, threads);
    return BCQ_OK;
}

/* The same for many rows of any x, infinities and NaN among them, exactly, through formed weights.
 * BCQ_ABSENT: the instruction set has no such product, and y is not written. */
int bcq_product(const float *x, long m, const uint8_t *planes, const void *scales, int half,
                const float *bias, float *y, long n, long k, int q, int a, long group, int isa,
                int threads) {
    work_t w = {.layer = {planes, scales, bias, n, k, group, q, a, half}, .x = x, .out = y};
    if (!valid(&w.layer, isa) || threads < 1) return BCQ_ARGUMENT;
    w.kernels = KERNELS + isa;
    if (!w.kernels->product) return BCQ_ABSENT;
    if (m == 0) return BCQ_OK;
    w.panels = aligned((size_t)smaller(m, BATCH) * k * sizeof(float));
    if (!w.panels) return BCQ_MEMORY;
    for (; m > 0; m -= w.m, w.x += w.m * k, w.out += w.m * n) {
        w.m = m / ((m + BATCH - 1) / BATCH); /* all about as many */
        share_out(pack_rows, &w, panels_of(w.m), threads);
        share_out(multiply_formed, &w, tiles_of(&w.layer), threads);
    }
    free(w.panels);
    return BCQ_OK;
}
