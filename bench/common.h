/* What both bench clients share: clock, random numbers, latency histogram, block stamps, JSON line, failure.
 *
 * A stamp makes data recognisable: each 512-byte sector begins with a word made from its own number, so that a read that
 * returns another block, or nothing, is noticed. The second word is a generation, checked only where one client knows
 * every write (verify runs). Times are nanoseconds of CLOCK_MONOTONIC. Knows no transport.
 */
#ifndef OCSSD_BENCH_COMMON_H
#define OCSSD_BENCH_COMMON_H

#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { SECTOR_BYTES = 512, STAMP_FILLER = 0xa5 };

static inline __attribute__((noreturn, format(printf, 1, 2))) void die(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs("bench client: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

/* Sends one message, with the descriptor `fd` unless it is negative; false when it was not taken whole. */
static inline bool send_with_fd(int socket, const void *message, size_t bytes, int fd)
{
    char control[CMSG_SPACE(sizeof(int))] = { 0 };
    struct iovec iov = { (void *)message, bytes };
    struct msghdr header = { .msg_iov = &iov, .msg_iovlen = 1 };
    if (fd >= 0) {
        header.msg_control = control, header.msg_controllen = sizeof control;
        struct cmsghdr *cmsg = CMSG_FIRSTHDR(&header);
        cmsg->cmsg_level = SOL_SOCKET, cmsg->cmsg_type = SCM_RIGHTS, cmsg->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(cmsg), &fd, sizeof fd);
    }
    return sendmsg(socket, &header, MSG_NOSIGNAL) == (ssize_t)bytes;
}

static inline uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline void cpu_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory");
#endif
}

static inline double cpu_seconds(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

/* xorshift64*: a few cycles, good enough to spread addresses. */
static inline uint64_t random_u64(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545f4914f6cdd1dull;
}

static inline uint64_t random_below(uint64_t *state, uint64_t bound)
{
    return (uint64_t)(((unsigned __int128)random_u64(state) * bound) >> 64);
}

/* ---- latency histogram: 64 linear steps in each power of two, so a percentile is right within 2 % ---- */

enum { HIST_BITS = 6, HIST_STEPS = 1 << HIST_BITS, HIST_BUCKETS = 64 * HIST_STEPS };

struct histogram { uint64_t count, sum_ns, max_ns, bucket[HIST_BUCKETS]; };

static inline unsigned histogram_index(uint64_t ns)
{
    if (ns < HIST_STEPS) return (unsigned)ns;
    unsigned high = 63u - (unsigned)__builtin_clzll(ns);
    return (high - HIST_BITS + 1) * HIST_STEPS + (unsigned)((ns >> (high - HIST_BITS)) & (HIST_STEPS - 1));
}

static inline uint64_t histogram_value(unsigned index)
{
    if (index < HIST_STEPS) return index;
    unsigned high = index / HIST_STEPS + HIST_BITS - 1;
    return ((uint64_t)HIST_STEPS + index % HIST_STEPS) << (high - HIST_BITS);
}

static inline void histogram_add(struct histogram *h, uint64_t ns)
{
    h->count++;
    h->sum_ns += ns;
    if (ns > h->max_ns) h->max_ns = ns;
    h->bucket[histogram_index(ns)]++;
}

static inline uint64_t histogram_quantile(const struct histogram *h, double q)
{
    uint64_t wanted = (uint64_t)((double)h->count * q), seen = 0;
    for (unsigned i = 0; i < HIST_BUCKETS; i++) {
        seen += h->bucket[i];
        if (seen > wanted) return histogram_value(i);
    }
    return h->max_ns;
}

/* ---- stamps ---- */

static inline uint64_t stamp_of(uint64_t sector)
{
    return (sector + 1) * 0x9e3779b97f4a7c15ull;
}

static inline void stamp_write(char *data, uint64_t offset_bytes, uint64_t length_bytes, uint64_t generation)
{
    for (uint64_t at = 0; at < length_bytes; at += SECTOR_BYTES) {
        uint64_t word[2] = { stamp_of((offset_bytes + at) / SECTOR_BYTES), generation };
        memcpy(data + at, word, sizeof word);
    }
}

/* Dies unless all of `data` is what stamp_write() left; generation UINT64_MAX accepts any. */
static inline void stamp_check(const char *data, uint64_t offset_bytes, uint64_t length_bytes, uint64_t generation)
{
    static char filler[SECTOR_BYTES];
    if (!filler[0]) memset(filler, STAMP_FILLER, sizeof filler);
    for (uint64_t at = 0; at < length_bytes; at += SECTOR_BYTES) {
        uint64_t word[2], sector = (offset_bytes + at) / SECTOR_BYTES;
        memcpy(word, data + at, sizeof word);
        if (word[0] != stamp_of(sector))
            die("sector %llu: stamp %#llx, expected %#llx", (unsigned long long)sector,
                (unsigned long long)word[0], (unsigned long long)stamp_of(sector));
        if (generation != UINT64_MAX && word[1] != generation)
            die("sector %llu: generation %llu, expected %llu", (unsigned long long)sector,
                (unsigned long long)word[1], (unsigned long long)generation);
        if (memcmp(data + at + sizeof word, filler, SECTOR_BYTES - sizeof word))
            die("sector %llu: bytes after the stamp differ", (unsigned long long)sector);
    }
}

/* ---- workload: what to ask for, and what came of it; the same for every client ---- */

enum pattern { RANDOM, SEQUENTIAL };
enum operation { OP_READ, OP_WRITE, OP_MIXED };

struct workload {
    enum operation operation;
    enum pattern pattern;
    uint32_t block_bytes, depth;
    uint32_t check_every;   /* compare the data of one read in so many; 0: never */
    uint64_t span_bytes;    /* use only the first part of the device; 0: all of it */
    uint64_t limit;         /* requests to do; 0: go on for `seconds` */
    uint64_t seed;
    double seconds;
    bool verify;            /* generations are kept and every read is compared */
};

struct request { uint64_t offset, generation, begin_ns; bool write; };

struct run {
    const struct workload *workload;
    uint64_t started, finished, blocks, cursor, random, deadline_ns, begin_ns, end_ns;
    double cpu_seconds;
    uint32_t *generation;   /* verify: of each block; NULL otherwise */
    bool *busy;             /* verify: a request for the block is in flight */
    struct histogram latency;
};

/* The part of the device in use: whole MiB, so that every block size covers the same bytes. */
static inline uint64_t run_span_bytes(const struct workload *w, uint64_t device_bytes)
{
    uint64_t span = w->span_bytes && w->span_bytes < device_bytes ? w->span_bytes : device_bytes;
    return span & ~(uint64_t)((1 << 20) - 1);
}

static inline void run_begin(struct run *r, const struct workload *w, uint64_t device_bytes)
{
    r->workload = w;
    r->started = r->finished = r->cursor = 0;
    r->blocks = run_span_bytes(w, device_bytes) / w->block_bytes;
    if (r->blocks < w->depth) die("the device has %llu bytes, too few", (unsigned long long)device_bytes);
    memset(&r->latency, 0, sizeof r->latency);
    r->random = (w->seed + 1) * 0x9e3779b97f4a7c15ull | 1;
    r->cpu_seconds = cpu_seconds();
    r->begin_ns = now_ns();
    r->deadline_ns = w->limit ? UINT64_MAX : r->begin_ns + (uint64_t)(w->seconds * 1e9);
    if (w->verify && !r->busy) {
        r->generation = calloc(r->blocks, sizeof *r->generation);
        r->busy = calloc(r->blocks, sizeof *r->busy);
        if (!r->generation || !r->busy) die("no memory for %llu blocks", (unsigned long long)r->blocks);
    }
    /* A server that stops answering must not hang the bench. */
    alarm(w->limit ? 900 : (unsigned)w->seconds + 20);
}

static inline bool run_wants_more(const struct run *r, uint64_t now)
{
    return now < r->deadline_ns && (!r->workload->limit || r->started < r->workload->limit);
}

static inline uint64_t run_pick_block(struct run *r)
{
    if (r->workload->pattern == RANDOM) return random_below(&r->random, r->blocks);
    uint64_t block = r->cursor++;
    if (r->cursor == r->blocks) r->cursor = 0;
    return block;
}

static inline bool run_pick_write(struct run *r)
{
    if (r->workload->operation != OP_MIXED) return r->workload->operation == OP_WRITE;
    return random_u64(&r->random) >> 63;
}

/* The next request; a verify run has at most one in flight for each block, so that the outcome is defined. */
static inline struct request run_next(struct run *r, uint64_t now)
{
    struct request q = { .begin_ns = now, .write = run_pick_write(r) };
    uint64_t block = run_pick_block(r);
    if (r->busy) {
        while (r->busy[block]) block = run_pick_block(r);
        r->busy[block] = true;
        q.generation = r->generation[block] += q.write;
    }
    q.offset = block * r->workload->block_bytes;
    r->started++;
    return q;
}

static inline void run_prepare_data(const struct run *r, const struct request *q, char *data)
{
    if (q->write) stamp_write(data, q->offset, r->workload->block_bytes, q->generation);
}

/* Accounts for a finished request; `data` is what a read returned. */
static inline void run_finish(struct run *r, const struct request *q, const char *data, uint64_t now)
{
    uint32_t every = r->workload->check_every;
    histogram_add(&r->latency, now - q->begin_ns);
    if (r->busy) {
        r->busy[q->offset / r->workload->block_bytes] = false;
        if (!q->write) stamp_check(data, q->offset, r->workload->block_bytes, q->generation);
    } else if (every && !q->write && r->finished % every == 0) {
        stamp_check(data, q->offset, r->workload->block_bytes, UINT64_MAX);
    }
    r->finished++;
}

static inline void run_end(struct run *r)
{
    r->end_ns = now_ns();
    r->cpu_seconds = cpu_seconds() - r->cpu_seconds;
    alarm(0);
}

/* Calls `work` once, or for a verify workload three times: write every block, mixed at random, read every block. */
static inline void run_workload(struct run *r, const struct workload *w, uint64_t device_bytes,
                                void (*work)(struct run *r, void *client), void *client)
{
    struct workload pass[3] = { *w, *w, *w };
    if (w->verify) {
        pass[0].operation = OP_WRITE, pass[1].operation = OP_MIXED, pass[2].operation = OP_READ;
        pass[0].pattern = pass[2].pattern = SEQUENTIAL;
        pass[0].limit = pass[2].limit = run_span_bytes(w, device_bytes) / w->block_bytes;
    }
    for (int i = 0; i < (w->verify ? 3 : 1); i++) {
        run_begin(r, &pass[i], device_bytes);
        work(r, client);
        run_end(r);
    }
    r->workload = w;
}

/* Prints the opening of the result object; the client adds its own members and closes it. */
static inline void run_print(const struct run *r)
{
    double seconds = (double)(r->end_ns - r->begin_ns) / 1e9;
    double bytes = (double)r->finished * r->workload->block_bytes;
    printf("{\"requests\": %llu, \"seconds\": %.6f, \"iops\": %.1f, \"mb_per_s\": %.2f, "
           "\"mean_ns\": %.0f, \"p50_ns\": %llu, \"p99_ns\": %llu, \"max_ns\": %llu, \"client_cpu_s\": %.4f",
           (unsigned long long)r->finished, seconds, (double)r->finished / seconds, bytes / seconds / 1e6,
           r->latency.count ? (double)r->latency.sum_ns / (double)r->latency.count : 0.0,
           (unsigned long long)histogram_quantile(&r->latency, 0.50),
           (unsigned long long)histogram_quantile(&r->latency, 0.99),
           (unsigned long long)r->latency.max_ns, r->cpu_seconds);
}

/* ---- options: `--name value` pairs that every client understands ---- */

static inline uint64_t parse_bytes(const char *text)
{
    char *end;
    uint64_t value = strtoull(text, &end, 0);
    static const char units[] = "KMGT";
    const char *unit = *end ? strchr(units, *end) : NULL;
    if (*end && (!unit || end[1])) die("not a size: %s", text);
    return unit ? value << (10 * (unit - units + 1)) : value;
}

static inline enum operation parse_operation(const char *text)
{
    static const char *names[] = { [OP_READ] = "read", [OP_WRITE] = "write", [OP_MIXED] = "mixed" };
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcmp(text, names[i])) return (enum operation)i;
    die("unknown operation %s", text);
}

/* Returns false if `name` is not one of the common options. */
static inline bool workload_option(struct workload *w, const char *name, const char *value)
{
    if (!strcmp(name, "--op")) w->operation = parse_operation(value);
    else if (!strcmp(name, "--pattern")) w->pattern = strcmp(value, "sequential") ? RANDOM : SEQUENTIAL;
    else if (!strcmp(name, "--block-bytes")) w->block_bytes = (uint32_t)parse_bytes(value);
    else if (!strcmp(name, "--depth")) w->depth = (uint32_t)parse_bytes(value);
    else if (!strcmp(name, "--check-every")) w->check_every = (uint32_t)parse_bytes(value);
    else if (!strcmp(name, "--span-bytes")) w->span_bytes = parse_bytes(value);
    else if (!strcmp(name, "--requests")) w->limit = parse_bytes(value);
    else if (!strcmp(name, "--seed")) w->seed = parse_bytes(value);
    else if (!strcmp(name, "--seconds")) w->seconds = atof(value);
    else if (!strcmp(name, "--verify")) w->verify = parse_bytes(value) != 0;
    else return false;
    return true;
}

#endif
