/* An ioctl of a FUSE file that is answered at once, without a bus: `fuse SECONDS`. What kdbusfs could
 * reach if nothing in it took any time; the rest is the kernel's, and where it lets processes run.
 *
 * - "alone": who has /dev/fuse open answers;
 * - "passed on": as in kdbusfs, he passes the request to a process that is not trusted with that, over a
 *   socket, and answers with what comes back.
 *
 * All of them sleep till there is something to do. Root's, as it mounts something, in a namespace of its own.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "client.h"
#include "stage.h"

enum { REQUEST = (128 << 10) + 4096 };
#define COMMAND _IOW(0x95, 0x83, uint64_t[4]) /* as long as kdbus's FREE */

static void need(bool so, const char *what) {
    if (!so)
        die("%s: %s", what, strerror(errno));
}

/* A record of the reply to what has been read; none to what wants no answer. */
static size_t answer(const struct fuse_in_header *asked, uint8_t *reply) {
    struct fuse_out_header *head = (struct fuse_out_header *)reply;
    void *body = head + 1;
    size_t size = 0;
    head->unique = asked->unique;
    head->error = 0;
    memset(body, 0, 256);
    switch (asked->opcode) {
    case FUSE_INIT:
        *(struct fuse_init_out *)body = (struct fuse_init_out){.major = 7, .minor = 31, .max_write = 4096};
        size = sizeof(struct fuse_init_out);
        break;
    case FUSE_GETATTR:
        ((struct fuse_attr_out *)body)->attr = (struct fuse_attr){.ino = 1, .mode = S_IFREG | 0600, .nlink = 1};
        size = sizeof(struct fuse_attr_out);
        break;
    case FUSE_OPEN:
        size = sizeof(struct fuse_open_out);
        break;
    case FUSE_IOCTL:
        ((struct fuse_ioctl_out *)body)->result = -ENXIO;
        size = sizeof(struct fuse_ioctl_out);
        break;
    case FUSE_FORGET:
        return 0;
    default:
        head->error = -ENOSYS;
    }
    head->len = (uint32_t)(sizeof *head + size);
    return head->len;
}

static _Noreturn void behind(int line) {
    static uint8_t request[REQUEST], reply[512];
    while (recv(line, request, sizeof request, 0) > 0)
        need(send(line, reply, answer((struct fuse_in_header *)request, reply), 0) > 0, "send");
    exit(0);
}

/* With a `line`, that is where ioctls are answered. */
static _Noreturn void serve(int fuse, int line) {
    static uint8_t request[REQUEST], reply[512];
    for (;;) {
        ssize_t size = read(fuse, request, sizeof request);
        if (size < 0 && (errno == ENOENT || errno == EINTR))
            continue;
        if (size < 0 && errno == ENODEV)
            pause(); /* it was unmounted; stage_end() ends us */
        need(size > 0, "read of /dev/fuse");
        size_t length;
        if (line >= 0 && ((struct fuse_in_header *)request)->opcode == FUSE_IOCTL) {
            need(send(line, request, (size_t)size, 0) == size, "send");
            length = (size_t)recv(line, reply, sizeof reply, 0);
        } else
            length = answer((struct fuse_in_header *)request, reply);
        need(!length || write(fuse, reply, length) == (ssize_t)length, "write to /dev/fuse");
    }
}

static void measure(const char *phase, const char *path, bool passed_on, double seconds) {
    char options[128];
    int line[2] = {-1, -1};
    int fuse = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    need(fuse >= 0, "/dev/fuse");
    snprintf(options, sizeof options, "fd=%d,rootmode=100600,user_id=0,group_id=0", fuse);
    need(!mount("fuse", path, "fuse", MS_NOSUID | MS_NODEV, options), "mount");
    if (passed_on) {
        need(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, line), "socketpair");
        if (!stage_fork())
            behind(line[1]);
    }
    if (!stage_fork())
        serve(fuse, line[0]);
    int file = open(path, O_RDWR | O_CLOEXEC);
    need(file >= 0, path);
    static struct histogram times;
    uint64_t calls = 0, elapsed = 0, argument[4] = {sizeof argument};
    for (int warm = 1; warm >= 0; warm--) {
        if (!warm)
            stage_ready(phase);
        memset(&times, 0, sizeof times);
        uint64_t begin = now_ns(), end = begin + (uint64_t)(seconds * 1e9 / (warm ? 8 : 1)), now = begin, last;
        for (calls = 0; now < end; calls++) {
            last = now;
            need(ioctl(file, COMMAND, argument) < 0 && errno == ENXIO, "ioctl");
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
    close(file);
    need(!umount2(path, MNT_DETACH), "umount");
}

int main(int argc, char **argv) {
    char path[] = "/tmp/kbusd-fuse-XXXXXX";
    if (argc != 2)
        die("usage: fuse SECONDS");
    stage_begin();
    need(!unshare(CLONE_NEWNS) && !mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL), "a mount namespace");
    need(mkstemp(path) >= 0, path);
    measure("alone", path, false, atof(argv[1]));
    measure("passed on", path, true, atof(argv[1]));
    unlink(path);
    stage_end();
}
