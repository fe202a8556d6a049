/* Attention, top k and a transformer's passes over rows on the CPU. Plain C for GCC and clang, loaded with ctypes: needs neither Python's nor torch's headers.

   Queries are transposed so that vector lanes are query tokens; documents stay row-major and their elements are broadcast, so maximum and sums
   over a document's tokens need no reduction across lanes and the matrix of similarities is never written out. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { F32, F16, BF16, I8, F8 };
static const int64_t SIZE[] = {4, 2, 2, 1, 1};
enum {
    CHUNK = 4,      /* pairs a thread takes at a time */
    BLOCK = 256,    /* documents a thread takes at a time */
    FEW = 3,        /* queries up to which lanes along the row are faster */
    QUERIES = 128,  /* queries that share one pass over the documents, */
    KEYS = 1 << 23, /* or fewer, so that all that is kept for them stays below this */
    LARGE = 1 << 14, /* rows from which a segment is worth all threads */
    SOME = 16        /* rows that a thread takes at a time */
};
typedef void (*parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */

typedef struct {
    const float *q, *scales;
    const void *d;
    const int64_t *q_offsets, *d_offsets, *pairs, *out_at;
    int64_t count, dim, longest, next;
    float tau, shift, *out; /* weights are exp((s - shift) / tau) */
    int type, failed;
} attention;

/* Texts that attend to themselves, or single rows of theirs: head h of a row stands at columns h * dim. */
typedef struct {
    const float *q, *k, *v, *bias;
    const int64_t *q_offsets, *k_offsets;
    int64_t count, heads, dim, q_stride, k_stride, longest, next;
    float *out;
    int failed;
} packed;

/* Rows of a matrix that are changed where they stand. */
typedef struct {
    float *x;
    const float *bias, *residual, *weight, *shift;
    int64_t count, dim, next;
    float eps;
} rows_job;

/* The best results of one query so far, unordered. A key orders as (value, lower index first) does, NaN below -inf and -0 with 0; its low half is
   the index's complement, so one pass takes fewer than 2^32 documents. */
typedef struct {
    uint64_t *keys;
    int64_t size, room; /* room: how many are kept once `hold`'s memory is full */
} best;

typedef struct {
    const float *q, *scales;
    const void *d;
    const int64_t *segments;
    int64_t count, dim, k, room, memory, start, end, next, workers;
    best *kept;
    float *values;
    int64_t *indices;
    int type, cosine, failed;
} topk;

static inline float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static float *scratch(int *failed, int64_t floats) {
    void *memory = NULL;
    if (posix_memalign(&memory, 64, (size_t)floats * 4)) __atomic_store_n(failed, 1, __ATOMIC_RELAXED), memory = NULL;
    return memory;
}

static int hold(best *kept, const topk *job, int64_t count, int *failed) {
    uint64_t *keys = malloc((size_t)(count * job->memory + 1) * sizeof(uint64_t));
    if (!keys) return __atomic_store_n(failed, 1, __ATOMIC_RELAXED), 0;
    for (int64_t b = 0; b < count; b++) kept[b] = (best){keys + b * job->memory, 0, job->room};
    return 1;
}

static inline float value_of(uint64_t key) {
    int32_t rank = (int32_t)(uint32_t)(key >> 32 ^ 0x80000000u);
    return rank == INT32_MIN ? NAN : as_float((uint32_t)(rank ^ (rank >> 31 & 0x7fffffff)));
}

/* Brings the `keep` largest to the front, the least of them last. */
static void select_largest(uint64_t *x, int64_t size, int64_t keep) {
    for (int64_t low = 0, high = size - 1; low < high;) {
        uint64_t pivot = x[low + (high - low) / 2], swap;
        int64_t i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i <= j) swap = x[i], x[i++] = x[j], x[j--] = swap;
        }
        if (keep - 1 <= j) high = j;
        else if (keep - 1 >= i) low = i;
        else return;
    }
}

/* Takes x, and returns what the next value must exceed to be worth taking: NaN where that is anything. Indices come in ascending order. */
static inline float offer(best *kept, int64_t memory, float x, float floor, int64_t index) {
    int32_t bits = (int32_t)as_bits(x + 0.0f), rank = x != x ? INT32_MIN : bits ^ (bits >> 31 & 0x7fffffff);
    kept->keys[kept->size++] = (uint64_t)((uint32_t)rank ^ 0x80000000u) << 32 | (uint32_t)~index;
    if (kept->size < memory) return floor;
    select_largest(kept->keys, kept->size, kept->room);
    kept->size = kept->room;
    return value_of(kept->keys[kept->room - 1]);
}

static int descending(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x < y) - (x > y);
}

/* The k best of one query out of what every worker kept (`apart` entries from one to the next). */
static int write_best(best *kept, int64_t workers, int64_t apart, int64_t k, float *values, int64_t *indices) {
    int64_t total = 0, at = 0;
    for (int64_t w = 0; w < workers; w++) total += kept[w * apart].size;
    uint64_t *all = malloc((size_t)(total + 1) * sizeof(uint64_t));
    if (!all) return 0;
    for (int64_t w = 0; w < workers; at += kept[w++ * apart].size) memcpy(all + at, kept[w * apart].keys, (size_t)kept[w * apart].size * sizeof(uint64_t));
    int64_t found = total < k ? total : k;
    select_largest(all, total, found);
    qsort(all, (size_t)found, sizeof(uint64_t), descending);
    for (int64_t i = 0; i < k; i++) values[i] = i < found ? value_of(all[i]) : -INFINITY, indices[i] = i < found ? (int64_t)(uint32_t)~all[i] : -1;
    free(all);
    return 1;
}

static void merge_worker(void *argument) {
    topk *job = argument;
    for (int64_t b; (b = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->count;)
        if (!write_best(job->kept + b, job->workers, job->count, job->k, job->values + b * job->k, job->indices + b * job->k))
            __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
}

#define W 4
#ifdef __aarch64__
#define ROWS 6
#else
#define ROWS 4
#endif
#define TARGET
#define NAME(x) x##_baseline
#include "_native_simd.h"

#if defined(__x86_64__)
#define W 8
#define ROWS 6
#define TARGET __attribute__((target("avx2,fma")))
#define NAME(x) x##_avx2
#include "_native_simd.h"

#define W 16
#define ROWS 14
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")))
#define NAME(x) x##_avx512
#include "_native_simd.h"
#define LEVELS(x) {x##_baseline, x##_avx2, x##_avx512}
#else
#define LEVELS(x) {x##_baseline, x##_baseline, x##_baseline}
#endif

typedef void (*worker)(void *);
static const worker ATTENTION[] = LEVELS(attention_worker), TOPK[] = LEVELS(topk_worker), SEGMENT[] = LEVELS(segment_worker),
                    PACKED[] = LEVELS(packed_worker), GELU[] = LEVELS(gelu_worker), NORM[] = LEVELS(norm_worker);

static void run(parallel start, worker work, void *job, int64_t threads, int64_t tasks) {
    threads = threads < tasks ? threads : tasks;
    if (start && threads > 1) start(work, job, (unsigned)threads, 0);
    else work(job);
}

/* To be raised, with ABI in cpu.py, whenever a function here takes other arguments. */
int rerank_abi(void) {
    return 3;
}

/* The best level this processor has: 0 baseline, 1 AVX2 with FMA, 2 AVX-512. */
int rerank_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

static int rises(const int64_t *offsets, int64_t count, int64_t rows) {
    int64_t falls = offsets[0] != 0 || offsets[count] != rows;
    for (int64_t i = 0; i < count; i++) falls |= offsets[i + 1] < offsets[i];
    return !falls;
}

/* Where each pair's values begin (out_at, count + 1) and the longest query's length; -1 where offsets or pairs do not fit. */
int64_t rerank_layout(const int64_t *q_offsets, int64_t queries, int64_t q_rows, const int64_t *d_offsets, int64_t documents, int64_t d_rows,
                      const int64_t *pairs, int64_t count, int64_t *out_at) {
    int64_t longest = 0, at = 0;
    if (!rises(q_offsets, queries, q_rows) || !rises(d_offsets, documents, d_rows)) return -1;
    for (int64_t p = 0; p < count; p++) {
        int64_t query = pairs[2 * p], document = pairs[2 * p + 1];
        if (query < 0 || query >= queries || document < 0 || document >= documents) return -1;
        int64_t length = q_offsets[query + 1] - q_offsets[query];
        out_at[p] = at, at += length, longest = length > longest ? length : longest;
    }
    out_at[count] = at;
    return longest;
}

/* Both return 1 where memory ran out, else 0. */
int rerank_attention(int level, parallel start, int64_t threads, const float *q, const int64_t *q_offsets, int64_t longest, const void *d, int type,
                     const int64_t *d_offsets, int64_t dim, const float *scales, const int64_t *pairs, const int64_t *out_at, int64_t count,
                     float tau, float shift, float *out) {
    attention job = {q, scales, d, q_offsets, d_offsets, pairs, out_at, count, dim, longest, 0, tau, shift, out, type, 0};
    if (count) run(start, ATTENTION[level], &job, threads, (count + CHUNK - 1) / CHUNK);
    return job.failed;
}

/* 2 where offsets do not fit. */
int rerank_packed(int level, parallel start, int64_t threads, const float *q, const float *k, const float *v, const float *bias,
                  const int64_t *q_offsets, const int64_t *k_offsets, int64_t count, int64_t q_rows, int64_t k_rows, int64_t heads, int64_t dim,
                  int64_t q_stride, int64_t k_stride, float *out) {
    if (!rises(q_offsets, count, q_rows) || !rises(k_offsets, count, k_rows)) return 2;
    packed job = {q, k, v, bias, q_offsets, k_offsets, count, heads, dim, q_stride, k_stride, 0, 0, out, 0};
    for (int64_t i = 0; i < count; i++)
        if (k_offsets[i + 1] - k_offsets[i] > job.longest) job.longest = k_offsets[i + 1] - k_offsets[i];
    if (count) run(start, PACKED[level], &job, threads, count * heads);
    return job.failed;
}

/* Rows become gelu(x + bias), or, with weights, the layer norm of x + bias + residual. */
void rerank_rows(int level, parallel start, int64_t threads, float *x, const float *bias, const float *residual, const float *weight,
                 const float *shift, int64_t count, int64_t dim, float eps) {
    rows_job job = {x, bias, residual, weight, shift, count, dim, 0, eps};
    run(start, (weight ? NORM : GELU)[level], &job, threads, (count + SOME - 1) / SOME);
}

static void measure(topk *job, int64_t rows) {
    job->room = job->k < rows ? job->k : rows;
    job->memory = 2 * job->room + 32 < rows ? 2 * job->room + 32 : rows;
}

static int pass(int level, parallel start, int64_t threads, topk job) {
    job.next = job.start, job.workers = 0;
    measure(&job, job.end - job.start);
    job.kept = calloc((size_t)(threads * job.count), sizeof(best));
    if (!job.kept) return 1;
    run(start, TOPK[level], &job, threads, (job.end - job.start + BLOCK - 1) / BLOCK);
    job.next = 0;
    if (!job.failed) run(start, merge_worker, &job, threads, job.count);
    for (int64_t w = 0; w < job.workers; w++) free(job.kept[w * job.count].keys);
    free(job.kept);
    return job.failed;
}

int rerank_topk(int level, parallel start, int64_t threads, const float *q, int64_t count, const void *d, int type, int64_t documents, int64_t dim,
                const float *scales, const int64_t *segments, int64_t k, int cosine, float *values, int64_t *indices) {
    topk all = {.q = q, .scales = scales, .d = d, .segments = segments, .count = count, .dim = dim, .k = k, .values = values, .indices = indices,
                .type = type, .cosine = cosine};
    int64_t rows = segments ? 0 : documents, step = 1;
    if (segments) {
        for (int64_t b = 0; b < count; b++)
            if (segments[b + 1] - segments[b] < LARGE && segments[b + 1] - segments[b] > rows) rows = segments[b + 1] - segments[b];
        measure(&all, rows);
        if (count) run(start, SEGMENT[level], &all, threads, count);
    } else {
        measure(&all, rows);
        step = KEYS / (threads * (all.memory + 1));
        step = step < 1 ? 1 : step > QUERIES ? QUERIES : step;
    }
    for (int64_t b = 0; b < count && !all.failed; b += step) {
        topk job = all;
        if (segments && segments[b + 1] - segments[b] < LARGE) continue;
        job.q += b * dim, job.values += b * k, job.indices += b * k;
        job.count = count - b < step ? count - b : step;
        job.start = segments ? segments[b] : 0, job.end = segments ? segments[b + 1] : documents;
        all.failed = pass(level, start, threads, job);
    }
    return all.failed;
}
