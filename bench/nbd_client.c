/* A lean NBD client: sends and parses as many requests per system call as the depth allows, over a Unix socket.
 *
 * Newstyle negotiation with NBD_OPT_GO (and NBD_OPT_STRUCTURED_REPLY with `--structured 1`); then READ and WRITE only.
 * Replies are parsed in the receive buffer, without copying. Wire format: NBD protocol document, "Newstyle negotiation"
 * and "Transmission phase". All integers on the wire are big-endian.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>

#include "common.h"

#define NBD_MAGIC 0x4e42444d41474943ull
#define OPTION_MAGIC 0x49484156454f5054ull
#define OPTION_REPLY_MAGIC 0x3e889045565a9ull
#define REQUEST_MAGIC 0x25609513u
#define SIMPLE_REPLY_MAGIC 0x67446698u
#define CHUNK_MAGIC 0x668e33efu

enum { OPT_GO = 7, OPT_STRUCTURED_REPLY = 8, REP_ACK = 1, REP_INFO = 3, INFO_EXPORT = 0 };
enum { FLAG_FIXED_NEWSTYLE = 1, FLAG_NO_ZEROES = 2, CMD_READ = 0, CMD_WRITE = 1 };
enum { CHUNK_DONE = 1, CHUNK_NONE = 0, CHUNK_OFFSET_DATA = 1, CHUNK_OFFSET_HOLE = 2 };

struct option { uint64_t magic; uint32_t option, length; } __attribute__((packed));
struct option_reply { uint64_t magic; uint32_t option, type, length; } __attribute__((packed));
struct wire_request { uint32_t magic; uint16_t flags, type; uint64_t cookie, offset; uint32_t length; } __attribute__((packed));
struct simple_reply { uint32_t magic, error; uint64_t cookie; } __attribute__((packed));
struct chunk { uint32_t magic; uint16_t flags, type; uint64_t cookie; uint32_t length; } __attribute__((packed));

struct client {
    int socket;
    bool structured;
    uint64_t device_bytes, sends, receives;
    uint32_t block_bytes, depth, in_flight;
    struct request *requests;
    struct wire_request *headers;
    char **data;            /* of each slot: what a write sends */
    struct iovec *iov;      /* what waits to be sent */
    uint32_t unsent;
    char *buffer;           /* bytes [parsed, filled) are received and not yet parsed */
    size_t buffer_bytes, parsed, filled;
};

/* ---- negotiation: blocking, one message at a time ---- */

static void send_all(struct client *c, const void *data, size_t bytes)
{
    if (send(c->socket, data, bytes, MSG_NOSIGNAL) != (ssize_t)bytes) die("sending: %s", strerror(errno));
}

static void receive_all(struct client *c, void *data, size_t bytes)
{
    if (bytes && recv(c->socket, data, bytes, MSG_WAITALL) != (ssize_t)bytes) die("the server closed the connection");
}

static void send_option(struct client *c, uint32_t option, const void *data, uint32_t length)
{
    struct option header = { htobe64(OPTION_MAGIC), htobe32(option), htobe32(length) };
    send_all(c, &header, sizeof header);
    if (length) send_all(c, data, length);
}

/* Takes one reply; `data` gets at most `room` bytes of it. */
static uint32_t receive_option_reply(struct client *c, uint32_t option, char *data, size_t room)
{
    struct option_reply reply;
    receive_all(c, &reply, sizeof reply);
    if (be64toh(reply.magic) != OPTION_REPLY_MAGIC || be32toh(reply.option) != option) die("bad reply to option %u", option);
    if (be32toh(reply.length) > room) die("reply to option %u has %u bytes", option, be32toh(reply.length));
    receive_all(c, data, be32toh(reply.length));
    return be32toh(reply.type);
}

static void go(struct client *c)
{
    char data[4096], empty_name_no_info[6] = { 0 };
    uint32_t type;
    send_option(c, OPT_GO, empty_name_no_info, sizeof empty_name_no_info);
    while ((type = receive_option_reply(c, OPT_GO, data, sizeof data)) == REP_INFO) {
        uint16_t info;
        memcpy(&info, data, sizeof info);
        if (be16toh(info) != INFO_EXPORT) continue;
        memcpy(&c->device_bytes, data + 2, sizeof c->device_bytes);
        c->device_bytes = be64toh(c->device_bytes);
    }
    if (type != REP_ACK) die("NBD_OPT_GO was refused (%#x)", type);
}

static void negotiate(struct client *c)
{
    struct { uint64_t magic, option_magic; uint16_t flags; } __attribute__((packed)) greeting;
    char data[4096];
    receive_all(c, &greeting, sizeof greeting);
    if (be64toh(greeting.magic) != NBD_MAGIC || be64toh(greeting.option_magic) != OPTION_MAGIC) die("not a newstyle NBD server");
    uint32_t flags = htobe32(FLAG_FIXED_NEWSTYLE | (be16toh(greeting.flags) & FLAG_NO_ZEROES));
    send_all(c, &flags, sizeof flags);
    if (c->structured) {
        send_option(c, OPT_STRUCTURED_REPLY, NULL, 0);
        c->structured = receive_option_reply(c, OPT_STRUCTURED_REPLY, data, sizeof data) == REP_ACK;
    }
    go(c);
}

static void connect_to(struct client *c, const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    if (strlen(path) >= sizeof address.sun_path) die("socket path too long: %s", path);
    strcpy(address.sun_path, path);
    c->socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c->socket < 0 || connect(c->socket, (struct sockaddr *)&address, sizeof address)) die("%s: %s", path, strerror(errno));
}

/* ---- transmission ---- */

static void allocate(struct client *c)
{
    c->requests = calloc(c->depth, sizeof *c->requests);
    c->headers = calloc(c->depth, sizeof *c->headers);
    c->data = calloc(c->depth, sizeof *c->data);
    c->iov = calloc(2 * (size_t)c->depth, sizeof *c->iov);
    c->buffer_bytes = 2 * (size_t)c->depth * (c->block_bytes + 64) + 65536;
    c->buffer = malloc(c->buffer_bytes);
    if (!c->requests || !c->headers || !c->data || !c->iov || !c->buffer) die("no memory");
    for (uint32_t slot = 0; slot < c->depth; slot++) {
        if (!(c->data[slot] = malloc(c->block_bytes))) die("no memory");
        memset(c->data[slot], STAMP_FILLER, c->block_bytes);
    }
}

static void submit(struct client *c, struct run *r, uint32_t slot, uint64_t now)
{
    struct request *request = &c->requests[slot];
    *request = run_next(r, now);
    run_prepare_data(r, request, c->data[slot]);
    c->headers[slot] = (struct wire_request){ htobe32(REQUEST_MAGIC), 0, htobe16(request->write ? CMD_WRITE : CMD_READ), slot,
                                              htobe64(request->offset), htobe32(c->block_bytes) };
    c->iov[c->unsent++] = (struct iovec){ &c->headers[slot], sizeof *c->headers };
    if (request->write) c->iov[c->unsent++] = (struct iovec){ c->data[slot], c->block_bytes };
    c->in_flight++;
}

/* Drops the first `bytes` of what waits to be sent. */
static void consume(struct client *c, size_t bytes)
{
    uint32_t gone = 0;
    while (gone < c->unsent && bytes >= c->iov[gone].iov_len) bytes -= c->iov[gone++].iov_len;
    c->unsent -= gone;
    memmove(c->iov, c->iov + gone, c->unsent * sizeof *c->iov);
    if (c->unsent) c->iov->iov_base = (char *)c->iov->iov_base + bytes, c->iov->iov_len -= bytes;
}

/* Sends as much as the socket takes; what is left stays in the list. */
static void flush(struct client *c)
{
    while (c->unsent) {
        struct msghdr header = { .msg_iov = c->iov, .msg_iovlen = c->unsent };
        ssize_t sent = sendmsg(c->socket, &header, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0 && errno == EAGAIN) return;
        if (sent < 0) die("sending: %s", strerror(errno));
        c->sends++;
        consume(c, (size_t)sent);
    }
}

/* Waits for bytes from the server; a depth of 1 is one blocking system call, as in any plain client. */
static void receive(struct client *c)
{
    if (c->parsed == c->filled) c->parsed = c->filled = 0;
    if (c->buffer_bytes - c->filled < c->buffer_bytes / 4) {
        memmove(c->buffer, c->buffer + c->parsed, c->filled - c->parsed);
        c->filled -= c->parsed, c->parsed = 0;
    }
    if (c->unsent) {
        struct pollfd p = { c->socket, POLLIN | POLLOUT, 0 };
        poll(&p, 1, -1);
        flush(c);
        if (!(p.revents & POLLIN)) return;
    }
    ssize_t got = recv(c->socket, c->buffer + c->filled, c->buffer_bytes - c->filled, 0);
    if (got <= 0) die("the server closed the connection");
    c->receives++;
    c->filled += (size_t)got;
}

static void finish(struct client *c, struct run *r, uint64_t slot, const char *data, uint64_t now)
{
    if (slot >= c->depth) die("reply with cookie %llu, never sent", (unsigned long long)slot);
    run_finish(r, &c->requests[slot], data, now);
    c->in_flight--;
    if (run_wants_more(r, now)) submit(c, r, (uint32_t)slot, now);
}

/* Each parser returns the bytes that it used, or 0 while the reply is not complete. */
static size_t parse_simple(struct client *c, struct run *r, const char *at, size_t available, uint64_t now)
{
    struct simple_reply reply;
    if (available < sizeof reply) return 0;
    memcpy(&reply, at, sizeof reply);
    if (reply.cookie >= c->depth) die("reply with cookie %#llx, never sent", (unsigned long long)reply.cookie);
    size_t bytes = sizeof reply + (c->requests[reply.cookie].write ? 0 : c->block_bytes);
    if (reply.error) die("a request failed with error %u", be32toh(reply.error));
    if (available < bytes) return 0;
    finish(c, r, reply.cookie, at + sizeof reply, now);
    return bytes;
}

static size_t parse_chunk(struct client *c, struct run *r, const char *at, size_t available, uint64_t now)
{
    struct chunk chunk;
    if (available < sizeof chunk) return 0;
    memcpy(&chunk, at, sizeof chunk);
    size_t length = be32toh(chunk.length);
    uint16_t type = be16toh(chunk.type);
    if (type != CHUNK_NONE && type != CHUNK_OFFSET_DATA && type != CHUNK_OFFSET_HOLE) die("a request failed (chunk type %#x)", type);
    if (available < sizeof chunk + length) return 0;
    if (type == CHUNK_OFFSET_DATA && length != c->block_bytes + 8 && r->workload->check_every) die("a split reply cannot be checked");
    if (be16toh(chunk.flags) & CHUNK_DONE) finish(c, r, chunk.cookie, at + sizeof chunk + 8, now);
    return sizeof chunk + length;
}

static void parse(struct client *c, struct run *r)
{
    uint64_t now = now_ns();
    while (c->filled - c->parsed >= sizeof(struct simple_reply)) {
        uint32_t magic;
        size_t used;
        memcpy(&magic, c->buffer + c->parsed, sizeof magic);
        bool chunk = be32toh(magic) == CHUNK_MAGIC;
        if (!chunk && be32toh(magic) != SIMPLE_REPLY_MAGIC) die("bad reply magic %#x", be32toh(magic));
        used = (chunk ? parse_chunk : parse_simple)(c, r, c->buffer + c->parsed, c->filled - c->parsed, now);
        if (!used) return;
        c->parsed += used;
    }
}

static void drive(struct run *r, void *opaque)
{
    struct client *c = opaque;
    uint64_t now = now_ns();
    for (uint32_t slot = 0; slot < c->depth && run_wants_more(r, now); slot++) submit(c, r, slot, now);
    flush(c);
    while (c->in_flight) {
        receive(c);
        parse(c, r);
        flush(c);
    }
}

static void disconnect(struct client *c)
{
    struct wire_request bye = { .magic = htobe32(REQUEST_MAGIC), .type = htobe16(2) };
    send_all(c, &bye, sizeof bye);
    close(c->socket);
}

int main(int argc, char **argv)
{
    struct workload w = { .block_bytes = 4096, .depth = 32, .seconds = 2, .seed = 1 };
    struct client c = { 0 };
    const char *path = NULL;
    static struct run r;
    for (int i = 1; i < argc; i += 2) {
        if (i + 1 == argc) die("%s needs a value", argv[i]);
        if (!strcmp(argv[i], "--socket")) path = argv[i + 1];
        else if (!strcmp(argv[i], "--structured")) c.structured = parse_bytes(argv[i + 1]) != 0;
        else if (!workload_option(&w, argv[i], argv[i + 1])) die("unknown option %s", argv[i]);
    }
    if (!path || !w.depth) die("needs --socket");
    c.block_bytes = w.block_bytes, c.depth = w.depth;
    connect_to(&c, path);
    negotiate(&c);
    allocate(&c);
    run_workload(&r, &w, c.device_bytes, drive, &c);
    disconnect(&c);
    run_print(&r);
    printf(", \"sends\": %llu, \"receives\": %llu, \"structured\": %s, \"device_bytes\": %llu}\n", (unsigned long long)c.sends,
           (unsigned long long)c.receives, c.structured ? "true" : "false", (unsigned long long)c.device_bytes);
    return 0;
}
