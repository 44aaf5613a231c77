/* AVX2 and AVX-512: the same two kernels, with tables in registers. */
#ifndef REFOLD_X86_H
#define REFOLD_X86_H

#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))

/* ---- AVX-512 ----------------------------------------------------------------------------------*/

AVX512 INLINE void load_scales_avx512(const layer_t *l, long tile, long group,
                                      __m512 *out /* [q][4] */, const int q) {
    const char *from = tile_scales(l, tile, group);
    for (int i = 0; i < 4 * l->a; i++)
        out[i] = l->half ? _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from + 32 * i)))
                         : _mm512_loadu_ps(from + 64 * i);
    if (l->a == q) return;
    for (int i = 0; i < 4; i++) {
        __m512 scale = out[i];
        for (int p = q - 1; p >= 0; p--, scale = _mm512_add_ps(scale, scale))
            out[4 * p + i] = scale;
    }
}

/* The 16 sums of four activations fill one register, and vpermps looks 16 rows up in it. */
AVX512 INLINE void exact_avx512_q(const layer_t *l, const row_t *x, long tile, float *y,
                                  const int q) {
    const uint8_t *planes = tile_planes(l, tile);
    long columns = bytes_of(l), per_group = l->group / 8;
    __m512 scale[MAX_PLANES * 4], total[4];
    for (int c = 0; c < 4; c++) total[c] = _mm512_loadu_ps(y + 16 * c);
    for (long start = 0, next; start < columns; start = next) {
        long group = start / per_group;
        next = smaller(smaller(start + CHUNK, (group + 1) * per_group), columns);
        if (start == group * per_group) load_scales_avx512(l, tile, group, scale, q);
        __m512 sum[MAX_PLANES * 4];
        for (int i = 0; i < 4 * q; i++) sum[i] = _mm512_setzero_ps();
        const uint8_t *byte = planes + start * q * TILE;
        const float *sums = x->sums + start * 32;
        for (long b = start; b < next; b++, sums += 32) {
            __m512 low = _mm512_loadu_ps(sums), high = _mm512_loadu_ps(sums + 16);
            for (int p = 0; p < q; p++, byte += TILE) {
                _mm_prefetch((const char *)byte + AHEAD, _MM_HINT_T0);
                __m512i word = _mm512_loadu_si512(byte);
                for (int c = 0; c < 4; c++) { /* vpermps reads the lowest four bits alone */
                    __m512i first = _mm512_srli_epi32(word, 8 * c);
                    __m512i second = _mm512_srli_epi32(word, 8 * c + 4);
                    __m512 *to = sum + 4 * p + c;
                    *to = _mm512_add_ps(*to, _mm512_permutexvar_ps(first, low));
                    *to = _mm512_add_ps(*to, _mm512_permutexvar_ps(second, high));
                }
            }
        }
        for (int p = 0; p < q; p++)
            for (int c = 0; c < 4; c++)
                total[c] = _mm512_fmadd_ps(scale[4 * p + c], sum[4 * p + c], total[c]);
    }
    for (int c = 0; c < 4; c++) _mm512_storeu_ps(y + 16 * c, total[c]);
}

/* vpshufb looks 64 rows up. Sums of bytes are kept twice in 16-bit lanes: of whole lanes, which
 * overflow harmlessly, and of their upper bytes; the difference is the sum of the lower bytes. */
AVX512 INLINE void lookup_avx512_q(const layer_t *l, const row_t *x, long tile, float *y,
                                   const int q) {
    const uint8_t *planes = tile_planes(l, tile);
    long columns = bytes_of(l), per_group = l->group / 8;
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 scale[MAX_PLANES * 4], total[4];
    for (int c = 0; c < 4; c++) total[c] = _mm512_loadu_ps(y + 16 * c);
    for (long start = 0, next; start < columns; start = next) {
        long group = start / per_group;
        next = smaller(smaller(start + x->block, (group + 1) * per_group), columns);
        if (start == group * per_group) load_scales_avx512(l, tile, group, scale, q);
        __m512i whole[MAX_PLANES], upper[MAX_PLANES];
        for (int p = 0; p < q; p++) whole[p] = upper[p] = _mm512_setzero_si512();
        const uint8_t *byte = planes + start * q * TILE;
        for (long b = start; b < next; b++) {
            const __m128i *codes = (const __m128i *)(x->codes + b * 32);
            __m512i low = _mm512_broadcast_i32x4(_mm_loadu_si128(codes));
            __m512i high = _mm512_broadcast_i32x4(_mm_loadu_si128(codes + 1));
            for (int p = 0; p < q; p++, byte += TILE) {
                _mm_prefetch((const char *)byte + AHEAD, _MM_HINT_T0);
                __m512i word = _mm512_loadu_si512(byte);
                __m512i first = _mm512_shuffle_epi8(low, _mm512_and_si512(word, nibble));
                __m512i second = _mm512_shuffle_epi8(
                    high, _mm512_and_si512(_mm512_srli_epi16(word, 4), nibble));
                whole[p] = _mm512_add_epi16(_mm512_add_epi16(whole[p], first), second);
                upper[p] = _mm512_add_epi16(upper[p], _mm512_srli_epi16(first, 8));
                upper[p] = _mm512_add_epi16(upper[p], _mm512_srli_epi16(second, 8));
            }
        }
        const __m512i zero = _mm512_set1_epi16((short)(256 * (next - start)));
        __m512 sum[4];
        for (int c = 0; c < 4; c++) sum[c] = _mm512_setzero_ps();
        for (int p = 0; p < q; p++) {
            __m512i even = _mm512_sub_epi16(whole[p], _mm512_slli_epi16(upper[p], 8));
            __m512i part[2] = {_mm512_sub_epi16(even, zero), _mm512_sub_epi16(upper[p], zero)};
            for (int c = 0; c < 4; c++) {
                __m512i lane = c < 2 ? _mm512_slli_epi32(part[c % 2], 16) : part[c % 2];
                __m512 value = _mm512_cvtepi32_ps(_mm512_srai_epi32(lane, 16));
                sum[c] = _mm512_fmadd_ps(scale[4 * p + c], value, sum[c]);
            }
        }
        __m512 step = _mm512_set1_ps(x->steps[start / x->block]);
        for (int c = 0; c < 4; c++) total[c] = _mm512_fmadd_ps(step, sum[c], total[c]);
    }
    for (int c = 0; c < 4; c++) _mm512_storeu_ps(y + 16 * c, total[c]);
}

/* ---- AVX2: half a tile at a time, and one plane, for want of registers ------------------------*/

AVX2 INLINE void load_scales_avx2(const layer_t *l, long tile, long group, float *out) {
    if (!l->half || l->a < l->q) {
        load_scales(l, tile, group, out);
        return;
    }
    const char *from = tile_scales(l, tile, group);
    for (int i = 0; i < 8 * l->a; i++)
        _mm256_storeu_ps(out + 8 * i,
                         _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 16 * i))));
}

/* Two tables of eight sums, chosen by the fourth bit. */
AVX2 INLINE __m256 pick_avx2(__m256 below, __m256 above, __m256i index) {
    __m256 fourth = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(below, index),
                            _mm256_permutevar8x32_ps(above, index), fourth);
}

AVX2 static void exact_avx2(const layer_t *l, const row_t *x, long tile, float *y) {
    const uint8_t *planes = tile_planes(l, tile);
    long columns = bytes_of(l), per_group = l->group / 8;
    float scale[MAX_PLANES * TILE];
    for (long start = 0, next; start < columns; start = next) {
        long group = start / per_group;
        next = smaller(smaller(start + CHUNK, (group + 1) * per_group), columns);
        if (start == group * per_group) load_scales_avx2(l, tile, group, scale);
        for (int p = 0; p < l->q; p++)
            for (int h = 0; h < 2; h++) {
                __m256 sum[4];
                for (int c = 0; c < 4; c++) sum[c] = _mm256_setzero_ps();
                for (long b = start; b < next; b++) {
                    const float *sums = x->sums + b * 32;
                    const uint8_t *byte = planes + (b * l->q + p) * TILE + 32 * h;
                    if (h == 0) _mm_prefetch((const char *)byte + AHEAD, _MM_HINT_T0);
                    __m256i word = _mm256_loadu_si256((const __m256i *)byte);
                    __m256 low[2] = {_mm256_loadu_ps(sums), _mm256_loadu_ps(sums + 8)};
                    __m256 high[2] = {_mm256_loadu_ps(sums + 16), _mm256_loadu_ps(sums + 24)};
                    for (int c = 0; c < 4; c++) {
                        __m256i index = _mm256_srli_epi32(word, 8 * c);
                        sum[c] = _mm256_add_ps(sum[c], pick_avx2(low[0], low[1], index));
                        index = _mm256_srli_epi32(word, 8 * c + 4);
                        sum[c] = _mm256_add_ps(sum[c], pick_avx2(high[0], high[1], index));
                    }
                }
                for (int c = 0; c < 4; c++) {
                    long row = 16 * c + 8 * h;
                    __m256 factor = _mm256_loadu_ps(scale + p * TILE + row);
                    _mm256_storeu_ps(
                        y + row, _mm256_fmadd_ps(factor, sum[c], _mm256_loadu_ps(y + row)));
                }
            }
    }
}

/* A block of half a tile: the rows whose bytes are at 32 h. Bytes and lanes are widened by products
 * with 1 and 0 rather than by shifts, which wait for the same units as the look-ups. */
AVX2 INLINE void lookup_avx2_half(const uint8_t *byte, const __m128i *codes, long count,
                                  const float *scale, float step, float *y, const int q,
                                  const int h) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i odd_bytes = _mm256_set1_epi16(256), even_lanes = _mm256_set1_epi32(1);
    __m256i whole[MAX_PLANES], upper[MAX_PLANES];
    for (int p = 0; p < q; p++) whole[p] = upper[p] = _mm256_setzero_si256();
    byte += 32 * h;
    for (long b = 0; b < count; b++, codes += 2) {
        __m256i low = _mm256_broadcastsi128_si256(_mm_loadu_si128(codes));
        __m256i high = _mm256_broadcastsi128_si256(_mm_loadu_si128(codes + 1));
        for (int p = 0; p < q; p++, byte += TILE) {
            if (h == 0) _mm_prefetch((const char *)byte + AHEAD, _MM_HINT_T0);
            __m256i word = _mm256_loadu_si256((const __m256i *)byte);
            __m256i first = _mm256_shuffle_epi8(low, _mm256_and_si256(word, nibble));
            __m256i second =
                _mm256_shuffle_epi8(high, _mm256_and_si256(_mm256_srli_epi16(word, 4), nibble));
            whole[p] = _mm256_add_epi16(_mm256_add_epi16(whole[p], first), second);
            upper[p] = _mm256_add_epi16(upper[p], _mm256_maddubs_epi16(first, odd_bytes));
            upper[p] = _mm256_add_epi16(upper[p], _mm256_maddubs_epi16(second, odd_bytes));
        }
    }
    const __m256i zero = _mm256_set1_epi16((short)(256 * count));
    __m256 sum[4];
    for (int c = 0; c < 4; c++) sum[c] = _mm256_setzero_ps();
    for (int p = 0; p < q; p++) {
        __m256i even = _mm256_sub_epi16(whole[p], _mm256_slli_epi16(upper[p], 8));
        __m256i part[2] = {_mm256_sub_epi16(even, zero), _mm256_sub_epi16(upper[p], zero)};
        for (int c = 0; c < 4; c++) {
            __m256i lane = c < 2 ? _mm256_madd_epi16(part[c], even_lanes)
                                 : _mm256_srai_epi32(part[c - 2], 16);
            __m256 factor = _mm256_loadu_ps(scale + p * TILE + 16 * c + 8 * h);
            sum[c] = _mm256_fmadd_ps(factor, _mm256_cvtepi32_ps(lane), sum[c]);
        }
    }
    for (int c = 0; c < 4; c++) {
        float *to = y + 16 * c + 8 * h;
        _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_set1_ps(step), sum[c], _mm256_loadu_ps(to)));
    }
}

AVX2 INLINE void lookup_avx2_q(const layer_t *l, const row_t *x, long tile, float *y,
                               const int q) {
    const uint8_t *planes = tile_planes(l, tile);
    long columns = bytes_of(l), per_group = l->group / 8;
    float scale[MAX_PLANES * TILE];
    for (long start = 0, next; start < columns; start = next) {
        long group = start / per_group;
        next = smaller(smaller(start + x->block, (group + 1) * per_group), columns);
        if (start == group * per_group) load_scales_avx2(l, tile, group, scale);
        const uint8_t *byte = planes + start * q * TILE;
        const __m128i *codes = (const __m128i *)(x->codes + start * 32);
        float step = x->steps[start / x->block];
        lookup_avx2_half(byte, codes, next - start, scale, step, y, q, 0);
        lookup_avx2_half(byte, codes, next - start, scale, step, y, q, 1);
    }
}

/* The number of planes is a constant in each copy: their sums then stay in registers. */
#define FOR_EACH_Q(isa, name)                                                         \
    isa static void name(const layer_t *l, const row_t *x, long tile, float *y) {     \
        if (l->q == 1) name##_q(l, x, tile, y, 1);                                    \
        if (l->q == 2) name##_q(l, x, tile, y, 2);                                    \
        if (l->q == 3) name##_q(l, x, tile, y, 3);                                    \
        if (l->q == 4) name##_q(l, x, tile, y, 4);                                    \
    }
FOR_EACH_Q(AVX512, exact_avx512)
FOR_EACH_Q(AVX512, lookup_avx512)
FOR_EACH_Q(AVX2, lookup_avx2)

/* The largest of a quad's sums is that of its magnitudes: codes need no table of floats. */
AVX2 INLINE float quantise_avx2(const float *x, long count, uint8_t *codes) {
    static const float sign[3][8] = {{-1, 1, -1, 1, -1, 1, -1, 1},
                                     {-1, -1, 1, 1, -1, -1, 1, 1},
                                     {-1, -1, -1, -1, 1, 1, 1, 1}};
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 most = _mm256_setzero_ps();
    for (long i = 0; i < count; i += 8) {
        __m256 sum = _mm256_and_ps(_mm256_loadu_ps(x + i), magnitude);
        sum = _mm256_add_ps(sum, _mm256_permute_ps(sum, 0xb1));
        most = _mm256_max_ps(most, _mm256_add_ps(sum, _mm256_permute_ps(sum, 0x4e)));
    }
    float largest = _mm_cvtss_f32(
        _mm_max_ss(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1)));
    float lift = lift_of(largest), inverse = largest > 0 ? 127 / (largest * lift) : 0;
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (long i = 0; i < count; i += 8) {
        __m256i sums[2];
        for (int j = 0; j < 2; j++) {
            const float *quad = x + i + 4 * j;
            __m256 below = _mm256_set1_ps(128.5f), last;
            for (int c = 0; c < 3; c++)
                below = _mm256_fmadd_ps(_mm256_loadu_ps(sign[c]),
                                        _mm256_set1_ps(quad[c] * lift * inverse), below);
            last = _mm256_set1_ps(quad[3] * lift * inverse);
            sums[j] = _mm256_packs_epi32(_mm256_cvttps_epi32(_mm256_sub_ps(below, last)),
                                         _mm256_cvttps_epi32(_mm256_add_ps(below, last)));
        }
        __m256i bytes = _mm256_packus_epi16(sums[0], sums[1]);
        _mm256_storeu_si256((__m256i *)(codes + 4 * i),
                            _mm256_permutevar8x32_epi32(bytes, in_order));
    }
    return largest / 127;
}

AVX2 static void prepare_codes_avx2(const float *x, long k, const row_t *row) {
    for (long start = 0, count, block = 0; start < k; start += count, block++) {
        float padded[64]; /* a block has 64 columns at most */
        const float *from = x + start;
        count = smaller(8 * row->block, (k - start + 7) / 8 * 8);
        if (count > k - start) {
            memset(padded, 0, sizeof padded);
            from = memcpy(padded, from, (size_t)(k - start) * sizeof(float));
        }
        row->steps[block] = quantise_avx2(from, count, row->codes + 4 * start);
    }
}

AVX2 static void prepare_avx2(const float *x, long k, const row_t *row) {
    if (row->codes)
        prepare_codes_avx2(x, k, row);
    else
        prepare_any(x, k, row);
}

AVX512 static void prepare_avx512(const float *x, long k, const row_t *row) {
    if (row->codes)
        prepare_codes_avx2(x, k, row);
    else
        prepare_any(x, k, row);
}

AVX2 static void unpack_avx2(const layer_t *l, long tile, float *out, long stride) {
    const __m256i sign = _mm256_set1_epi32((int)0x80000000);
    const uint8_t *planes = tile_planes(l, tile);
    long columns = bytes_of(l), per_group = l->group / 8;
    float scale[MAX_PLANES * TILE];
    for (long b = 0; b < columns; b++) {
        if (b % per_group == 0) load_scales_avx2(l, tile, b / per_group, scale);
        for (int bit = 0; bit < 8 && 8 * b + bit < l->k; bit++)
            for (int row = 0; row < TILE; row += 8) {
                const uint8_t *byte = planes + b * l->q * TILE + 4 * (row % 16);
                const __m128i shift = _mm_cvtsi32_si128(31 - bit - row / 16 * 8);
                __m256 sum = _mm256_setzero_ps();
                for (int p = 0; p < l->q; p++) {
                    __m256i word = _mm256_loadu_si256((const __m256i *)(byte + p * TILE));
                    __m256i minus = _mm256_andnot_si256(_mm256_sll_epi32(word, shift), sign);
                    __m256 value = _mm256_loadu_ps(scale + p * TILE + row);
                    sum = _mm256_add_ps(sum, _mm256_xor_ps(value, _mm256_castsi256_ps(minus)));
                }
                _mm256_storeu_ps(out + (8 * b + bit) * stride + row, sum);
            }
    }
}

AVX512 static void unpack_avx512(const layer_t *l, long tile, float *out, long stride) {
    unpack_any(l, tile, out, stride);
}

#endif
