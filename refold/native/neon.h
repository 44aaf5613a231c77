/* Arm: look-ups of 16 rows. */
#ifndef REFOLD_NEON_H
#define REFOLD_NEON_H

#include <arm_neon.h>

static void lookup_neon(const layer_t *l, const row_t *x, long tile, float *y) {
    const uint8_t *planes = tile_planes(l, tile);
    long columns = bytes_of(l), per_group = l->group / 8;
    float scale[MAX_PLANES * TILE];
    for (long start = 0, next; start < columns; start = next) {
        long group = start / per_group;
        next = smaller(smaller(start + x->block, (group + 1) * per_group), columns);
        if (start == group * per_group) load_scales(l, tile, group, scale);
        const int16x8_t zero = vdupq_n_s16((int16_t)(256 * (next - start)));
        const float32x4_t step = vdupq_n_f32(x->steps[start / x->block]);
        for (int h = 0; h < 4; h++) {
            float32x4_t sum[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
            for (int p = 0; p < l->q; p++) {
                uint16x8_t whole = vdupq_n_u16(0), upper = vdupq_n_u16(0);
                for (long b = start; b < next; b++) {
                    uint8x16_t word = vld1q_u8(planes + (b * l->q + p) * TILE + 16 * h);
                    uint8x16_t low = vld1q_u8(x->codes + b * 32);
                    uint8x16_t high = vld1q_u8(x->codes + b * 32 + 16);
                    uint16x8_t first =
                        vreinterpretq_u16_u8(vqtbl1q_u8(low, vandq_u8(word, vdupq_n_u8(15))));
                    uint16x8_t second = vreinterpretq_u16_u8(vqtbl1q_u8(high, vshrq_n_u8(word, 4)));
                    whole = vaddq_u16(vaddq_u16(whole, first), second);
                    upper = vsraq_n_u16(vsraq_n_u16(upper, first, 8), second, 8);
                }
                int16x8_t even = vreinterpretq_s16_u16(vsubq_u16(whole, vshlq_n_u16(upper, 8)));
                int16x8_t odd = vreinterpretq_s16_u16(upper);
                int32x4_t part[2] = {vreinterpretq_s32_s16(vsubq_s16(even, zero)),
                                     vreinterpretq_s32_s16(vsubq_s16(odd, zero))};
                for (int c = 0; c < 4; c++) {
                    int32x4_t lane = c < 2 ? vshlq_n_s32(part[c % 2], 16) : part[c % 2];
                    float32x4_t value = vcvtq_f32_s32(vshrq_n_s32(lane, 16));
                    float32x4_t factor = vld1q_f32(scale + p * TILE + 16 * c + 4 * h);
                    sum[c] = vfmaq_f32(sum[c], factor, value);
                }
            }
            for (int c = 0; c < 4; c++) {
                float *to = y + 16 * c + 4 * h;
                vst1q_f32(to, vfmaq_f32(vld1q_f32(to), step, sum[c]));
            }
        }
    }
}

#endif
