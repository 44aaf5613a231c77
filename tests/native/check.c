/* The kernel against sums in double, on every instruction set of the processor; for sanitizers and
 * for processors that Python's tests do not reach. Buffers have their exact sizes. */
#include "bcq.c"

#include <stdio.h>

static _Thread_local uint32_t state = 1;

static uint32_t draw(void) { return state = state * 1664525u + 1013904223u; }
static float real(void) { return ((int32_t)draw() >> 8) * 0x1p-22f; }

/* 0 to 3.75 in steps of 2^-8, which a half holds as well. */
static void scale_of(void *to, long i, int half) {
    float value = (draw() >> 8) % 960 / 256.0f;
    if (!half) {
        ((float *)to)[i] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    ((uint16_t *)to)[i] = value ? (uint16_t)(((bits >> 23) - 112) << 10 | (bits >> 13 & 1023)) : 0;
}

static double value_of(const void *from, long i, int half) {
    if (!half) return ((const float *)from)[i];
    uint16_t bits = ((const uint16_t *)from)[i];
    return bits ? ldexp(1024 + (bits & 1023), (bits >> 10) - 25) : 0;
}

enum { LOOKUP, EXACT, PRODUCT }; /* ways to multiply */

static int check(int isa, int way, long m, long n, long k, int q, int a, long group, int half) {
    long tiles = (n + 63) / 64, columns = (k + 7) / 8, groups = (k + group - 1) / group;
    long scales = tiles * groups * a * 64;
    uint8_t *planes = malloc(tiles * columns * q * 64);
    void *alpha = malloc(scales * (half ? 2 : 4));
    float *x = malloc(m * k * 4), *bias = malloc(n * 4), *y = malloc(m * n * 4);
    float *w = malloc(k * tiles * 64 * 4);
    for (long i = 0; i < tiles * columns * q * 64; i++) planes[i] = draw() >> 24;
    for (long i = 0; i < scales; i++) scale_of(alpha, i, half);
    for (long i = 0; i < m * k; i++) x[i] = real();
    for (long i = 0; i < n; i++) bias[i] = real();
    int failed =
        way == PRODUCT
            ? bcq_product(x, m, planes, alpha, half, bias, y, n, k, q, a, group, isa, 3)
            : bcq_multiply(x, m, planes, alpha, half, bias, y, n, k, q, a, group, way, isa, 3);
    failed |= bcq_unpack(planes, alpha, half, w, tiles * 64, 0, tiles, n, k, q, a, group, isa, 3);
    double difference = 0, size = 0, weights = 0;
    for (long r = 0; r < n; r++)
        for (long i = 0; i < m; i++) {
            double sum = bias[r];
            for (long c = 0; c < k; c++) {
                double weight = 0;
                for (int p = 0; p < q; p++) {
                    long tile = r / 64, at = r % 16 * 4 + r % 64 / 16;
                    int bit = planes[((tile * columns + c / 8) * q + p) * 64 + at] >> c % 8 & 1;
                    long of = ((tile * groups + c / group) * a + (a == 1 ? 0 : p)) * 64 + r % 64;
                    double scale = value_of(alpha, of, half) * (a == 1 ? 1 << (q - 1 - p) : 1);
                    weight += bit ? scale : -scale;
                }
                weights = fmax(weights, fabs(weight - w[c * tiles * 64 + r]));
                sum += weight * x[i * k + c];
            }
            difference += (sum - y[i * n + r]) * (sum - y[i * n + r]);
            size += sum * sum;
        }
    double error = sqrt(difference / size);
    failed |= !(error <= (way == LOOKUP ? 2e-2 : 2e-6)) || weights > 1e-5;
    if (failed)
        printf("isa %d way %d m %ld n %ld k %ld q %d a %d group %ld half %d: %g, weights %g\n", isa,
               way, m, n, k, q, a, group, half, error, weights);
    free(planes), free(alpha), free(x), free(bias), free(y), free(w);
    return failed;
}

static void *check_all(void *ran) {
    static const long shapes[][4] = {{2, 40, 40, 8},     {2, 65, 77, 32},    {3, 64, 264, 24},
                                     {9, 130, 200, 64},  {35, 70, 128, 128}, {130, 17, 300, 1024}};
    long failed = 0;
    for (int isa = 0; isa < 4; isa++)
        for (int i = 0; bcq_supports(isa) && i < 6; i++)
            for (int q = 1; q <= 4; q++)
                for (int other = 0; other < 4; other++)
                    for (int way = 0; way <= (KERNELS[isa].product ? PRODUCT : EXACT); way++) {
                        failed += check(isa, way, shapes[i][0], shapes[i][1], shapes[i][2], q,
                                        other & 1 ? 1 : q, shapes[i][3], other >> 1);
                        ++*(long *)ran;
                    }
    return (void *)failed;
}

int main(void) { /* twice at a time, for the one pool */
    long ran[2] = {0, 0};
    void *failed;
    pthread_t other;
    pthread_create(&other, NULL, check_all, ran);
    long count = (long)check_all(ran + 1);
    pthread_join(other, &failed);
    count += (long)failed;
    printf("%ld of %ld failed\n", count, ran[0] + ran[1]);
    return count || !ran[0];
}
