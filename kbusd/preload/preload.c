/* libkbus-preload.so: what no ioctl can bring to a kdbus program.
 *
 *     LD_PRELOAD=.../libkbus-preload.so program
 *
 * The kernel of 2015 let a program map its pool and put descriptors into it. A server can't do the second,
 * and over CUSE not the first. So before a file's HELLO we name a socket (ATTACH, kbusd/kdbus/attach.py),
 * over which come the pool, which mmap(2) of the file then maps, and descriptors, whose numbers we tell
 * (INSTALLED) before RECV or SEND returns. Programs need not know.
 *
 * It runs in the client, with the client's rights, and protects nobody: kbusd believes nothing that it
 * says. It trusts the program that it is in, the kernel, and that whoever serves the file is the bus.
 * A file that is no kbusd's answers ATTACH with ENOTTY and is left alone.
 *
 * No libc is linked: `syscall`, `__errno_location`, `memcpy` and `memset` are the program's, glibc's or musl's.
 * System calls are made directly, not by way of other interposers. Nothing is allocated but at HELLO.
 *
 * Descriptors of ours, two for each file, stand high and are CLOEXEC; the program can't close them by
 * close(2). If it does so otherwise, that is seen, and its messages come with INCOMPLETE_FDS.
 * After fork(2) both processes have the file and its socket; descriptors go to who asks first, so two
 * that receive from one connection at the same time may lose some, as INCOMPLETE_FDS tells. A child of
 * vfork(2) shares our memory: until it calls execve(2) we do nothing for it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PUBLIC __attribute__((visibility("default")))

enum {
    MAX_FD = 65536, /* files with higher numbers are left alone */
    OURS_FROM = 512,
    MAX_FDS = 253, /* in one record; SCM_MAX_FD */
    STASH = 8,
    MAGIC = 0x95,
    HELLO = 0x80,
    SEND = 0x90,
    RECV = 0x91,
    SYNC_REPLY = 1,
    RECV_PEEK_OR_DROP = 3,
    INCOMPLETE_FDS = 1,
    POOL_RECORD = 1,
    FDS_RECORD = 2,
};

struct kbus_cmd_attach {
    uint64_t size, flags, return_flags, fd;
};
struct kbus_cmd_installed {
    uint64_t size, flags, return_flags, offset, count, numbers;
};
#define KBUS_CMD_ATTACH 0x402095f0u
#define KBUS_CMD_INSTALLED 0x403095f1u

struct cmd_send {
    uint64_t size, flags, return_flags, address, offset, reply_size, reply_flags;
};
struct cmd_recv {
    uint64_t size, flags, return_flags, priority, dropped, offset, message_size, message_flags;
};

/* Descriptors that have come, for the message at `offset`. */
struct record {
    uint64_t offset;
    int count, asked; /* there are; there should be. asked < 0: free */
    int fds[MAX_FDS];
};

/* A descriptor of ours, and what tells it from another of the same number. */
struct own {
    int fd;
    uint32_t device; /* of sockets and of memfds there is one each, so that its minor number will do */
    uint64_t inode;
};

struct file {
    int users; /* numbers that it has in the program, and threads that look at it */
    struct own sock, pool;
    struct record stash[STASH];
};

static struct file *files[MAX_FD];  /* by the program's numbers */
static struct file *owners[MAX_FD]; /* by ours */
static int some;                    /* whether there ever was one */
static int locked;
static int *alive; /* our pid, in a page that a child of fork finds empty, but one of vfork does not */

/* -- one thread at a time, without signals; false: not our memory ------------------------------- */

static int enter(uint64_t *signals)
{
    uint64_t all = ~(uint64_t)0;
    int pid = (int)syscall(SYS_getpid), was;
    while ((was = __atomic_load_n(alive, __ATOMIC_ACQUIRE)) != pid) {
        if (was != 0 && was != -pid)
            return 0;
        /* The first in a child of fork, where nobody holds the lock; the others wait. */
        if (was == 0 && __atomic_compare_exchange_n(alive, &was, -pid, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
            __atomic_store_n(&locked, 0, __ATOMIC_RELEASE);
            __atomic_store_n(alive, pid, __ATOMIC_RELEASE);
        }
    }
    syscall(SYS_rt_sigprocmask, SIG_BLOCK, &all, signals, sizeof *signals);
    while (__atomic_exchange_n(&locked, 1, __ATOMIC_ACQUIRE))
        syscall(SYS_sched_yield);
    return 1;
}

static void leave(uint64_t *signals)
{
    __atomic_store_n(&locked, 0, __ATOMIC_RELEASE);
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, signals, NULL, sizeof *signals);
}

static void *pages(size_t size)
{
#ifdef SYS_mmap2
    long got = syscall(SYS_mmap2, NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0L);
#else
    long got = syscall(SYS_mmap, NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0L);
#endif
    return got == -1 ? NULL : (void *)got;
}

/* Before anything else; false: no memory, or a kernel before 4.14. */
static int begin(void)
{
    int *page, *none = NULL;
    if (__atomic_load_n(&alive, __ATOMIC_ACQUIRE))
        return 1;
    page = pages(4096);
    if (!page || syscall(SYS_madvise, page, 4096, 18 /* MADV_WIPEONFORK */) < 0)
        return 0;
    *page = (int)syscall(SYS_getpid);
    if (!__atomic_compare_exchange_n(&alive, &none, page, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
        syscall(SYS_munmap, page, 4096);
    return 1;
}

/* -- descriptors of ours; the lock is held ------------------------------------------------------- */

/* Not fstat: it has another name in an older libc. */
static int look(int fd, struct statx *st)
{
    return (int)syscall(SYS_statx, fd, "", AT_EMPTY_PATH, STATX_INO, st);
}

static void own(struct file *file, struct own *own, int fd)
{
    struct statx st;
    int high = (int)syscall(SYS_fcntl, fd, F_DUPFD_CLOEXEC, OURS_FROM);
    if (high >= 0) {
        syscall(SYS_close, fd);
        fd = high;
    }
    if (fd >= MAX_FD || look(fd, &st) < 0) {
        syscall(SYS_close, fd);
        fd = -1;
    } else {
        own->device = st.stx_dev_minor;
        own->inode = st.stx_ino;
        owners[fd] = file;
    }
    own->fd = fd;
}

static int is_own(const struct own *own)
{
    struct statx st;
    return own->fd >= 0 && look(own->fd, &st) == 0 && st.stx_dev_minor == own->device && st.stx_ino == own->inode;
}

static void disown(struct own *own)
{
    if (own->fd < 0)
        return;
    owners[own->fd] = NULL;
    if (is_own(own))
        syscall(SYS_close, own->fd);
    own->fd = -1;
}

/* Whether the number is that of a descriptor of ours. */
static int ours(int fd)
{
    struct file *file = fd >= 0 && fd < MAX_FD ? owners[fd] : NULL;
    return file && ((file->sock.fd == fd && is_own(&file->sock)) || (file->pool.fd == fd && is_own(&file->pool)));
}

/* The program wants this number for something else. */
static void make_way(int fd)
{
    struct file *file = ours(fd) ? owners[fd] : NULL;
    if (!file)
        return;
    owners[fd] = NULL;
    own(file, file->sock.fd == fd ? &file->sock : &file->pool, fd);
}

/* -- files; the lock is held ---------------------------------------------------------------------- */

static void close_fds(struct record *record)
{
    for (int i = 0; i < record->count; i++)
        syscall(SYS_close, record->fds[i]);
    record->asked = -1;
    record->count = 0;
}

static void release(struct file *file)
{
    if (--file->users)
        return;
    for (int i = 0; i < STASH; i++)
        close_fds(&file->stash[i]);
    disown(&file->sock);
    disown(&file->pool);
    syscall(SYS_munmap, file, sizeof *file);
}

static void set(int fd, struct file *file)
{
    struct file *old;
    if (fd < 0 || fd >= MAX_FD)
        return;
    old = files[fd];
    files[fd] = file;
    if (file)
        file->users++;
    if (old)
        release(old);
}

static struct file *find(int fd)
{
    return fd >= 0 && fd < MAX_FD ? files[fd] : NULL;
}

static struct file *make(int sock)
{
    struct file *file = pages(sizeof *file);
    if (!file)
        return NULL;
    for (int i = 0; i < STASH; i++)
        file->stash[i].asked = -1;
    file->pool.fd = -1;
    own(file, &file->sock, sock);
    return file;
}

/* Where to put a record: over one of the same slice, which was never asked for; else where is room. */
static struct record *room(struct file *file, uint64_t offset)
{
    struct record *free = NULL;
    for (int i = 0; i < STASH; i++) {
        struct record *each = &file->stash[i];
        if (each->asked >= 0 && each->offset == offset) {
            close_fds(each);
            return each;
        }
        if (each->asked < 0)
            free = each;
    }
    return free;
}

/* Read all that has come. Returns false if a record waits for room. */
static int drain(struct file *file)
{
    union {
        char bytes[CMSG_SPACE(MAX_FDS * sizeof(int))];
        struct cmsghdr align;
    } control;
    for (;;) {
        uint64_t head[3] = {0, 0, 0};
        struct iovec part = {head, sizeof head};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
        struct cmsghdr *rights;
        struct record *into, lost;
        long got;
        if (!is_own(&file->sock))
            return 1;
        got = syscall(SYS_recvmsg, file->sock.fd, &message, MSG_PEEK | MSG_DONTWAIT);
        if (got < (long)(2 * sizeof *head))
            return 1;
        into = &lost;
        if (head[0] == FDS_RECORD && !(into = room(file, head[1])))
            return 0;
        message.msg_control = control.bytes;
        message.msg_controllen = sizeof control.bytes;
        if (syscall(SYS_recvmsg, file->sock.fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) != got)
            return 1;
        into->count = 0;
        rights = CMSG_FIRSTHDR(&message);
        if (rights && rights->cmsg_level == SOL_SOCKET && rights->cmsg_type == SCM_RIGHTS) {
            into->count = (int)((rights->cmsg_len - CMSG_LEN(0)) / sizeof(int));
            memcpy(into->fds, CMSG_DATA(rights), into->count * sizeof(int));
        }
        if (head[0] == FDS_RECORD) {
            into->offset = head[1];
            into->asked = head[2] <= MAX_FDS ? (int)head[2] : 0;
        } else if (head[0] == POOL_RECORD && into->count == 1) {
            disown(&file->pool);
            own(file, &file->pool, into->fds[0]);
        } else {
            close_fds(into);
        }
    }
}

/* -- what the program calls ------------------------------------------------------------------------ */

static int call(int fd, unsigned int command, void *argument)
{
    return (int)syscall(SYS_ioctl, fd, command, argument);
}

/* Name a socket, unless it is done. */
static void attach(int fd)
{
    struct kbus_cmd_attach command = {sizeof command, 0, 0, 0};
    uint64_t signals;
    struct file *file;
    int pair[2];
    if (fd < 0 || fd >= MAX_FD || !begin() ||
        syscall(SYS_socketpair, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        return;
    command.fd = (uint64_t)pair[1];
    if (call(fd, KBUS_CMD_ATTACH, &command) < 0) {
        syscall(SYS_close, pair[0]); /* no kbusd, or a HELLO that failed before */
    } else if (!enter(&signals)) {
        syscall(SYS_close, pair[0]);
    } else {
        file = make(pair[0]);
        if (file)
            set(fd, file);
        else
            syscall(SYS_close, pair[0]);
        __atomic_store_n(&some, 1, __ATOMIC_RELEASE);
        leave(&signals);
    }
    syscall(SYS_close, pair[1]);
}

/* A file that is ours, to be let go of by `done`; NULL: none, and no lock is held. */
static struct file *use(int fd)
{
    uint64_t signals;
    struct file *file;
    if (!__atomic_load_n(&some, __ATOMIC_ACQUIRE) || !enter(&signals))
        return NULL;
    file = find(fd);
    if (file)
        file->users++;
    leave(&signals);
    return file;
}

static void done(struct file *file)
{
    uint64_t signals;
    if (!enter(&signals))
        return;
    release(file);
    leave(&signals);
}

static void fetch_pool(int fd)
{
    struct file *file = use(fd);
    uint64_t signals;
    if (!file)
        return;
    if (enter(&signals)) {
        drain(file);
        leave(&signals);
    }
    done(file);
}

/* A message is shown: tell the numbers of its descriptors, if it brought some. */
static void install(int fd, uint64_t offset, uint64_t *flags)
{
    struct file *file = use(fd);
    struct record mine = {.asked = -1};
    uint64_t signals;
    int all = 0;
    if (!file)
        return;
    while (!all && mine.asked < 0 && enter(&signals)) {
        all = drain(file);
        for (int i = 0; i < STASH && mine.asked < 0; i++)
            if (file->stash[i].asked >= 0 && file->stash[i].offset == offset) {
                mine = file->stash[i];
                file->stash[i].asked = -1;
                file->stash[i].count = 0;
            }
        if (!all && mine.asked < 0) /* whose threads have gone, or are not here yet */
            close_fds(&file->stash[0]);
        leave(&signals);
    }
    if (mine.asked > 0) {
        struct kbus_cmd_installed command = {
            sizeof command, 0, 0, offset, (uint64_t)mine.asked, (uintptr_t)mine.fds};
        for (int i = mine.count; i < mine.asked; i++)
            mine.fds[i] = -1; /* the process has as many as it may */
        if (call(fd, KBUS_CMD_INSTALLED, &command) < 0) {
            close_fds(&mine);
            mine.count = 0;
        }
        if (mine.count < mine.asked || mine.asked < 0)
            *flags |= INCOMPLETE_FDS;
    }
    done(file);
}

/* `unsigned long` in glibc, `int` in musl: the kernel looks at 32 bits. */
PUBLIC int ioctl(int fd, unsigned long request, ...)
{
    unsigned int command = (unsigned int)request;
    va_list rest;
    void *argument;
    int was = errno, result;
    va_start(rest, request);
    argument = va_arg(rest, void *);
    va_end(rest);
    if ((command >> 8 & 0xff) != MAGIC)
        return call(fd, command, argument);
    if ((command & 0xff) == HELLO) {
        attach(fd);
        errno = was;
    }
    result = call(fd, command, argument);
    if (result < 0)
        return result;
    switch (command & 0xff) {
    case HELLO:
        fetch_pool(fd);
        break;
    case SEND: {
        struct cmd_send *send = argument;
        if (send->flags & SYNC_REPLY && send->reply_size)
            install(fd, send->offset, &send->reply_flags);
        break;
    }
    case RECV: {
        struct cmd_recv *recv = argument;
        if (!(recv->flags & RECV_PEEK_OR_DROP))
            install(fd, recv->offset, &recv->message_flags);
        break;
    }
    }
    errno = was;
    return result;
}

static void *map(void *at, size_t size, int protection, int flags, int fd, int64_t offset)
{
    struct file *file = fd >= 0 && !(flags & MAP_ANONYMOUS) ? use(fd) : NULL;
    int was = errno;
    long got;
    if (file && is_own(&file->pool))
        fd = file->pool.fd;
    errno = was;
#ifdef SYS_mmap2
    got = syscall(SYS_mmap2, at, size, protection, flags, fd, (long)(offset >> 12));
#else
    got = syscall(SYS_mmap, at, size, protection, flags, fd, (long)offset);
#endif
    if (file) {
        was = errno;
        done(file);
        errno = was;
    }
    return (void *)got;
}

PUBLIC void *mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset)
{
    return map(at, size, protection, flags, fd, offset);
}

PUBLIC void *mmap64(void *at, size_t size, int protection, int flags, int fd, int64_t offset)
{
    return map(at, size, protection, flags, fd, offset);
}

PUBLIC int close(int fd)
{
    uint64_t signals;
    int was = errno, mine = 0;
    if (__atomic_load_n(&some, __ATOMIC_ACQUIRE) && enter(&signals)) {
        mine = ours(fd);
        if (!mine)
            set(fd, NULL); /* before another thread can be given the number */
        leave(&signals);
    }
    errno = was;
    if (mine) {
        errno = EBADF;
        return -1;
    }
    return (int)syscall(SYS_close, fd);
}

/* `fd` has another number, too. */
static int also(int fd, int number)
{
    uint64_t signals;
    int was = errno;
    if (number >= 0 && number != fd && __atomic_load_n(&some, __ATOMIC_ACQUIRE) && enter(&signals)) {
        set(number, find(fd));
        leave(&signals);
    }
    errno = was;
    return number;
}

static void want(int number)
{
    uint64_t signals;
    int was = errno;
    if (__atomic_load_n(&some, __ATOMIC_ACQUIRE) && enter(&signals)) {
        make_way(number);
        leave(&signals);
    }
    errno = was;
}

PUBLIC int dup(int fd)
{
    return also(fd, (int)syscall(SYS_dup, fd));
}

PUBLIC int dup3(int fd, int number, int flags)
{
    want(number);
    return also(fd, (int)syscall(SYS_dup3, fd, number, flags));
}

PUBLIC int dup2(int fd, int number)
{
    if (fd == number)
        return syscall(SYS_fcntl, fd, F_GETFD) < 0 ? -1 : fd;
    return dup3(fd, number, 0);
}

#ifdef __LP64__ /* elsewhere a libc does more than to pass it on */
PUBLIC int fcntl(int fd, int command, ...)
{
    va_list rest;
    long argument;
    int result;
    va_start(rest, command);
    argument = va_arg(rest, long);
    va_end(rest);
    result = (int)syscall(SYS_fcntl, fd, command, argument);
    return command == F_DUPFD || command == F_DUPFD_CLOEXEC ? also(fd, result) : result;
}

PUBLIC int fcntl64(int, int, ...) __attribute__((alias("fcntl")));
#endif
