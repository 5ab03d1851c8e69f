/* What the machine can copy: the access pattern of a sequential 128 KiB read at depth 8, without anything around it.
 *
 * The source is walked from end to end and is far larger than any cache; the target is as many blocks as there are
 * requests in flight, used in turn. Prints the same JSON object as the clients.
 */
#include "common.h"

static void copy(struct run *r, void *opaque)
{
    char *const *buffers = opaque;
    uint32_t bytes = r->workload->block_bytes;
    for (uint64_t now = now_ns(); run_wants_more(r, now); now = now_ns()) {
        struct request q = run_next(r, now);
        memcpy(buffers[1] + r->finished % r->workload->depth * bytes, buffers[0] + q.offset, bytes);
        run_finish(r, &q, NULL, now_ns());
    }
}

int main(int argc, char **argv)
{
    struct workload w = { .pattern = SEQUENTIAL, .block_bytes = 128 << 10, .depth = 8, .seconds = 2, .span_bytes = 1ull << 30 };
    static struct run r;
    for (int i = 1; i + 1 < argc; i += 2)
        if (!workload_option(&w, argv[i], argv[i + 1])) die("unknown option %s", argv[i]);
    char *buffers[2] = { malloc(w.span_bytes), malloc((size_t)w.depth * w.block_bytes) };
    if (!buffers[0] || !buffers[1]) die("no memory");
    memset(buffers[0], 1, w.span_bytes);
    memset(buffers[1], 2, (size_t)w.depth * w.block_bytes);
    run_workload(&r, &w, w.span_bytes, copy, buffers);
    run_print(&r);
    printf("}\n");
    return 0;
}
