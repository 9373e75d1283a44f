/* A kdbus node against the socket of the same bus: `kdbusfs SOCKET NODE WHAT COUNT BYTES SECONDS`.
 *
 * One process is all the clients: what is measured is the bus, and each step waits for the one before.
 *
 *   calls    phases read, write, ioctl: one request of the kernel each, answered as soon as can be. The
 *            page that is read is dropped from the cache before; the write is refused (EINVAL), and so is
 *            the FREE of a slice that is not there (ENXIO).
 *   message  SEND, poll, RECV, FREE from one connection to COUNT others; to more than one it is a signal
 *            that all have a match for. Phase socket: the same signal, sendmsg, recv.
 *   memfd    the same to one, the payload in a new sealed memfd, which the receiver gets over the socket
 *            that it has attached, and maps; phase vector: in a vector; phase socket: as bytes.
 *
 * What was received is looked at: its last byte is that of the round.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "client.h"
#include "stage.h"

enum { POOL = 16 << 20, MAX_COUNT = 256, MAX_BLOOM = 4096 };

struct hello { uint64_t size, flags, ret, send, recv, bus_flags, id, pool, offset, items; uint8_t uuid[16]; };
struct sending { uint64_t size, flags, ret, message, offset, reply_size, reply_flags; };
struct receiving { uint64_t size, flags, ret; int64_t priority; uint64_t dropped, offset, message_size, message_flags; };
struct freeing { uint64_t size, flags, ret, offset; };
struct attaching { uint64_t size, flags, ret, fd; };
struct installing { uint64_t size, flags, ret, offset, count, numbers; };
struct item { uint64_t size, type, a, b; };
struct memfd { uint64_t size, type, start, length; int32_t fd; uint32_t pad; };
struct wire { uint64_t size, flags; int64_t priority; uint64_t dst, src, type, cookie, reply; };

#define HELLO _IOWR(0x95, 0x80, struct hello)
#define FREE _IOW(0x95, 0x83, struct freeing)
#define SEND _IOW(0x95, 0x90, struct sending)
#define RECV _IOR(0x95, 0x91, struct receiving)
#define MATCH_ADD _IOW(0x95, 0xb0, struct freeing)
#define ATTACH _IOW(0x95, 0xf0, struct attaching)
#define INSTALLED _IOW(0x95, 0xf1, struct installing)

enum { PAYLOAD_VEC = 2, PAYLOAD_OFF = 3, PAYLOAD_MEMFD = 4, BLOOM_FILTER = 8, BLOOM_MASK = 9 };
static const uint64_t DBUS = 0x4442757344427573;

struct connection {
    int fd, socket;
    uint64_t id, bloom;
    uint8_t *pool;
};

static const char *node, *socket_path;
static unsigned count;
static size_t bytes;
static double seconds;

static void need(bool so, const char *what) {
    if (!so)
        die("%s: %s", what, strerror(errno));
}

static void release(struct connection *at, uint64_t offset) {
    struct freeing command = {sizeof command, 0, 0, offset};
    need(!ioctl(at->fd, FREE, &command), "FREE");
}

static struct connection hello(bool attached) {
    struct hello command = {.size = sizeof command, .flags = 1, .pool = POOL};
    struct connection made = {.fd = open(node, O_RDWR | O_CLOEXEC), .socket = -1};
    int ends[2];
    need(made.fd >= 0, node);
    if (attached) {
        need(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), "socketpair");
        struct attaching attach = {sizeof attach, 0, 0, (uint64_t)ends[1]};
        need(!ioctl(made.fd, ATTACH, &attach), "ATTACH");
        close(ends[1]);
        made.socket = ends[0];
    }
    need(!ioctl(made.fd, HELLO, &command), "HELLO");
    if (attached) { /* the pool comes first; we map the file */
        uint64_t record[8];
        need(recv(made.socket, record, sizeof record, 0) > 0, "recv of the pool");
    }
    made.id = command.id;
    made.pool = mmap(NULL, POOL, PROT_READ, MAP_SHARED, made.fd, 0);
    need(made.pool != MAP_FAILED, "mmap of the pool");
    made.bloom = ((struct item *)(made.pool + command.offset))->a; /* ITEM_BLOOM_PARAMETER */
    release(&made, command.offset);
    return made;
}

static void match_signals(struct connection *at) {
    uint8_t command[sizeof(struct freeing) + 16 + MAX_BLOOM] = {0};
    struct freeing head = {sizeof head + 16 + at->bloom, 0, 0, 1};
    struct item mask = {16 + at->bloom, BLOOM_MASK, 0, 0}; /* no bits: every signal */
    memcpy(command, &head, sizeof head);
    memcpy(command + sizeof head, &mask, 16);
    need(!ioctl(at->fd, MATCH_ADD, command), "MATCH_ADD");
}

/* With `filter` bytes of a bloom filter it is a signal to all. */
static void send_message(struct connection *from, uint64_t to, const uint8_t *data, size_t size, int memfd,
                         uint64_t filter, uint64_t cookie) {
    uint64_t buffer[(sizeof(struct wire) + sizeof(struct memfd) + 24 + MAX_BLOOM) / 8] = {0};
    struct wire *head = (struct wire *)buffer;
    *head = (struct wire){sizeof *head, filter ? 4 : 0, 0, filter ? UINT64_MAX : to, 0, DBUS, cookie, 0};
    if (memfd >= 0) {
        struct memfd item = {sizeof item, PAYLOAD_MEMFD, 0, size, memfd, 0};
        memcpy((uint8_t *)buffer + head->size, &item, sizeof item);
        head->size += sizeof item;
    } else {
        struct item item = {sizeof item, PAYLOAD_VEC, size, (uintptr_t)data};
        memcpy((uint8_t *)buffer + head->size, &item, sizeof item);
        head->size += sizeof item;
    }
    if (filter) {
        struct item item = {24 + filter, BLOOM_FILTER, 0, 0};
        memcpy((uint8_t *)buffer + head->size, &item, 24);
        head->size += item.size;
    }
    struct sending command = {.size = sizeof command, .message = (uintptr_t)buffer};
    need(!ioctl(from->fd, SEND, &command), "SEND");
}

/* RECV and FREE; returns the last byte of the payload. */
static uint8_t receive(struct connection *at) {
    struct receiving command = {.size = sizeof command};
    struct pollfd waits = {at->fd, POLLIN, 0};
    need(poll(&waits, 1, 10000) == 1, "poll");
    need(!ioctl(at->fd, RECV, &command), "RECV");
    struct wire *head = (struct wire *)(at->pool + command.offset);
    uint8_t *item = (uint8_t *)(head + 1), *end = (uint8_t *)head + head->size;
    int last = -1;
    for (; item < end; item += (((struct item *)item)->size + 7) & ~7ull) {
        struct item *found = (struct item *)item;
        if (found->type == PAYLOAD_OFF)
            last = ((uint8_t *)head + found->b)[found->a - 1];
        if (found->type == PAYLOAD_MEMFD) {
            uint64_t record[3];
            char room[CMSG_SPACE(sizeof(int))];
            struct iovec in = {record, sizeof record};
            struct msghdr got = {.msg_iov = &in, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
            need(recvmsg(at->socket, &got, MSG_CMSG_CLOEXEC) == sizeof record, "recvmsg of a memfd");
            need(record[1] == command.offset && CMSG_FIRSTHDR(&got) != NULL, "the record of a memfd");
            int fd;
            memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&got)), sizeof fd);
            struct installing numbers = {sizeof numbers, 0, 0, command.offset, 1, (uintptr_t)&fd};
            need(!ioctl(at->fd, INSTALLED, &numbers), "INSTALLED");
            uint8_t *mapped = mmap(NULL, found->b, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
            need(mapped != MAP_FAILED, "mmap of a memfd");
            last = mapped[found->b - 1];
            munmap(mapped, found->b);
            close(fd);
        }
    }
    if (last < 0)
        die("a message of %llu bytes without a payload", (unsigned long long)head->size);
    release(at, command.offset);
    return (uint8_t)last;
}

static int sealed(const uint8_t *data, size_t size) {
    int fd = memfd_create("bench", MFD_ALLOW_SEALING | MFD_CLOEXEC);
    need(fd >= 0, "memfd_create");
    need(write(fd, data, size) == (ssize_t)size, "write to a memfd");
    int seals;
    do /* EBUSY: somebody in the kernel holds a page, though only for a moment */
        seals = fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL);
    while (seals && errno == EBUSY);
    need(!seals, "seals");
    return fd;
}

/* Runs `once(round)` for a time, after an eighth of it to warm up. */
static void repeat(const char *phase, void (*once)(uint8_t round)) {
    static struct histogram times;
    uint64_t calls, elapsed;
    for (int warm = 1; warm >= 0; warm--) {
        if (!warm)
            stage_ready(phase);
        memset(&times, 0, sizeof times);
        uint64_t begin = now_ns(), end = begin + (uint64_t)(seconds * 1e9 / (warm ? 8 : 1)), now = begin, last;
        for (calls = 0; now < end; calls++) {
            last = now;
            once((uint8_t)calls);
            now = now_ns();
            histogram_add(&times, now - last);
        }
        elapsed = now - begin;
    }
    stage_result("{\"calls\": %llu, \"per_second\": %.2f, \"us_per_call\": %.3f, \"p50_us\": %.3f, "
                 "\"p99_us\": %.3f, \"mean_us\": %.3f}",
                 (unsigned long long)calls, (double)calls * 1e9 / (double)elapsed,
                 (double)elapsed / 1e3 / (double)calls, histogram_quantile_us(&times, 0.5),
                 histogram_quantile_us(&times, 0.99), histogram_mean_us(&times));
}

static struct connection sender, receivers[MAX_COUNT];
static struct client plain_sender, plain_receivers[MAX_COUNT];
static struct template plain;

static void read_page(uint8_t round) {
    char byte;
    (void)round;
    need(!posix_fadvise(sender.fd, POOL / 2, 4096, POSIX_FADV_DONTNEED), "fadvise");
    need(pread(sender.fd, &byte, 1, POOL / 2) == 1, "read");
}

static void write_byte(uint8_t round) { need(pwrite(sender.fd, &round, 1, 0) < 0 && errno == EINVAL, "write"); }

static void free_nothing(uint8_t round) {
    struct freeing command = {sizeof command, 0, 0, POOL - 8};
    (void)round;
    need(ioctl(sender.fd, FREE, &command) < 0 && errno == ENXIO, "FREE of nothing");
}

static uint8_t *last_byte(void) { return plain.body + bytes - 1; }

static void check(uint8_t found, uint8_t round) {
    if (found != round)
        die("received %u instead of %u", found, round);
}

static void by_vector(uint8_t round) {
    *last_byte() = round;
    if (count > 1)
        send_message(&sender, 0, plain.bytes, plain.size, -1, sender.bloom, 1);
    else
        send_message(&sender, receivers[0].id, plain.body, bytes, -1, 0, 1);
    for (unsigned i = 0; i < count; i++)
        check(receive(&receivers[i]), round);
}

static void by_memfd(uint8_t round) {
    *last_byte() = round;
    int fd = sealed(plain.body, bytes);
    send_message(&sender, receivers[0].id, NULL, bytes, fd, 0, 1);
    close(fd);
    check(receive(&receivers[0]), round);
}

static void by_socket(uint8_t round) {
    struct message got;
    *last_byte() = round;
    client_send(&plain_sender, &plain);
    for (unsigned i = 0; i < count; i++) {
        do
            client_next(&plain_receivers[i], &got);
        while (got.type != SIGNAL || strcmp(got.member, "Tick"));
        check(got.body[bytes - 1], round);
    }
}

int main(int argc, char **argv) {
    if (argc != 7)
        die("usage: kdbusfs SOCKET NODE calls|message|memfd COUNT BYTES SECONDS");
    socket_path = argv[1];
    node = argv[2];
    bool calls = !strcmp(argv[3], "calls"), memfds = !strcmp(argv[3], "memfd");
    count = (unsigned)atoi(argv[4]);
    bytes = (size_t)atol(argv[5]);
    seconds = atof(argv[6]);
    if (count < 1 || count > MAX_COUNT || bytes < 8)
        die("count 1 to %d, bytes 8 or more", MAX_COUNT);
    stage_begin();
    sender = hello(false);
    if (calls) {
        repeat("read", read_page);
        repeat("write", write_byte);
        repeat("ioctl", free_nothing);
        stage_end();
    }
    client_connect(&plain_sender, socket_path);
    for (unsigned i = 0; i < count; i++) {
        receivers[i] = hello(memfds);
        client_connect(&plain_receivers[i], socket_path);
    }
    /* The body is one array of bytes, of which `bytes` with its length are the payload. */
    plain = template_new(SIGNAL, NO_REPLY_EXPECTED, count > 1 ? NULL : plain_receivers[0].unique,
                         "/org/kbusd/Bench", "org.kbusd.Bench", "Tick", "ay", bytes);
    argument_fill(plain.body, "ay", bytes - 4);
    if (memfds)
        repeat("memfd", by_memfd);
    if (count > 1)
        for (unsigned i = 0; i < count; i++)
            match_signals(&receivers[i]);
    repeat(memfds ? "vector" : "device", by_vector);
    if (count > 1)
        for (unsigned i = 0; i < count; i++) {
            munmap(receivers[i].pool, POOL); /* which holds the file, and so the match */
            close(receivers[i].fd);
            client_add_match(&plain_receivers[i], "type='signal',interface='org.kbusd.Bench'");
        }
    repeat("socket", by_socket);
    stage_end();
}
