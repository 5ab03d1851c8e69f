/* A small NVMe host over vfio-user: QEMU and its guest's driver in one process, without a virtual machine.
 *
 * It negotiates in QEMU's order, shares one memfd as guest memory, enables the controller, makes I/O queue pairs and drives
 * them. `--mode sleep` blocks on the MSI-X eventfds when nothing is finished; `--mode poll` spins on the completion queues
 * and keeps interrupts off. Doorbells are posted register writes (`--doorbells trapped`, one message each, as QEMU sends
 * them), shadow doorbells with event indices (`shadow`, as Linux uses them) or stores into the mapped page (`mapped`).
 * With `--vector 1` the namespace is an OCSSD 2.0 one: a block is a run of sectors in a chunk, read and written by vector
 * commands with an address list; writing resets each chunk first and must be sequential.
 * Formats: QEMU docs/interop/vfio-user.rst; NVM Express Base 1.3 sections 3.1, 4, 5, 6; OCSSD 2.0 sections 3 and 4.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "common.h"

enum { VERSION = 1, DMA_MAP = 2, GET_INFO = 4, GET_REGION_INFO = 5, GET_IRQ_INFO = 7, SET_IRQS = 8, REGION_READ = 9,
       REGION_WRITE = 10 };
enum { TYPE_REPLY = 1, NO_REPLY = 1 << 4, ERROR = 1 << 5, PAYLOAD_MAX = 4096, BAR0 = 0, MSIX = 2 };
enum { CAP = 0x00, CC = 0x14, CSTS = 0x1c, AQA = 0x24, ASQ = 0x28, ACQ = 0x30, DOORBELLS = 0x1000 };
enum { CC_ENABLE = 6 << 16 | 4 << 20 | 1, PAGE = 4096, ADMIN_ENTRIES = 32, ENTRIES = 256, QUEUES_MAX = 16 };
enum { CREATE_SQ = 0x01, CREATE_CQ = 0x05, IDENTIFY = 0x06, DOORBELL_BUFFER = 0x7c, GEOMETRY = 0xe2 };
enum { WRITE = 0x01, READ = 0x02, VECTOR_RESET = 0x90, VECTOR_WRITE = 0x91, VECTOR_READ = 0x92, VECTOR_MAX = 64,
       INVALID_RESET = 0x2c1 };
enum doorbells { TRAPPED, SHADOW, MAPPED };

struct header { uint16_t id, command; uint32_t size, flags, error; };
struct access { uint64_t offset; uint32_t region, count; };
struct dma_map { uint32_t argsz, flags; uint64_t offset, iova, size; };
struct region_info { uint32_t argsz, flags, index, cap_offset; uint64_t size, offset; char caps[256]; };
struct irq_info { uint32_t argsz, flags, index, count; };
struct irq_set { uint32_t argsz, flags, index, start, count; };

struct sqe {
    uint8_t opcode, flags;
    uint16_t cid;
    uint32_t nsid, cdw2, cdw3;
    uint64_t mptr, prp1, prp2;
    uint32_t cdw10, cdw11, cdw12, cdw13, cdw14, cdw15;
};
struct cqe { uint32_t dw0, dw1; uint16_t sqhd, sqid, cid, status; };

struct slot { uint64_t list[VECTOR_MAX], prp[PAGE / 8 - VECTOR_MAX]; };     /* one page: addresses, pages of the data */

struct queue {
    struct sqe *sq;
    volatile struct cqe *cq;
    struct slot *slots;
    struct request *requests;
    char *data;
    int irq_fd;
    uint32_t entries, tail, head, rung_tail, rung_head, in_flight;
    uint16_t qid, phase;
};

struct geometry { uint8_t bits[4]; uint32_t groups, pus, chunks, sectors; };    /* bits: group, PU, chunk, sector */

struct client {
    int socket, memory_fd;
    char *memory, *next;
    volatile uint32_t *page;    /* MAPPED: the doorbells */
    volatile uint32_t *shadow, *event;
    uint64_t memory_bytes, capacity_bytes, traps, wakeups;
    uint32_t block_bytes, depth, queues, nsid, lba_shift;
    uint16_t next_id;
    bool polling, vector;
    enum doorbells doorbells;
    struct geometry geometry;
    struct queue admin, *queue;
};

/* ---- messages ---- */

static void send_message(struct client *c, uint16_t command, uint32_t flags, const void *payload, uint32_t size, int fd)
{
    struct { struct header head; char payload[PAYLOAD_MAX]; } m = { { ++c->next_id, command, 16 + size, flags, 0 }, "" };
    memcpy(m.payload, payload, size);
    if (!send_with_fd(c->socket, &m, 16 + size, fd)) die("sending command %u: %s", command, strerror(errno));
}

/* Sends a command and receives its reply of at most `room` bytes; returns the descriptor that came along, or -1. */
static int call(struct client *c, uint16_t command, const void *payload, uint32_t size, int fd, void *reply, uint32_t room)
{
    struct header head;
    char control[CMSG_SPACE(sizeof(int))];
    struct iovec iov = { &head, sizeof head };
    struct msghdr header = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
    int came = -1;
    send_message(c, command, 0, payload, size, fd);
    if (recvmsg(c->socket, &header, MSG_WAITALL | MSG_CMSG_CLOEXEC) != sizeof head) die("command %u: no reply", command);
    struct cmsghdr *cmsg = CMSG_FIRSTHDR(&header);
    if (cmsg && cmsg->cmsg_type == SCM_RIGHTS) memcpy(&came, CMSG_DATA(cmsg), sizeof came);
    if (head.id != c->next_id || head.command != command || !(head.flags & TYPE_REPLY)) die("command %u: a reply to something else", command);
    if (head.flags & ERROR) die("command %u was refused: %s", command, strerror((int)head.error));
    if (head.size - 16 > room) die("command %u: a reply of %u bytes", command, head.size);
    if (head.size > 16 && recv(c->socket, reply, head.size - 16, MSG_WAITALL) != (ssize_t)(head.size - 16)) die("command %u: short reply", command);
    return came;
}

static uint64_t register_read(struct client *c, uint64_t offset, uint32_t bytes)
{
    struct { struct access access; uint64_t value; } reply = { .value = 0 };
    struct access access = { offset, BAR0, bytes };
    call(c, REGION_READ, &access, sizeof access, -1, &reply, sizeof reply);
    return reply.value;
}

static void register_write(struct client *c, uint64_t offset, uint64_t value, uint32_t bytes)
{
    struct { struct access access; uint64_t value; } m = { { offset, BAR0, bytes }, value };
    send_message(c, REGION_WRITE, NO_REPLY, &m, (uint32_t)sizeof m.access + bytes, -1);
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

static void negotiate(struct client *c)
{
    static const char version[] = "\0\0\0\0{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":1048576,\"pgsizes\":4096}}";
    struct dma_map map = { sizeof map, 3, 0, 0, c->memory_bytes };
    uint32_t info[4] = { 16 };
    char reply[PAYLOAD_MAX];
    call(c, VERSION, version, sizeof version, -1, reply, sizeof reply);
    call(c, DMA_MAP, &map, sizeof map, c->memory_fd, reply, sizeof reply);
    call(c, GET_INFO, info, sizeof info, -1, info, sizeof info);
    if (info[2] < 8 || info[3] < 3) die("%u regions and %u interrupts: not a PCI device", info[2], info[3]);
}

static void map_doorbells(struct client *c)
{
    struct region_info info = { .argsz = 32, .index = BAR0 };
    call(c, GET_REGION_INFO, &info, 32, -1, &info, sizeof info);
    if (c->doorbells != MAPPED) return;
    info.argsz = sizeof info, info.index = BAR0;
    int fd = call(c, GET_REGION_INFO, &info, 32, -1, &info, sizeof info);
    if (fd < 0) die("the doorbells cannot be mapped: set nvme.doorbells=mapped");
    c->page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, DOORBELLS);
    if (c->page == MAP_FAILED) die("doorbells: %s", strerror(errno));
    close(fd);
}

static void set_vector(struct client *c, uint32_t vector, int fd)
{
    struct irq_set set = { sizeof set, 0x24, MSIX, vector, 1 };
    char reply[PAYLOAD_MAX];
    call(c, SET_IRQS, &set, sizeof set, fd, reply, sizeof reply);
}

/* ---- guest memory: bus address = offset in the memfd ---- */

static uint64_t bus(const struct client *c, const volatile void *p)
{
    return (uint64_t)((const volatile char *)p - c->memory);
}

static size_t page_up(size_t bytes)
{
    return (bytes + PAGE - 1) & ~(size_t)(PAGE - 1);
}

static void *take(struct client *c, size_t bytes)
{
    char *at = c->next;
    c->next += page_up(bytes);
    if (c->next > c->memory + c->memory_bytes) die("guest memory is used up");
    return at;
}

static void allocate_memory(struct client *c)
{
    size_t pair = ENTRIES * (sizeof(struct sqe) + sizeof(struct cqe)) + (PAGE + page_up(c->block_bytes)) * c->depth + 4 * PAGE;
    c->memory_bytes = page_up(pair) * c->queues + (64 << 10);
    c->memory_fd = memfd_create("bench-guest-memory", MFD_CLOEXEC);
    if (c->memory_fd < 0 || ftruncate(c->memory_fd, (off_t)c->memory_bytes)) die("guest memory: %s", strerror(errno));
    c->memory = mmap(NULL, c->memory_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, c->memory_fd, 0);
    c->queue = calloc(c->queues, sizeof *c->queue);
    if (c->memory == MAP_FAILED || !c->queue) die("guest memory: %s", strerror(errno));
    c->next = c->memory + PAGE;         /* nothing at address 0 */
}

static void queue_init(struct client *c, struct queue *q, uint16_t qid, uint32_t entries)
{
    *q = (struct queue){ .qid = qid, .entries = entries, .phase = 1, .irq_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK) };
    q->sq = take(c, entries * sizeof *q->sq);
    q->cq = take(c, entries * sizeof *q->cq);
    set_vector(c, qid, q->irq_fd);
}

/* ---- doorbells: index 2 * queue, + 1 for its completion queue ---- */

static void trap(struct client *c, uint32_t index, uint32_t value)
{
    c->traps++;
    register_write(c, DOORBELLS + 4 * index, value, 4);
}

/* Spec: 7.13 and annex B.5, what Linux does: store, then look whether the device wants to be told. */
static void ring_shadow(struct client *c, uint32_t index, uint32_t value)
{
    uint16_t old = (uint16_t)c->shadow[index];
    __atomic_store_n(&c->shadow[index], value, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    uint16_t event = (uint16_t)__atomic_load_n(&c->event[index], __ATOMIC_RELAXED);
    if ((uint16_t)(value - event - 1) < (uint16_t)(value - old)) trap(c, index, value);
}

static void ring(struct client *c, uint32_t index, uint32_t value)
{
    if (index < 2) trap(c, index, value);       /* the admin queue's: nobody measures it */
    else if (c->page) __atomic_store_n(&c->page[index], value, __ATOMIC_RELEASE);
    else if (c->shadow) ring_shadow(c, index, value);
    else trap(c, index, value);
}

static void ring_both(struct client *c, struct queue *q)
{
    if (q->rung_head != q->head) ring(c, 2u * q->qid + 1, q->rung_head = q->head);
    if (q->rung_tail != q->tail) ring(c, 2u * q->qid, q->rung_tail = q->tail);
}

/* ---- queues ---- */

static void push(struct queue *q, const struct sqe *entry)
{
    q->sq[q->tail] = *entry;
    q->tail = (q->tail + 1) % q->entries;
    q->in_flight++;
}

static bool pop(struct queue *q, struct cqe *done)
{
    volatile struct cqe *e = &q->cq[q->head];
    if ((__atomic_load_n(&e->status, __ATOMIC_ACQUIRE) & 1) != q->phase) return false;
    *done = (struct cqe){ .dw0 = e->dw0, .dw1 = e->dw1, .cid = e->cid, .status = (uint16_t)(e->status >> 1) };
    q->head = (q->head + 1) % q->entries;
    if (!q->head) q->phase ^= 1;
    q->in_flight--;
    return true;
}

static void wait_irq(struct client *c, struct queue *q, uint32_t count)
{
    struct pollfd irq[QUEUES_MAX];
    eventfd_t value;
    for (uint32_t i = 0; i < count; i++) irq[i] = (struct pollfd){ .fd = q[i].irq_fd, .events = POLLIN };
    if (poll(irq, count, -1) < 1) die("interrupt eventfd: %s", strerror(errno));
    for (uint32_t i = 0; i < count; i++)
        if (irq[i].revents && eventfd_read(q[i].irq_fd, &value)) die("interrupt eventfd: %s", strerror(errno));
    c->wakeups++;
}

/* One command after the other, of which nobody measures the time; returns its status. */
static uint16_t command(struct client *c, struct queue *q, const struct sqe *entry)
{
    struct cqe done;
    push(q, entry);
    ring_both(c, q);
    while (!pop(q, &done))
        if (q->qid == 0 || !c->polling) wait_irq(c, q, 1);
    ring_both(c, q);
    return done.status;
}

static void admin_command(struct client *c, const struct sqe *entry)
{
    uint16_t status = command(c, &c->admin, entry);
    if (status) die("admin command %#x failed with status %#x", entry->opcode, status);
}

static void admin(struct client *c, uint8_t opcode, uint32_t nsid, const volatile void *data, uint32_t cdw10, uint32_t cdw11)
{
    admin_command(c, &(struct sqe){ .opcode = opcode, .nsid = nsid, .prp1 = bus(c, data), .cdw10 = cdw10, .cdw11 = cdw11 });
}

/* ---- controller ---- */

static void enable(struct client *c)
{
    queue_init(c, &c->admin, 0, ADMIN_ENTRIES);
    register_write(c, AQA, (ADMIN_ENTRIES - 1) << 16 | (ADMIN_ENTRIES - 1), 4);
    register_write(c, ASQ, bus(c, c->admin.sq), 8);
    register_write(c, ACQ, bus(c, c->admin.cq), 8);
    register_write(c, CC, CC_ENABLE, 4);
    while (!(register_read(c, CSTS, 4) & 3)) cpu_relax();
    if (register_read(c, CSTS, 4) & 2) die("the controller reports a fatal status");
}

static void identify(struct client *c)
{
    unsigned char *data = take(c, PAGE);
    uint64_t lbas;
    admin(c, IDENTIFY, c->nsid, data, 0, 0);
    memcpy(&lbas, data, sizeof lbas);
    c->lba_shift = data[128 + 4 * (data[26] & 0xf) + 2];
    c->capacity_bytes = lbas << c->lba_shift;
    if (c->block_bytes >> c->lba_shift << c->lba_shift != c->block_bytes) die("blocks of %u bytes in LBAs of %u", c->block_bytes, 1u << c->lba_shift);
}

/* Geometry of an OCSSD 2.0 namespace. A block must be a divisor of a chunk, so that it never crosses one. */
static void read_geometry(struct client *c)
{
    struct geometry *g = &c->geometry;
    unsigned char *data = take(c, PAGE);
    uint16_t number[2];
    admin(c, GEOMETRY, c->nsid, data, 0, 0);
    memcpy(g->bits, data + 8, sizeof g->bits);
    memcpy(number, data + 64, sizeof number);
    memcpy(&g->chunks, data + 68, sizeof g->chunks);
    memcpy(&g->sectors, data + 72, sizeof g->sectors);
    g->groups = number[0], g->pus = number[1];
    uint32_t run = c->block_bytes >> c->lba_shift;
    if (run < 2 || run > VECTOR_MAX || g->sectors % run) die("blocks of %u sectors in chunks of %u", run, g->sectors);
    c->capacity_bytes = (uint64_t)g->groups * g->pus * g->chunks * g->sectors << c->lba_shift;
}

static void create_queue(struct client *c, struct queue *q, uint16_t qid)
{
    queue_init(c, q, qid, ENTRIES);
    admin(c, CREATE_CQ, 0, q->cq, (ENTRIES - 1) << 16 | qid, (uint32_t)qid << 16 | (c->polling ? 1 : 3));
    admin(c, CREATE_SQ, 0, q->sq, (ENTRIES - 1) << 16 | qid, (uint32_t)qid << 16 | 1);
    q->slots = take(c, sizeof *q->slots * c->depth);
    q->data = take(c, page_up(c->block_bytes) * c->depth);
    q->requests = calloc(c->depth, sizeof *q->requests);
    for (uint32_t slot = 0; slot < c->depth; slot++) {
        char *data = q->data + page_up(c->block_bytes) * slot;
        memset(data, STAMP_FILLER, c->block_bytes);
        for (uint32_t i = 1; (uint64_t)i * PAGE < c->block_bytes; i++) q->slots[slot].prp[i - 1] = bus(c, data + (uint64_t)i * PAGE);
    }
}

static void use_shadow_doorbells(struct client *c)
{
    volatile uint32_t *shadow = take(c, PAGE), *event = take(c, PAGE);
    admin_command(c, &(struct sqe){ .opcode = DOORBELL_BUFFER, .prp1 = bus(c, shadow), .prp2 = bus(c, event) });
    c->shadow = shadow, c->event = event;
}

static void start(struct client *c)
{
    negotiate(c);
    map_doorbells(c);
    enable(c);
    identify(c);
    if (c->vector) read_geometry(c);
    for (uint16_t i = 0; i < c->queues; i++) create_queue(c, &c->queue[i], (uint16_t)(i + 1));
    if (c->doorbells == SHADOW) use_shadow_doorbells(c);
}

/* ---- commands ---- */

static char *data_of(const struct client *c, const struct queue *q, uint32_t slot)
{
    return q->data + page_up(c->block_bytes) * slot;
}

/* Address of a linear sector: runs go over the PUs in turn, then on within the chunks, then to the next chunks. */
static uint64_t sector_address(const struct client *c, uint64_t sector)
{
    const struct geometry *g = &c->geometry;
    uint64_t run = c->block_bytes >> c->lba_shift, pus = (uint64_t)g->groups * g->pus;
    uint64_t block = sector / run, pu = block % pus, at = block / pus * run + sector % run;
    uint64_t group = pu / g->pus, chunk = at / g->sectors;
    return ((group << g->bits[1] | pu % g->pus) << g->bits[2] | chunk) << g->bits[3] | at % g->sectors;
}

static void address_data(const struct client *c, const struct queue *q, uint32_t slot, struct sqe *entry)
{
    entry->prp1 = bus(c, data_of(c, q, slot));
    if (c->block_bytes > 2 * PAGE) entry->prp2 = bus(c, q->slots[slot].prp);
    else if (c->block_bytes > PAGE) entry->prp2 = entry->prp1 + PAGE;
}

static struct sqe plain_entry(const struct client *c, const struct request *r)
{
    uint64_t lba = r->offset >> c->lba_shift;
    return (struct sqe){ .opcode = r->write ? WRITE : READ, .cdw10 = (uint32_t)lba, .cdw11 = (uint32_t)(lba >> 32) };
}

static struct sqe vector_entry(const struct client *c, struct queue *q, uint32_t slot)
{
    const struct request *r = &q->requests[slot];
    uint64_t list = bus(c, q->slots[slot].list), sector = r->offset >> c->lba_shift;
    for (uint32_t i = 0; i < c->block_bytes >> c->lba_shift; i++) q->slots[slot].list[i] = sector_address(c, sector + i);
    return (struct sqe){ .opcode = r->write ? VECTOR_WRITE : VECTOR_READ, .cdw10 = (uint32_t)list, .cdw11 = (uint32_t)(list >> 32) };
}

static void submit(struct client *c, struct queue *q, struct run *r, uint32_t slot, uint64_t now)
{
    q->requests[slot] = run_next(r, now);
    run_prepare_data(r, &q->requests[slot], data_of(c, q, slot));
    struct sqe entry = c->vector ? vector_entry(c, q, slot) : plain_entry(c, &q->requests[slot]);
    entry.cid = (uint16_t)slot, entry.nsid = c->nsid, entry.cdw12 = (c->block_bytes >> c->lba_shift) - 1;
    address_data(c, q, slot, &entry);
    push(q, &entry);
}

static void finish(struct client *c, struct queue *q, struct run *r, const struct cqe *done, uint64_t now)
{
    if (done->cid >= c->depth) die("a completion of command %u, never submitted", done->cid);
    if (done->status) die("command at byte %llu failed with status %#x", (unsigned long long)q->requests[done->cid].offset, done->status);
    run_finish(r, &q->requests[done->cid], data_of(c, q, done->cid), now);
}

/* Takes everything that is finished and refills; returns how many were finished. */
static uint32_t turn(struct client *c, struct queue *q, struct run *r)
{
    struct cqe done;
    uint32_t count = 0;
    uint64_t now = 0;
    while (pop(q, &done)) {
        if (!count++) now = now_ns();
        finish(c, q, r, &done, now);
        if (run_wants_more(r, now)) submit(c, q, r, done.cid, now);
    }
    if (count) ring_both(c, q);
    return count;
}

static uint32_t in_flight(const struct client *c)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < c->queues; i++) count += c->queue[i].in_flight;
    return count;
}

/* Before a pass that writes: every chunk that it will write becomes FREE, or is already, which is an invalid reset. */
static void reset_chunks(struct client *c, const struct run *r)
{
    uint64_t runs = (uint64_t)c->geometry.groups * c->geometry.pus, row = runs * c->geometry.sectors << c->lba_shift;
    if (r->workload->pattern != SEQUENTIAL) die("vector writes must be sequential");
    for (uint64_t at = 0; at < r->blocks * c->block_bytes; at += row)
        for (uint64_t pu = 0; pu < runs; pu++) {
            uint64_t address = sector_address(c, (at + pu * c->block_bytes) >> c->lba_shift);
            uint16_t status = command(c, &c->queue[0], &(struct sqe){ .opcode = VECTOR_RESET, .nsid = c->nsid,
                .cdw10 = (uint32_t)address, .cdw11 = (uint32_t)(address >> 32) });
            if (status && (status & 0x7ff) != INVALID_RESET) die("reset of %#llx: status %#x", (unsigned long long)address, status);
        }
}

static void drive(struct run *r, void *opaque)
{
    struct client *c = opaque;
    if (c->vector && r->workload->operation != OP_READ) reset_chunks(c, r);
    uint64_t now = now_ns();
    for (uint32_t i = 0; i < c->queues; i++) {
        for (uint32_t slot = 0; slot < c->depth && run_wants_more(r, now); slot++) submit(c, &c->queue[i], r, slot, now);
        ring_both(c, &c->queue[i]);
    }
    while (in_flight(c)) {
        uint32_t count = 0;
        for (uint32_t i = 0; i < c->queues; i++) count += turn(c, &c->queue[i], r);
        if (!count && c->polling) cpu_relax();
        else if (!count) wait_irq(c, c->queue, c->queues);
    }
}

/* ---- command line ---- */

static enum doorbells parse_doorbells(const char *text)
{
    static const char *names[] = { [TRAPPED] = "trapped", [SHADOW] = "shadow", [MAPPED] = "mapped" };
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcmp(text, names[i])) return (enum doorbells)i;
    die("unknown doorbells %s", text);
}

static bool client_option(struct client *c, const char **path, const char *name, const char *value)
{
    if (!strcmp(name, "--socket")) *path = value;
    else if (!strcmp(name, "--queues")) c->queues = (uint32_t)parse_bytes(value);
    else if (!strcmp(name, "--mode")) c->polling = !strcmp(value, "poll");
    else if (!strcmp(name, "--doorbells")) c->doorbells = parse_doorbells(value);
    else if (!strcmp(name, "--nsid")) c->nsid = (uint32_t)parse_bytes(value);
    else if (!strcmp(name, "--vector")) c->vector = parse_bytes(value) != 0;
    else return false;
    return true;
}

int main(int argc, char **argv)
{
    struct workload w = { .block_bytes = 4096, .depth = 32, .seconds = 2, .seed = 1 };
    struct client c = { .queues = 1, .nsid = 1, .doorbells = SHADOW };
    const char *path = NULL;
    static struct run r;
    for (int i = 1; i < argc; i += 2) {
        if (i + 1 == argc) die("%s needs a value", argv[i]);
        if (!workload_option(&w, argv[i], argv[i + 1]) && !client_option(&c, &path, argv[i], argv[i + 1])) die("unknown option %s", argv[i]);
    }
    if (!path || !w.depth || w.depth >= ENTRIES || !c.queues || c.queues > QUEUES_MAX || w.block_bytes > VECTOR_MAX * PAGE || w.block_bytes % 512)
        die("bad options; needs --socket, depth 1..255, queues 1..16, blocks of at most 256 KiB");
    c.block_bytes = w.block_bytes, c.depth = w.depth;
    connect_to(&c, path);
    allocate_memory(&c);
    start(&c);
    run_workload(&r, &w, c.capacity_bytes, drive, &c);
    close(c.socket);
    run_print(&r);
    printf(", \"traps\": %llu, \"wakeups\": %llu, \"device_bytes\": %llu}\n", (unsigned long long)c.traps,
           (unsigned long long)c.wakeups, (unsigned long long)c.capacity_bytes);
    return 0;
}
