/* A small vhost-user-blk front end: the other side of the socket without a virtual machine.
 *
 * It negotiates in QEMU's order, shares one memfd as guest memory and drives split rings as the Linux driver does
 * (indirect descriptors, EVENT_IDX). `--mode sleep` blocks on the call eventfd when nothing is finished; `--mode poll`
 * spins on the used ring and keeps interrupts off. One thread serves all queues; they share one call eventfd.
 * Wire formats: vhost-user specification "Message Specification"; virtio 1.2 sections 2.7 and 5.2.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "common.h"

/* ---- vhost-user ---- */

enum {
    GET_FEATURES = 1, SET_FEATURES = 2, SET_OWNER = 3, SET_MEM_TABLE = 5, SET_VRING_NUM = 8, SET_VRING_ADDR = 9,
    SET_VRING_BASE = 10, GET_VRING_BASE = 11, SET_VRING_KICK = 12, SET_VRING_CALL = 13, GET_PROTOCOL_FEATURES = 15,
    SET_PROTOCOL_FEATURES = 16, GET_QUEUE_NUM = 17, SET_VRING_ENABLE = 18, GET_CONFIG = 24, GET_INFLIGHT_FD = 31,
    SET_INFLIGHT_FD = 32, GET_MAX_MEM_SLOTS = 36, ADD_MEM_REG = 37, SET_STATUS = 39, GET_STATUS = 40,
};
enum { PROTOCOL_MQ = 0, PROTOCOL_REPLY_ACK = 3, PROTOCOL_CONFIG = 9, PROTOCOL_INFLIGHT = 12, PROTOCOL_MEM_SLOTS = 15,
       PROTOCOL_STATUS = 16 };
enum { F_SEG_MAX = 2, F_BLK_SIZE = 6, F_FLUSH = 9, F_TOPOLOGY = 10, F_CONFIG_WCE = 11, F_MQ = 12, F_DISCARD = 13,
       F_WRITE_ZEROES = 14, F_INDIRECT = 28, F_EVENT_IDX = 29, F_PROTOCOL = 30, F_VERSION_1 = 32 };
enum { FLAG_VERSION = 1, FLAG_REPLY = 4, FLAG_NEED_REPLY = 8, CONFIG_BYTES = 57, PAYLOAD_MAX = 512, FDS_MAX = 8 };

#define BIT(n) (1ull << (n))

struct message {
    uint32_t request, flags, size;
    char payload[PAYLOAD_MAX];
} __attribute__((packed));

struct vring_state { uint32_t index, num; };
struct vring_addr { uint32_t index, flags; uint64_t desc, used, avail, log; };
struct mem_table { uint32_t nregions, padding; uint64_t gpa, size, user, offset; };
struct mem_region { uint64_t padding, gpa, size, user, offset; };
struct inflight { uint64_t size, offset; uint16_t queues, queue_size; uint32_t padding; };
struct config { uint32_t offset, size, flags; unsigned char data[CONFIG_BYTES]; } __attribute__((packed));

/* ---- virtio ---- */

enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4 };
enum { QUEUE_SIZE = 128, BLK_IN = 0, BLK_OUT = 1, STATUS_NONE = 0xff };

struct descriptor { uint64_t addr; uint32_t len; uint16_t flags, next; };
struct avail_ring { uint16_t flags, idx, ring[QUEUE_SIZE], used_event; };
struct used_element { uint32_t id, len; };
struct used_ring { uint16_t flags, idx; struct used_element ring[QUEUE_SIZE]; uint16_t avail_event; };
struct blk_header { uint32_t type, reserved; uint64_t sector; };

/* Non-blocking, as the eventfds of QEMU, libblkio and SPDK are: signalling one can then never hold the server up. */
#define EVENT_FLAGS (EFD_CLOEXEC | EFD_NONBLOCK)

/* One request's own guest memory, apart from its data. */
struct slot_memory { struct descriptor table[3]; struct blk_header header; volatile uint8_t status; uint8_t pad[63]; };

struct queue {
    struct descriptor *desc;
    struct avail_ring *avail;
    struct used_ring *used;
    struct slot_memory *slots;
    struct request *requests;
    char *data;
    int kick_fd;
    uint16_t next_avail, published, last_used;
};

struct client {
    int socket, call_fd, memory_fd, inflight_fd;
    struct inflight inflight;
    uint64_t features, protocol, capacity_bytes, memory_bytes, kicks, wakeups;
    char *memory;
    uint32_t block_bytes, depth, queues, in_flight;
    bool polling, indirect;
    struct queue *queue;
};

/* ---- messages ---- */

static void send_message(struct client *c, uint32_t request, uint32_t flags, const void *payload, uint32_t size, int fd)
{
    struct message m = { .request = request, .flags = FLAG_VERSION | flags, .size = size };
    memcpy(m.payload, payload, size);
    if (!send_with_fd(c->socket, &m, 12 + size, fd)) die("sending request %u: %s", request, strerror(errno));
}

/* Receives the answer to `request`; returns the file descriptor that came with it, or -1. */
static int receive_reply(struct client *c, uint32_t request, void *payload, uint32_t size)
{
    struct message m;
    char control[CMSG_SPACE(FDS_MAX * sizeof(int))];
    struct iovec iov = { &m, 12 };
    struct msghdr header = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
    int fd = -1;
    if (recvmsg(c->socket, &header, MSG_WAITALL | MSG_CMSG_CLOEXEC) != 12) die("request %u: no reply", request);
    struct cmsghdr *cmsg = CMSG_FIRSTHDR(&header);
    if (cmsg && cmsg->cmsg_type == SCM_RIGHTS) memcpy(&fd, CMSG_DATA(cmsg), sizeof fd);
    if (m.request != request || m.flags != (FLAG_VERSION | FLAG_REPLY) || m.size != size)
        die("request %u: reply %u flags %#x size %u, expected size %u", request, m.request, m.flags, m.size, size);
    if (recv(c->socket, payload, size, MSG_WAITALL) != (ssize_t)size) die("request %u: short reply", request);
    return fd;
}

static uint64_t get_u64(struct client *c, uint32_t request)
{
    uint64_t value;
    send_message(c, request, 0, "", 0, -1);
    receive_reply(c, request, &value, sizeof value);
    return value;
}

/* Sends a request that has no answer of its own, and waits for its acknowledgement where that was negotiated. */
static void set(struct client *c, uint32_t request, const void *payload, uint32_t size, int fd)
{
    bool ack = c->protocol & BIT(PROTOCOL_REPLY_ACK);
    uint64_t status = 0;
    send_message(c, request, ack ? FLAG_NEED_REPLY : 0, payload, size, fd);
    if (ack) receive_reply(c, request, &status, sizeof status);
    if (status) die("request %u was refused (%llu)", request, (unsigned long long)status);
}

static void set_u64(struct client *c, uint32_t request, uint64_t value)
{
    set(c, request, &value, sizeof value, -1);
}

static void set_vring(struct client *c, uint32_t request, uint32_t index, uint32_t num)
{
    struct vring_state state = { index, num };
    set(c, request, &state, sizeof state, -1);
}

static void set_vring_fd(struct client *c, uint32_t request, uint64_t index, int fd)
{
    set(c, request, &index, sizeof index, fd);
}

/* ---- session, in QEMU's order ---- */

static void connect_to(struct client *c, const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    if (strlen(path) >= sizeof address.sun_path) die("socket path too long: %s", path);
    strcpy(address.sun_path, path);
    c->socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c->socket < 0 || connect(c->socket, (struct sockaddr *)&address, sizeof address)) die("%s: %s", path, strerror(errno));
}

static void read_config(struct client *c)
{
    struct config config = { .size = CONFIG_BYTES };
    uint64_t sectors;
    send_message(c, GET_CONFIG, 0, &config, sizeof config, -1);
    receive_reply(c, GET_CONFIG, &config, sizeof config);
    memcpy(&sectors, config.data, sizeof sectors);
    c->capacity_bytes = sectors * 512;
}

static void negotiate(struct client *c)
{
    static const uint64_t protocol = BIT(PROTOCOL_MQ) | BIT(PROTOCOL_REPLY_ACK) | BIT(PROTOCOL_CONFIG) |
        BIT(PROTOCOL_INFLIGHT) | BIT(PROTOCOL_MEM_SLOTS) | BIT(PROTOCOL_STATUS);
    static const uint64_t features = BIT(F_SEG_MAX) | BIT(F_BLK_SIZE) | BIT(F_FLUSH) | BIT(F_TOPOLOGY) | BIT(F_CONFIG_WCE) |
        BIT(F_MQ) | BIT(F_DISCARD) | BIT(F_WRITE_ZEROES) | BIT(F_INDIRECT) | BIT(F_EVENT_IDX) | BIT(F_PROTOCOL) | BIT(F_VERSION_1);
    c->features = get_u64(c, GET_FEATURES) & features;
    if (!(c->features & BIT(F_PROTOCOL)) || !(c->features & BIT(F_VERSION_1))) die("features %#llx will not do", (unsigned long long)c->features);
    uint64_t common = get_u64(c, GET_PROTOCOL_FEATURES) & protocol;
    set_u64(c, SET_PROTOCOL_FEATURES, common);
    c->protocol = common;
    if (common & BIT(PROTOCOL_MQ) && get_u64(c, GET_QUEUE_NUM) < c->queues) die("fewer than %u queues offered", c->queues);
    if (common & BIT(PROTOCOL_MEM_SLOTS)) get_u64(c, GET_MAX_MEM_SLOTS);
    set(c, SET_OWNER, "", 0, -1);
    get_u64(c, GET_FEATURES);
    for (uint32_t i = 0; i < c->queues; i++) set_vring_fd(c, SET_VRING_CALL, i, c->call_fd);
    read_config(c);
    if (!c->indirect) c->features &= ~BIT(F_INDIRECT);
    c->indirect = c->features & BIT(F_INDIRECT);
}

static void share_memory(struct client *c)
{
    uint64_t user = (uint64_t)(uintptr_t)c->memory;
    struct mem_table table = { 1, 0, 0, c->memory_bytes, user, 0 };
    struct mem_region region = { 0, 0, c->memory_bytes, user, 0 };
    if (c->protocol & BIT(PROTOCOL_MEM_SLOTS)) set(c, ADD_MEM_REG, &region, sizeof region, c->memory_fd);
    else set(c, SET_MEM_TABLE, &table, sizeof table, c->memory_fd);
}

static void share_inflight(struct client *c)
{
    if (!(c->protocol & BIT(PROTOCOL_INFLIGHT))) return;
    struct inflight wanted = { .queues = (uint16_t)c->queues, .queue_size = QUEUE_SIZE };
    send_message(c, GET_INFLIGHT_FD, 0, &wanted, sizeof wanted, -1);
    c->inflight_fd = receive_reply(c, GET_INFLIGHT_FD, &c->inflight, sizeof c->inflight);
    set(c, SET_INFLIGHT_FD, &c->inflight, sizeof c->inflight, c->inflight_fd);
}

static void start_queue(struct client *c, uint32_t index)
{
    struct queue *q = &c->queue[index];
    struct vring_addr addr = { index, 0, (uintptr_t)q->desc, (uintptr_t)q->used, (uintptr_t)q->avail, 0 };
    set_vring(c, SET_VRING_NUM, index, QUEUE_SIZE);
    set_vring(c, SET_VRING_BASE, index, 0);
    set(c, SET_VRING_ADDR, &addr, sizeof addr, -1);
    set_vring_fd(c, SET_VRING_KICK, index, q->kick_fd);
}

static void set_status(struct client *c, uint64_t status)
{
    if (!(c->protocol & BIT(PROTOCOL_STATUS))) return;
    get_u64(c, GET_STATUS);
    set_u64(c, SET_STATUS, status);
}

static void start(struct client *c)
{
    set_u64(c, SET_FEATURES, c->features);
    set_status(c, 0x8);
    share_inflight(c);
    for (uint32_t i = 0; i < c->queues; i++) set_vring_fd(c, SET_VRING_CALL, i, c->call_fd);
    set_u64(c, SET_FEATURES, c->features);
    share_memory(c);
    for (uint32_t i = 0; i < c->queues; i++) start_queue(c, i);
    for (uint32_t i = 0; i < c->queues; i++) set_vring(c, SET_VRING_ENABLE, i, 1);
    set_status(c, 0xf);
}

static void stop(struct client *c)
{
    struct vring_state state;
    for (uint32_t i = 0; i < c->queues; i++) set_vring(c, SET_VRING_ENABLE, i, 0);
    for (uint32_t i = 0; i < c->queues; i++) {
        state = (struct vring_state){ i, 0 };
        send_message(c, GET_VRING_BASE, 0, &state, sizeof state, -1);
        receive_reply(c, GET_VRING_BASE, &state, sizeof state);
    }
    close(c->socket);
}

/* ---- guest memory: guest-physical address = offset in the memfd ---- */

static uint64_t gpa(const struct client *c, const volatile void *p)
{
    return (uint64_t)((const volatile char *)p - c->memory);
}

static size_t page_up(size_t bytes)
{
    return (bytes + 4095) & ~(size_t)4095;
}

/* The three parts of a request; only header contents, direction of the data and status change from one use to the next. */
static void lay_out_slot(struct client *c, struct queue *q, uint32_t slot)
{
    struct slot_memory *s = &q->slots[slot];
    struct descriptor *d = c->indirect ? s->table : &q->desc[3 * slot];
    uint16_t base = c->indirect ? 0 : (uint16_t)(3 * slot);
    char *data = q->data + (size_t)slot * c->block_bytes;
    d[0] = (struct descriptor){ gpa(c, &s->header), sizeof s->header, DESC_NEXT, (uint16_t)(base + 1) };
    d[1] = (struct descriptor){ gpa(c, data), c->block_bytes, DESC_NEXT, (uint16_t)(base + 2) };
    d[2] = (struct descriptor){ gpa(c, &s->status), 1, DESC_WRITE, 0 };
    if (c->indirect) q->desc[slot] = (struct descriptor){ gpa(c, s->table), sizeof s->table, DESC_INDIRECT, 0 };
    memset(data, STAMP_FILLER, c->block_bytes);
}

static char *lay_out_queue(struct client *c, struct queue *q, char *at)
{
    q->desc = (void *)at, at += page_up(sizeof *q->desc * QUEUE_SIZE);
    q->avail = (void *)at, at += page_up(sizeof *q->avail);
    q->used = (void *)at, at += page_up(sizeof *q->used);
    q->slots = (void *)at, at += page_up(sizeof *q->slots * c->depth);
    q->data = at, at += page_up((size_t)c->block_bytes * c->depth);
    q->requests = calloc(c->depth, sizeof *q->requests);
    q->kick_fd = eventfd(0, EVENT_FLAGS);
    for (uint32_t slot = 0; slot < c->depth; slot++) lay_out_slot(c, q, slot);
    return at;
}

static void allocate_memory(struct client *c)
{
    size_t queue_bytes = page_up(sizeof(struct descriptor) * QUEUE_SIZE) + page_up(sizeof(struct avail_ring)) +
        page_up(sizeof(struct used_ring)) + page_up(sizeof(struct slot_memory) * c->depth) + page_up((size_t)c->block_bytes * c->depth);
    c->memory_bytes = queue_bytes * c->queues;
    c->memory_fd = memfd_create("bench-guest-memory", MFD_CLOEXEC);
    if (c->memory_fd < 0 || ftruncate(c->memory_fd, (off_t)c->memory_bytes)) die("guest memory: %s", strerror(errno));
    c->memory = mmap(NULL, c->memory_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, c->memory_fd, 0);
    c->queue = calloc(c->queues, sizeof *c->queue);
    if (c->memory == MAP_FAILED || !c->queue) die("guest memory: %s", strerror(errno));
    char *at = c->memory;
    for (uint32_t i = 0; i < c->queues; i++) at = lay_out_queue(c, &c->queue[i], at);
}

/* ---- the driver ---- */

static void submit(struct client *c, struct queue *q, struct run *r, uint32_t slot, uint64_t now)
{
    struct slot_memory *s = &q->slots[slot];
    struct request *request = &q->requests[slot];
    uint16_t head = (uint16_t)(c->indirect ? slot : 3 * slot);
    *request = run_next(r, now);
    run_prepare_data(r, request, q->data + (size_t)slot * c->block_bytes);
    s->header = (struct blk_header){ request->write ? BLK_OUT : BLK_IN, 0, request->offset / 512 };
    s->status = STATUS_NONE;
    (c->indirect ? s->table : &q->desc[head])[1].flags = DESC_NEXT | (request->write ? 0 : DESC_WRITE);
    q->avail->ring[q->next_avail++ % QUEUE_SIZE] = head;
    c->in_flight++;
}

/* Makes what was submitted visible and kicks if the device asked for it (virtio 1.2 section 2.7.13.4.1). */
static void publish(struct client *c, struct queue *q)
{
    uint16_t old = q->published;
    if (old == q->next_avail) return;
    __atomic_store_n(&q->avail->idx, q->next_avail, __ATOMIC_RELEASE);
    q->published = q->next_avail;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    uint16_t event = __atomic_load_n(&q->used->avail_event, __ATOMIC_RELAXED);
    bool wanted = c->features & BIT(F_EVENT_IDX) ? (uint16_t)(q->next_avail - event - 1) < (uint16_t)(q->next_avail - old)
                                                 : !(q->used->flags & 1);
    if (!wanted) return;
    c->kicks++;
    if (eventfd_write(q->kick_fd, 1)) die("kick: %s", strerror(errno));
}

static void finish(struct client *c, struct queue *q, struct run *r, uint32_t slot, uint64_t now)
{
    if (slot >= c->depth) die("the device returned descriptor %u, never submitted", slot);
    if (q->slots[slot].status) die("request for byte %llu failed with status %u",
                                   (unsigned long long)q->requests[slot].offset, q->slots[slot].status);
    run_finish(r, &q->requests[slot], q->data + (size_t)slot * c->block_bytes, now);
    c->in_flight--;
}

/* Takes everything that is finished and refills; returns how many were finished. */
static uint32_t turn(struct client *c, struct queue *q, struct run *r)
{
    uint16_t done = __atomic_load_n(&q->used->idx, __ATOMIC_ACQUIRE);
    uint32_t count = (uint16_t)(done - q->last_used);
    if (!count) return 0;
    uint64_t now = now_ns();
    bool more = run_wants_more(r, now);
    while (q->last_used != done) {
        uint32_t id = q->used->ring[q->last_used++ % QUEUE_SIZE].id, slot = c->indirect ? id : id / 3;
        finish(c, q, r, slot, now);
        if (more && run_wants_more(r, now)) submit(c, q, r, slot, now);
    }
    /* A stale event index keeps interrupts off for the next 2^16 completions: what the Linux driver does too. */
    if (c->polling) q->avail->used_event = (uint16_t)(q->last_used - 1);
    publish(c, q);
    return count;
}

static uint32_t turn_all(struct client *c, struct run *r)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < c->queues; i++) count += turn(c, &c->queue[i], r);
    return count;
}

/* Asks for an interrupt at the next completion; true if one is there already. */
static bool arm(struct client *c)
{
    for (uint32_t i = 0; i < c->queues; i++) c->queue[i].avail->used_event = c->queue[i].last_used;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    for (uint32_t i = 0; i < c->queues; i++)
        if (__atomic_load_n(&c->queue[i].used->idx, __ATOMIC_ACQUIRE) != c->queue[i].last_used) return true;
    return false;
}

static void wait_for_work(struct client *c)
{
    /* Never a blocking read: the device may have set O_NONBLOCK, which lives in the description that both share. */
    struct pollfd call = { .fd = c->call_fd, .events = POLLIN };
    eventfd_t value;
    if (c->polling) {
        cpu_relax();
        return;
    }
    if (arm(c)) return;
    if (poll(&call, 1, -1) != 1 || eventfd_read(c->call_fd, &value)) die("call eventfd: %s", strerror(errno));
    c->wakeups++;
}

static void drive(struct run *r, void *opaque)
{
    struct client *c = opaque;
    uint64_t now = now_ns();
    for (uint32_t i = 0; i < c->queues; i++) {
        c->queue[i].avail->used_event = (uint16_t)(c->queue[i].last_used - 1);
        for (uint32_t slot = 0; slot < c->depth && run_wants_more(r, now); slot++) submit(c, &c->queue[i], r, slot, now);
        publish(c, &c->queue[i]);
    }
    while (c->in_flight)
        if (!turn_all(c, r)) wait_for_work(c);
}

/* ---- command line ---- */

static bool client_option(struct client *c, const char **path, const char *name, const char *value)
{
    if (!strcmp(name, "--socket")) *path = value;
    else if (!strcmp(name, "--queues")) c->queues = (uint32_t)parse_bytes(value);
    else if (!strcmp(name, "--mode")) c->polling = !strcmp(value, "poll");
    else if (!strcmp(name, "--indirect")) c->indirect = parse_bytes(value) != 0;
    else return false;
    return true;
}

int main(int argc, char **argv)
{
    struct workload w = { .block_bytes = 4096, .depth = 32, .seconds = 2, .seed = 1 };
    struct client c = { .queues = 1, .indirect = true };
    const char *path = NULL;
    static struct run r;
    for (int i = 1; i < argc; i += 2) {
        if (i + 1 == argc) die("%s needs a value", argv[i]);
        if (!workload_option(&w, argv[i], argv[i + 1]) && !client_option(&c, &path, argv[i], argv[i + 1])) die("unknown option %s", argv[i]);
    }
    if (!path || !w.depth || w.depth * 3 > QUEUE_SIZE || !c.queues || w.block_bytes % 512) die("bad options; needs --socket, depth 1..42");
    c.block_bytes = w.block_bytes, c.depth = w.depth;
    c.call_fd = eventfd(0, EVENT_FLAGS);
    connect_to(&c, path);
    negotiate(&c);
    allocate_memory(&c);
    start(&c);
    run_workload(&r, &w, c.capacity_bytes, drive, &c);
    stop(&c);
    run_print(&r);
    printf(", \"kicks\": %llu, \"wakeups\": %llu, \"device_bytes\": %llu}\n", (unsigned long long)c.kicks,
           (unsigned long long)c.wakeups, (unsigned long long)c.capacity_bytes);
    return 0;
}
