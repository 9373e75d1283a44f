/* A kdbus program as one of 2015 was written: it knows nothing of kbusd, nor of sockets. For tests.
 *
 *     program NODE sync|async [dup|fork|threads|closeall]
 *
 * Connection B gets a message from A with a sealed memfd and the writing end of a pipe; `sync`: as the
 * reply to a call. Printed: what B's return_flags say, what is in the memfd, what came through the pipe.
 *
 * dup: B's file has another number by then; fork: a child of the process receives; closeall: the program
 * has closed all numbers that it does not know. threads: four connections, each with its own thread, a
 * hundred messages each. Exit status 1: a call failed, which is printed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define POOL (1 << 20)
#define TEXT "in a memfd"

struct hello { uint64_t size, flags, ret, send, recv, bus_flags, id, pool, offset, items; uint8_t uuid[16]; };
struct send { uint64_t size, flags, ret, message, offset, reply_size, reply_flags; };
struct recv { uint64_t size, flags, ret; int64_t priority; uint64_t dropped, offset, message_size, message_flags; };
struct freed { uint64_t size, flags, ret, offset; };
struct message { uint64_t size, flags; int64_t priority; uint64_t dst, src, type, cookie, reply; };
struct memfd { uint64_t size, type, start, length; int32_t fd; uint32_t pad; };
struct fds { uint64_t size, type; int32_t fd[2]; };
struct both { struct message head; struct memfd memfd; struct fds fds; };

#define HELLO _IOWR(0x95, 0x80, struct hello)
#define FREE _IOW(0x95, 0x83, struct freed)
#define SEND _IOW(0x95, 0x90, struct send)
#define RECV _IOR(0x95, 0x91, struct recv)

struct connection { int fd; uint64_t id; char *pool; };

static void need(int true, const char *what)
{
    if (!true) {
        printf("%s: %s\n", what, strerror(errno));
        fflush(stdout);
        _exit(1);
    }
}

static struct connection hello(const char *node)
{
    struct hello command = {.size = sizeof command, .flags = 1, .pool = POOL};
    struct connection made = {.fd = open(node, O_RDWR | O_CLOEXEC)};
    need(made.fd >= 0, "open");
    errno = 77;
    need(ioctl(made.fd, HELLO, &command) == 0, "HELLO");
    need(errno == 77, "errno");
    made.id = command.id;
    made.pool = mmap(NULL, POOL, PROT_READ, MAP_SHARED, made.fd, 0);
    need(made.pool != MAP_FAILED, "mmap");
    return made;
}

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static void give(struct connection *from, uint64_t to, int memfd, int fd, uint64_t cookie, uint64_t reply)
{
    struct both message = {
        {sizeof message - 4, 0, 0, to, 0, 0x1234, cookie, reply},
        {40, 4, 0, sizeof TEXT, memfd, 0},
        {20, 5, {fd, 0}},
    };
    struct send command = {.size = sizeof command, .message = (uintptr_t)&message};
    need(ioctl(from->fd, SEND, &command) == 0, "SEND");
}

static struct recv take(struct connection *at)
{
    struct recv command = {.size = sizeof command};
    struct pollfd waits = {at->fd, POLLIN, 0};
    need(poll(&waits, 1, 10000) == 1, "poll");
    need(ioctl(at->fd, RECV, &command) == 0, "RECV");
    return command;
}

static void let_go(struct connection *at, uint64_t offset)
{
    struct freed command = {sizeof command, 0, 0, offset};
    need(ioctl(at->fd, FREE, &command) == 0, "FREE");
}

/* Writes the memfd's text, or else the bytes that came, into the descriptor that came; closes both. */
static void look(struct connection *at, uint64_t offset, uint64_t flags, int tell)
{
    struct message *head = (void *)(at->pool + offset);
    char *item = (char *)(head + 1), *end = (char *)head + head->size;
    char text[64] = "", *from = NULL;
    int fd = -2, memfd = -2;
    for (; item < end; item += (*(uint64_t *)item + 7) & ~7ull) {
        uint64_t *it = (uint64_t *)item;
        if (it[1] == 3) /* PAYLOAD_OFF */
            memcpy(text, (char *)head + it[3], it[2]);
        if (it[1] == 4)
            memfd = ((struct memfd *)item)->fd;
        if (it[1] == 5)
            fd = ((struct fds *)item)->fd[0];
    }
    if (memfd >= 0) {
        from = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, memfd, 0);
        need(from != MAP_FAILED, "mmap of the memfd");
        strcpy(text, from);
        munmap(from, 4096);
        need(fcntl(memfd, F_GETFD) == FD_CLOEXEC, "CLOEXEC");
        close(memfd);
    }
    if (tell)
        printf("flags %d, %s \"%s\", fd %s\n", (int)flags, memfd == -2 ? "bytes" : memfd < 0 ? "no memfd" : "memfd",
               text, fd < 0 ? "none" : "there");
    fflush(stdout);
    if (fd >= 0) {
        need(write(fd, text, strlen(text)) > 0, "write");
        close(fd);
    }
    let_go(at, offset);
}

static const char *node;
static int sealed;

static void *many(void *argument)
{
    struct connection a = hello(node), b = hello(node);
    (void)argument;
    for (int i = 0; i < 100; i++) {
        int ends[2];
        char text[64] = "";
        struct recv got;
        need(pipe2(ends, O_CLOEXEC) == 0, "pipe");
        give(&a, b.id, sealed, ends[1], 1, 0);
        close(ends[1]);
        got = take(&b);
        look(&b, got.offset, got.message_flags, 0);
        need(read(ends[0], text, sizeof text) > 0 && !strcmp(text, TEXT), "through the pipe");
        close(ends[0]);
    }
    close(a.fd);
    close(b.fd);
    return NULL;
}

static struct connection answers;
static int answer[2];

static void *serve(void *argument)
{
    struct recv call = take(&answers);
    struct message *head = (void *)(answers.pool + call.offset);
    (void)argument;
    give(&answers, head->src, answer[0], answer[1], 1, head->cookie);
    return NULL;
}

int main(int argc, char **argv)
{
    const char *how = argc > 3 ? argv[3] : "";
    int sync = !strcmp(argv[2], "sync"), ends[2], status = 0;
    struct connection a, b;
    char text[64] = "";
    node = argv[1];
    sealed = memfd_create("program", MFD_ALLOW_SEALING | MFD_CLOEXEC);
    need(write(sealed, TEXT, sizeof TEXT) == sizeof TEXT, "write");
    need(fcntl(sealed, F_ADD_SEALS, 0xf) == 0, "seal");
    if (!strcmp(how, "threads")) {
        pthread_t threads[4];
        for (int i = 0; i < 4; i++)
            pthread_create(&threads[i], NULL, many, NULL);
        for (int i = 0; i < 4; i++)
            pthread_join(threads[i], NULL);
        printf("all 400\n");
        return 0;
    }
    need(pipe2(ends, O_CLOEXEC) == 0, "pipe");
    a = hello(node);
    b = hello(node);
    if (!strcmp(how, "dup")) {
        int other = dup2(b.fd, 300);
        close(b.fd);
        b.fd = fcntl(other, F_DUPFD_CLOEXEC, 3);
        close(other);
    }
    if (!strcmp(how, "closeall"))
        for (int fd = 3; fd < 1024; fd++)
            if (fd != a.fd && fd != b.fd && fd != sealed && fd != ends[0] && fd != ends[1])
                close(fd);
    if (!strcmp(how, "fork") && fork()) {
        close(ends[1]);
        wait(&status);
        return WEXITSTATUS(status);
    }
    if (sync) {
        struct message message = {sizeof message, 1, 0, a.id, 0, 0x1234, 7, now() + 10000000000ull};
        struct send command = {sizeof command, 1, 0, (uintptr_t)&message, 0, 0, 0};
        pthread_t server;
        answers = a;
        answer[0] = sealed;
        answer[1] = ends[1];
        pthread_create(&server, NULL, serve, NULL);
        need(ioctl(b.fd, SEND, &command) == 0, "call");
        pthread_join(server, NULL);
        close(ends[1]);
        look(&b, command.offset, command.reply_flags, 1);
    } else {
        struct recv got;
        give(&a, b.id, sealed, ends[1], 1, 0);
        close(ends[1]);
        got = take(&b);
        look(&b, got.offset, got.message_flags, 1);
    }
    need(read(ends[0], text, sizeof text - 1) >= 0, "read");
    printf("through the pipe: %s\n", text);
    return 0;
}
