/* The vector code of _native.c, included once a level with W (lanes), ROWS (document rows of a register tile), TARGET and NAME(x) set. */

#define INLINE static inline __attribute__((always_inline)) TARGET
typedef float NAME(V) __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t NAME(I) __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int8_t NAME(BYTES) __attribute__((vector_size(W)));
#define V NAME(V)
#define I NAME(I)
#define BYTES NAME(BYTES)
#define LOAD(p) (*(const V *)(p))
#define SELECT(mask, a, b) ((V)(((mask) & (I)(a)) | (~(mask) & (I)(b))))

/* out[r][lane] = rows[r] . panel[:, lane] for R rows and C vectors of lanes. Each sum is one chain over dim whatever R and C are, so
   that a row's value does not depend on its neighbours. `ahead` walks over the next tile, whose lines are fetched meanwhile. */
INLINE void NAME(tile_of)(const float *rows, int64_t dim, const float *panel, const char *ahead, int64_t step, float *out, const int R, const int C) {
    V acc[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) acc[r][c] = (V){0};
    const float *at[3] = {rows, rows + 5 * dim, rows + 10 * dim};
    for (int64_t t = 0; t < dim; t++, panel += C * W, ahead += step) {
        V q0 = LOAD(panel), q1 = C == 2 ? LOAD(panel + W) : q0;
        __builtin_prefetch(ahead);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            V x = at[r / 5][r % 5 * dim + t] - (V){0};
            acc[r][0] += x * q0;
            if (C == 2) acc[r][1] += x * q1;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) *(V *)(out + (r * C + c) * W) = acc[r][c];
}

#define TILE(R) \
    case R: \
        if (C == 2) NAME(tile_of)(rows, dim, panel, ahead, step, out, R, 2); \
        else NAME(tile_of)(rows, dim, panel, ahead, step, out, R, 1); \
        break;

static TARGET __attribute__((noinline)) void NAME(tile)(const float *rows, int64_t dim, const float *panel, const char *ahead, int64_t step, float *out, int R, int C) {
    switch (R) {
        TILE(1) TILE(2) TILE(3) TILE(4)
#if ROWS >= 6
        TILE(5) TILE(6)
#endif
#if ROWS >= 14
        TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12) TILE(13) TILE(14)
#endif
    }
}
#undef TILE

/* Rows of the next tile: a rest of 1 to 3 rows would leave the multipliers idle, so it shares with the tile before. */
static inline int64_t NAME(rows_of)(int64_t left) {
    return left <= ROWS ? left : left < ROWS + 4 ? (left + 1) / 2 : ROWS;
}

/* Documents as fp32: the rows themselves, or `into` filled from 16 or 8 bits. */
static TARGET const float *NAME(widen)(const char *from, int type, int64_t count, float *into) {
    if (type == F32) return (const float *)from;
    if (type == F16) {
        const uint16_t *x = (const uint16_t *)from;
        for (int64_t t = 0; t < count; t++) {
            uint32_t magnitude = x[t] & 0x7fffu, special = magnitude >= 0x7c00u ? 0x7f800000u : 0;
            into[t] = as_float(as_bits(as_float(magnitude << 13) * 0x1p112f) | special | (x[t] & 0x8000u) << 16);
        }
    } else if (type == BF16) {
        const uint16_t *x = (const uint16_t *)from;
        for (int64_t t = 0; t < count; t++) into[t] = as_float((uint32_t)x[t] << 16);
    } else if (type == I8) {
        const int8_t *x = (const int8_t *)from;
        for (int64_t t = 0; t < count; t++) into[t] = x[t];
    } else {
        const uint8_t *x = (const uint8_t *)from;
        for (int64_t t = 0; t < count; t++) {
            uint32_t magnitude = x[t] & 0x7fu, special = magnitude == 0x7fu ? 0x7fc00000u : 0;
            into[t] = as_float(as_bits(as_float(magnitude << 20) * 0x1p120f) | special | (x[t] & 0x80u) << 24);
        }
    }
    return into;
}

/* Rows of x (count x dim) as panels of two vectors of lanes and a last one of one: panel[t][lane] = x[lane][t], 0 where there is no row. */
static TARGET void NAME(pack)(const float *x, int64_t count, int64_t dim, float *panel) {
    int64_t vectors = (count + W - 1) / W;
    for (int64_t v = 0; v < vectors; v += 2) {
        int64_t lanes = (v + 2 <= vectors ? 2 : 1) * W, used = count - v * W < lanes ? count - v * W : lanes;
        float *to = panel + v * W * dim;
        for (int64_t t = 0; t < dim; t++)
            for (int64_t lane = 0; lane < lanes; lane++) to[t * lanes + lane] = lane < used ? x[(v * W + lane) * dim + t] : 0.0f;
    }
}

/* exp(x) as a number near 1 and the power of two that it is multiplied by; relative error about 1e-7. */
INLINE V NAME(near_one)(V x, I *power) {
    V n = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum's last bits are the rounded integer */
    *power = (I)n - 0x4b400000;
    n -= 12582912.0f;
    V r = x - n * 0.693359375f;
    r -= n * -2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * r * r + r + 1.0f;
}

/* exp as fp32 has it: 0 below the last subnormal, inf above the range, NaN stays. */
INLINE V NAME(exp)(V x) {
    x = SELECT(x < -104.0f, (V){0} - 104.0f, x);
    x = SELECT(x > 89.0f, (V){0} + 89.0f, x);
    I e;
    V p = NAME(near_one)(x, &e);
    I half = e >> 1;
    return p * (V)((half + 127) << 23) * (V)((e - half + 127) << 23); /* in two steps, so that subnormals are reached */
}

INLINE V NAME(larger)(V a, V b) { /* NaN wins */
    I take = (b > a) | (b != b);
    return SELECT(take, b, a);
}

static TARGET void NAME(attention_worker)(void *argument) {
    attention *job = argument;
    int64_t dim = job->dim, item = SIZE[job->type], vectors = (job->longest + W - 1) / W;
    float *panel = scratch(&job->failed, vectors * W * (dim + 2) + ROWS * (2 * W + dim));
    if (!panel) return;
    float *first = panel + vectors * W * dim, *second = first + vectors * W, *s = second + vectors * W, *wide = s + ROWS * 2 * W;
    float rate = job->tau > 0 ? 1.0f / job->tau : 0, shift = job->shift;
    for (int64_t task, packed = -1; (task = __atomic_fetch_add(&job->next, CHUNK, __ATOMIC_RELAXED)) < job->count;)
        for (int64_t p = task; p < task + CHUNK && p < job->count; p++) {
            int64_t query = job->pairs[2 * p], document = job->pairs[2 * p + 1];
            int64_t start = job->q_offsets[query], length = job->q_offsets[query + 1] - start, used = (length + W - 1) / W;
            int64_t row = job->d_offsets[document], end = job->d_offsets[document + 1];
            float *out = job->out + job->out_at[p];
            if (row == end)
                for (int64_t i = 0; i < length; i++) out[i] = -1.0f;
            if (row == end || !length) continue;
            if (packed != query) NAME(pack)(job->q + start * dim, length, dim, panel), packed = query;
            for (int64_t i = 0; i < used * W; i++) first[i] = job->tau > 0 ? 0 : -INFINITY, second[i] = 0;
            for (int64_t R; row < end; row += R) {
                R = NAME(rows_of)(end - row);
                const char *raw = (const char *)job->d + row * dim * item;
                const float *rows = NAME(widen)(raw, job->type, R * dim, wide);
                for (int64_t v = 0; v < used; v += 2) {
                    int C = v + 2 <= used ? 2 : 1;
                    NAME(tile)(rows, dim, panel + v * W * dim, raw + R * dim * item, v ? 0 : R * item, s, (int)R, C);
                    for (int c = 0; c < C; c++) {
                        V *kept = (V *)(first + (v + c) * W), *weights = (V *)(second + (v + c) * W), a = job->tau > 0 ? (V){0} : *kept, b = {0};
                        for (int64_t r = 0; r < R; r++) {
                            V x = LOAD(s + (r * C + c) * W);
                            if (job->scales) x *= job->scales[row + r];
                            if (job->tau > 0) {
                                V weight = NAME(exp)((x - shift) * rate);
                                a += weight * x;
                                b += weight;
                            } else
                                a = NAME(larger)(a, x);
                        }
                        if (job->tau > 0) *kept += a; /* a tile's sums first: fewer roundings than one long sum */
                        else *kept = a;
                        *weights += b;
                    }
                }
            }
            for (int64_t i = 0; i < length; i++) out[i] = job->tau > 0 ? first[i] / second[i] : first[i];
        }
    free(panel);
}

/* exp of what is not above 0, the smallest normal number below -87; NaN stays. */
INLINE V NAME(decay)(V x) {
    I e;
    V p = NAME(near_one)(SELECT(x < -87.0f, (V){0} - 87.0f, x), &e);
    return p * (V)((e + 127) << 23);
}

/* Scores of C vectors of queries by key as exp(score - largest), and one over their sums. */
INLINE void NAME(weigh)(float *s, int64_t length, V *total, const int C) {
    V most[4], sum[2] = {{0}, {0}};
    for (int c = 0; c < 2 * C; c++) most[c] = LOAD(s + c % C * W);
    for (int64_t j = 0; j + 1 < length; j += 2)
        for (int c = 0; c < 2 * C; c++) {
            V x = LOAD(s + (j * C + c) * W);
            most[c] = SELECT(x > most[c], x, most[c]);
        }
    for (int c = 0; c < C; c++) {
        V x = LOAD(s + ((length - 1) * C + c) * W), y = most[c + C];
        x = SELECT(x > y, x, y);
        most[c] = SELECT(x > most[c], x, most[c]);
    }
    for (int64_t j = 0; j < length; j++)
        for (int c = 0; c < C; c++) {
            V *x = (V *)(s + (j * C + c) * W);
            *x = NAME(decay)(*x - most[c]);
            sum[c] += *x;
        }
    for (int c = 0; c < C; c++) total[c] = 1.0f / sum[c];
}

/* One head of one text a task. Lanes are queries, so that softmax over the keys needs no reduction across lanes; a block's weights are
   the panel of the product with the values. */
static TARGET void NAME(packed_worker)(void *argument) {
    packed *job = argument;
    int64_t dim = job->dim, width = job->heads * dim;
    float *keys = scratch(&job->failed, job->longest * (2 * dim + 2 * W) + 4 * W * dim), rate = 1.0f / sqrtf((float)dim);
    if (!keys) return;
    float *values = keys + job->longest * dim, *s = values + job->longest * dim, *panel = s + job->longest * 2 * W, *o = panel + 2 * W * dim;
    for (int64_t task; (task = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->count * job->heads;) {
        int64_t text = task / job->heads, column = task % job->heads * dim, row = job->k_offsets[text], length = job->k_offsets[text + 1] - row;
        if (!length) continue;
        for (int64_t j = 0; j < length; j++) {
            const float *key = job->k + (row + j) * job->k_stride + column, *value = job->v + (row + j) * job->k_stride + column;
            for (int64_t t = 0; t < dim; t++) keys[j * dim + t] = key[t], values[t * length + j] = value[t];
        }
        for (int64_t start = job->q_offsets[text], end = job->q_offsets[text + 1]; start < end; start += 2 * W) {
            int64_t used = end - start < 2 * W ? end - start : 2 * W;
            int C = used > W ? 2 : 1;
            for (int64_t lane = 0; lane < C * W; lane++) {
                const float *query = job->q + (start + lane) * job->q_stride + column;
                for (int64_t t = 0; t < dim; t++) panel[t * C * W + lane] = lane < used ? (job->bias ? query[t] + job->bias[column + t] : query[t]) * rate : 0.0f;
            }
            for (int64_t j = 0, R; j < length; j += R) {
                R = NAME(rows_of)(length - j);
                NAME(tile)(keys + j * dim, dim, panel, (const char *)panel, 0, s + j * C * W, (int)R, C);
            }
            V total[2];
            if (C == 2) NAME(weigh)(s, length, total, 2);
            else NAME(weigh)(s, length, total, 1);
            for (int64_t t = 0, R; t < dim; t += R) {
                R = NAME(rows_of)(dim - t);
                NAME(tile)(values + t * length, length, s, (const char *)s, 0, o + t * C * W, (int)R, C);
            }
            for (int64_t lane = 0; lane < used; lane++) {
                float *out = job->out + (start + lane) * width + column, factor = ((float *)total)[lane];
                for (int64_t t = 0; t < dim; t++) out[t] = o[t * C * W + lane] * factor;
            }
        }
    }
    free(keys);
}

INLINE float NAME(sum)(V x) {
    float lanes[W];
    *(V *)lanes = x;
    for (int width = W / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

/* x / 2 * (1 + erf(x / sqrt 2)); erf by Abramowitz and Stegun, 7.1.26, within 1.5e-7. */
INLINE V NAME(gelu)(V x) {
    V u = SELECT(x < 0.0f, -x, x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * u);
    V p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    V tail = p * t * NAME(decay)(-u * u); /* 1 - erf(u) */
    return 0.5f * x * SELECT(x < 0.0f, tail, 2.0f - tail);
}

static TARGET void NAME(gelu_worker)(void *argument) {
    rows_job *job = argument;
    int64_t dim = job->dim, whole = dim / W * W;
    for (int64_t row; (row = __atomic_fetch_add(&job->next, SOME, __ATOMIC_RELAXED)) < job->count;)
        for (int64_t r = row; r < row + SOME && r < job->count; r++) {
            float *x = job->x + r * dim, rest[W] = {0};
            for (int64_t t = 0; t < whole; t += W) *(V *)(x + t) = NAME(gelu)(LOAD(x + t) + LOAD(job->bias + t));
            for (int64_t t = whole; t < dim; t++) rest[t - whole] = x[t] + job->bias[t];
            if (whole < dim) *(V *)rest = NAME(gelu)(LOAD(rest));
            for (int64_t t = whole; t < dim; t++) x[t] = rest[t - whole];
        }
}

static TARGET void NAME(norm_worker)(void *argument) {
    rows_job *job = argument;
    int64_t dim = job->dim, whole = dim / W * W;
    for (int64_t row; (row = __atomic_fetch_add(&job->next, SOME, __ATOMIC_RELAXED)) < job->count;)
        for (int64_t r = row; r < row + SOME && r < job->count; r++) {
            float *x = job->x + r * dim, total = 0, square = 0;
            const float *residual = job->residual + r * dim;
            V a[2] = {{0}, {0}}, b[2] = {{0}, {0}};
            for (int64_t t = 0; t < whole; t += W) {
                V y = LOAD(x + t) + LOAD(residual + t);
                if (job->bias) y += LOAD(job->bias + t);
                *(V *)(x + t) = y;
                a[t / W % 2] += y;
            }
            for (int64_t t = whole; t < dim; t++) total += x[t] += residual[t] + (job->bias ? job->bias[t] : 0.0f);
            float mean = (NAME(sum)(a[0] + a[1]) + total) / (float)dim;
            for (int64_t t = 0; t < whole; t += W) {
                V y = LOAD(x + t) - mean;
                b[t / W % 2] += y * y;
            }
            for (int64_t t = whole; t < dim; t++) square += (x[t] - mean) * (x[t] - mean);
            float scale = 1.0f / sqrtf((NAME(sum)(b[0] + b[1]) + square) / (float)dim + job->eps);
            for (int64_t t = 0; t < whole; t += W) *(V *)(x + t) = (LOAD(x + t) - mean) * scale * LOAD(job->weight + t) + LOAD(job->shift + t);
            for (int64_t t = whole; t < dim; t++) x[t] = (x[t] - mean) * scale * job->weight[t] + job->shift[t];
        }
}

/* x . y, and x . x where `square` is given: lanes along the row, in one fixed order for every row. */
INLINE float NAME(dot)(const float *x, const float *y, int64_t dim, float *square) {
    V a[4] = {{0}, {0}, {0}, {0}}, b[4] = {{0}, {0}, {0}, {0}};
    int64_t t = 0;
    for (; t + 4 * W <= dim; t += 4 * W)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            V now = LOAD(x + t + i * W);
            a[i] += now * LOAD(y + t + i * W);
            if (square) b[i] += now * now;
        }
    for (; t + W <= dim; t += W) {
        V now = LOAD(x + t);
        a[0] += now * LOAD(y + t);
        if (square) b[0] += now * now;
    }
    float rest = 0, own = 0;
    for (; t < dim; t++) rest += x[t] * y[t], own += x[t] * x[t];
    if (square) *square = NAME(sum)((b[0] + b[1]) + (b[2] + b[3])) + own;
    return NAME(sum)((a[0] + a[1]) + (a[2] + a[3])) + rest;
}

/* Rows start to end of the documents against `count` queries; few queries leave lanes empty, so their lanes run along the row. */
static TARGET void NAME(scan)(topk *job, int64_t start, int64_t end, int64_t origin, int64_t count, const float *queries, const float *panel, best *kept,
                              float *floors, float *s) {
    int64_t dim = job->dim, item = SIZE[job->type], vectors = (count + W - 1) / W, few = count <= FEW;
    float *wide = s + ROWS * 2 * W;
    for (int64_t row = start, R; row < end; row += R) {
        R = NAME(rows_of)(end - row);
        const char *raw = (const char *)job->d + row * dim * item;
        float factor[ROWS], norm[ROWS], first[ROWS];
        if (few)
            for (int64_t byte = 0; byte < R * dim * item; byte += 64) __builtin_prefetch(raw + byte + 8192);
        const float *rows = NAME(widen)(raw, job->type, R * dim, wide);
        for (int64_t r = 0; r < R; r++) {
            factor[r] = job->scales ? job->scales[row + r] : 1.0f;
            norm[r] = 1.0f;
            if (!job->cosine) continue;
            first[r] = NAME(dot)(rows + r * dim, few ? queries : rows + r * dim, dim, norm + r);
            norm[r] = sqrtf(norm[r]) * fabsf(factor[r]);
            if (norm[r] < 1e-12f) norm[r] = 1e-12f;
        }
        if (few) {
            for (int64_t b = 0; b < count; b++)
                for (int64_t r = 0; r < R; r++) {
                    float x = b || !job->cosine ? NAME(dot)(rows + r * dim, queries + b * dim, dim, NULL) : first[r];
                    x = x * factor[r] / norm[r];
                    if (!(x <= floors[b])) floors[b] = offer(&kept[b], job->memory, x, floors[b], row + r - origin);
                }
            continue;
        }
        for (int64_t v = 0; v < vectors; v += 2) {
            int C = v + 2 <= vectors ? 2 : 1;
            NAME(tile)(rows, dim, panel + v * W * dim, raw + R * dim * item, v ? 0 : R * item, s, (int)R, C);
            for (int64_t r = 0; r < R; r++) {
                for (int c = 0; c < C; c++) {
                    V *x = (V *)(s + (r * C + c) * W);
                    if (job->scales) *x *= factor[r];
                    if (job->cosine) *x /= norm[r];
                    int64_t base = (v + c) * W;
                    union { BYTES lanes; uint64_t words[(W + 7) / 8]; } above = {.words = {0}};
                    above.lanes = __builtin_convertvector(~(*x <= LOAD(floors + base)), BYTES) & 1;
                    for (int word = 0; word < (W + 7) / 8; word++)
                        for (uint64_t left = above.words[word]; left; left &= left - 1) {
                            int64_t lane = word * 8 + __builtin_ctzll(left) / 8, b = base + lane;
                            if (b < count) floors[b] = offer(&kept[b], job->memory, ((float *)x)[lane], floors[b], row + r - origin);
                        }
                }
            }
        }
    }
}

static TARGET void NAME(topk_worker)(void *argument) {
    topk *job = argument;
    int64_t dim = job->dim, lanes = (job->count + 2 * W - 1) / W * W;
    best *kept = job->kept + __atomic_fetch_add(&job->workers, 1, __ATOMIC_RELAXED) * job->count;
    float *panel = scratch(&job->failed, lanes * (dim + 1) + ROWS * (2 * W + dim)), *floors = panel + lanes * dim, *s = floors + lanes;
    if (!panel || !hold(kept, job, job->count, &job->failed)) return free(panel);
    if (job->count > FEW) NAME(pack)(job->q, job->count, dim, panel);
    for (int64_t i = 0; i < lanes; i++) floors[i] = i < job->count ? NAN : INFINITY; /* NAN: nothing is below it yet */
    for (int64_t row; (row = __atomic_fetch_add(&job->next, BLOCK, __ATOMIC_RELAXED)) < job->end;)
        NAME(scan)(job, row, row + BLOCK < job->end ? row + BLOCK : job->end, job->start, job->count, job->q, panel, kept, floors, s);
    free(panel);
}

/* One query and its own segment a task. */
static TARGET void NAME(segment_worker)(void *argument) {
    topk *job = argument;
    best kept;
    float *s = scratch(&job->failed, ROWS * (2 * W + job->dim)), floor;
    if (!s || !hold(&kept, job, 1, &job->failed)) return free(s);
    for (int64_t b; (b = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->count;) {
        int64_t start = job->segments[b], end = job->segments[b + 1];
        kept.size = 0, floor = NAN;
        if (end - start >= LARGE) continue; /* all threads share these */
        NAME(scan)(job, start, end, start, 1, job->q + b * job->dim, NULL, &kept, &floor, s);
        if (!write_best(&kept, 1, 1, job->k, job->values + b * job->k, job->indices + b * job->k)) __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
    }
    free(kept.keys);
    free(s);
}

#undef V
#undef I
#undef BYTES
#undef LOAD
#undef SELECT
#undef INLINE
#undef NAME
#undef TARGET
#undef ROWS
#undef W
