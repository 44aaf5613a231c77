/* y = x W' for many rows of x, through weights that never leave the innermost cache.
 *
 * DEPTH columns of a strip of 16 rows of W fill half of it, in the order in which the product reads
 * them. Panels of up to six rows of x meet them there, with their sums in 12 registers. An output's
 * terms are added in one order, however many rows of x, panels and threads there are.
 */
#ifndef REFOLD_PRODUCT_H
#define REFOLD_PRODUCT_H

#define STRIP 16
#define PANEL 6
#define DEPTH 256 /* a multiple of 8 */
#define BATCH 128 /* rows of x for which weights are formed once; twice as many save nothing */

static inline long panels_of(long m) { return (m + PANEL - 1) / PANEL; }

/* The first row of a panel: their heights differ by one at most, for low ones are slow. */
static inline long panel_start(long m, long panel) { return m * panel / panels_of(m); }

/* A panel of x, transposed, in every block of columns: out[blocks][panels][columns][rows]. */
static void pack_panel(const float *x, long m, long k, long panel, float *out) {
    long first = panel_start(m, panel), rows = panel_start(m, panel + 1) - first;
    for (long start = 0, count; start < k; start += count) {
        count = smaller(k - start, DEPTH);
        const float *from = x + first * k + start;
        float *to = out + start * m + first * count;
        for (long c = 0; c < count; c++)
            for (long r = 0; r < rows; r++) to[c * rows + r] = from[r * k + c];
    }
}

#if defined(__x86_64__)

/* Eight rows of W, one in each 32-bit lane, from the bytes of columns that share their scales. A
 * word's uppermost bit is the sign of a column; doubled, that of the column before. */
AVX2 INLINE void form_rows_avx2(const layer_t *l, const uint8_t *byte, long bytes, int shift,
                                const char *scale, float *out /* [8 bytes][STRIP] */, const int q) {
    __m256 plus[MAX_PLANES], minus[MAX_PLANES];
    for (int p = q - 1; p >= 0; p--) {
        if (p < q - 1 && l->a < q)
            plus[p] = _mm256_add_ps(plus[p + 1], plus[p + 1]);
        else if (l->half)
            plus[p] = _mm256_cvtph_ps(
                _mm_loadu_si128((const __m128i *)(scale + (l->a == q ? p : 0) * TILE * 2)));
        else
            plus[p] = _mm256_loadu_ps((const float *)scale + (l->a == q ? p : 0) * TILE);
        minus[p] = _mm256_sub_ps(_mm256_setzero_ps(), plus[p]);
    }
    for (long b = 0; b < bytes; b++, byte += q * TILE, out += 8 * STRIP) {
        __m256i word[MAX_PLANES];
        for (int p = 0; p < q; p++)
            word[p] = _mm256_sll_epi32(_mm256_loadu_si256((const __m256i *)(byte + p * TILE)),
                                       _mm_cvtsi32_si128(shift));
        for (int bit = 7; bit >= 0; bit--) {
            __m256 sum = _mm256_setzero_ps();
            for (int p = 0; p < q; p++) {
                __m256 value = _mm256_blendv_ps(minus[p], plus[p], _mm256_castsi256_ps(word[p]));
                sum = p ? _mm256_add_ps(sum, value) : value;
                word[p] = _mm256_add_epi32(word[p], word[p]);
            }
            _mm256_storeu_ps(out + bit * STRIP, sum);
        }
    }
}

/* The weights of a strip of a tile, transposed; columns in whole bytes. */
AVX2 INLINE void form_avx2(const layer_t *l, long tile, int strip, long start, long count,
                           float *out /* [count][STRIP] */, const int q) {
    long per_group = l->group / 8, end = (start + count + 7) / 8;
    for (long b = start / 8, next; b < end; b = next) {
        long group = b / per_group;
        next = smaller((group + 1) * per_group, end);
        for (int h = 0; h < 2; h++) {
            const uint8_t *byte = tile_planes(l, tile) + b * q * TILE + 32 * h;
            const char *scale = tile_scales(l, tile, group);
            scale += (STRIP * strip + 8 * h) * (l->half ? 2 : 4);
            form_rows_avx2(l, byte, next - b, 24 - 8 * strip, scale,
                           out + (8 * b - start) * STRIP + 8 * h, q);
        }
    }
}

AVX2 INLINE void multiply_panel_avx2(const float *x /* [count][rows] */,
                                     const float *w /* [count][STRIP] */, long count,
                                     float *y /* [rows][STRIP] */, const int rows) {
    __m256 sum[PANEL][2];
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
#pragma GCC unroll 8 /* a twentieth of the time on a core that shares its decoder */
    for (long c = 0; c < count; c++, x += rows, w += STRIP) {
        __m256 low = _mm256_loadu_ps(w), high = _mm256_loadu_ps(w + 8);
        for (int r = 0; r < rows; r++) {
            __m256 value = _mm256_broadcast_ss(x + r);
            sum[r][0] = _mm256_fmadd_ps(value, low, sum[r][0]);
            sum[r][1] = _mm256_fmadd_ps(value, high, sum[r][1]);
        }
    }
    for (int r = 0; r < rows; r++, y += STRIP) {
        _mm256_storeu_ps(y, _mm256_add_ps(sum[r][0], _mm256_loadu_ps(y)));
        _mm256_storeu_ps(y + 8, _mm256_add_ps(sum[r][1], _mm256_loadu_ps(y + 8)));
    }
}

/* Adds a tile's products with x, as pack_panel leaves it, to y[strips][m][STRIP]. */
AVX2 static void product_avx2(const layer_t *l, const float *x, long m, long tile, float *y) {
    int strips = (int)smaller(TILE / STRIP, (l->n - tile * TILE + STRIP - 1) / STRIP);
    _Alignas(64) float w[DEPTH * STRIP];
    for (long start = 0, count; start < l->k; start += count) {
        count = smaller(l->k - start, DEPTH);
        for (int s = 0; s < strips; s++) {
            if (l->q == 1) form_avx2(l, tile, s, start, count, w, 1);
            if (l->q == 2) form_avx2(l, tile, s, start, count, w, 2);
            if (l->q == 3) form_avx2(l, tile, s, start, count, w, 3);
            if (l->q == 4) form_avx2(l, tile, s, start, count, w, 4);
            for (long panel = 0, first = 0, next; panel < panels_of(m); panel++, first = next) {
                next = panel_start(m, panel + 1);
                const float *from = x + start * m + first * count;
                float *to = y + (s * m + first) * STRIP;
                switch (next - first) {
                case 1: multiply_panel_avx2(from, w, count, to, 1); break;
                case 2: multiply_panel_avx2(from, w, count, to, 2); break;
                case 3: multiply_panel_avx2(from, w, count, to, 3); break;
                case 4: multiply_panel_avx2(from, w, count, to, 4); break;
                case 5: multiply_panel_avx2(from, w, count, to, 5); break;
                case 6: multiply_panel_avx2(from, w, count, to, 6); break;
                }
            }
        }
    }
}

#endif

#endif
