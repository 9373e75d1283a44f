/* See stage.h. */
#define _GNU_SOURCE
#include "stage.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "client.h"

static int reached_pipe[2], go_pipe[2];
static pid_t children[1024];
static int child_count;

static int bucket_of(uint64_t ns) {
    if (ns < HISTOGRAM_SUB)
        return (int)ns;
    int shift = 63 - __builtin_clzll(ns) - 8; /* keeps nine significant bits */
    int bucket = (shift + 1) * HISTOGRAM_SUB + (int)((ns >> shift) & (HISTOGRAM_SUB - 1));
    return bucket < HISTOGRAM_BUCKETS ? bucket : HISTOGRAM_BUCKETS - 1;
}

/* The middle of the bucket. */
static double value_of(int bucket) {
    if (bucket < HISTOGRAM_SUB)
        return bucket;
    int shift = bucket / HISTOGRAM_SUB - 1;
    return ((double)(HISTOGRAM_SUB + bucket % HISTOGRAM_SUB) + 0.5) * (double)(1ull << shift);
}

void histogram_add(struct histogram *histogram, uint64_t ns) {
    histogram->count++;
    histogram->sum += ns;
    histogram->buckets[bucket_of(ns)]++;
}

void histogram_merge(struct histogram *into, const struct histogram *from) {
    into->count += from->count;
    into->sum += from->sum;
    for (int i = 0; i < HISTOGRAM_BUCKETS; i++)
        into->buckets[i] += from->buckets[i];
}

double histogram_quantile_us(const struct histogram *histogram, double quantile) {
    uint64_t rank = (uint64_t)(quantile * (double)histogram->count), seen = 0;
    for (int i = 0; i < HISTOGRAM_BUCKETS; i++) {
        seen += histogram->buckets[i];
        if (seen > rank)
            return value_of(i) / 1000;
    }
    return 0;
}

double histogram_mean_us(const struct histogram *histogram) {
    return histogram->count ? (double)histogram->sum / (double)histogram->count / 1000 : 0;
}

void *shared_memory(size_t size) {
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED)
        die("mmap: %s", strerror(errno));
    return memory;
}

static void child_ended(int signal) {
    (void)signal;
    static const char text[] = "bench client: a process of the benchmark ended too early\n";
    if (write(2, text, sizeof text - 1) < 0)
        _exit(2);
    _exit(1);
}

void stage_begin(void) {
    /* A pipe's ends stay open in everyone: the children die by PDEATHSIG, not by EOF. */
    if (pipe(reached_pipe) || pipe(go_pipe))
        die("pipe: %s", strerror(errno));
    signal(SIGCHLD, child_ended);
}

pid_t stage_fork(void) {
    pid_t parent = getpid(), pid = fork();
    if (pid < 0)
        die("fork: %s", strerror(errno));
    if (pid) {
        children[child_count++] = pid;
        return pid;
    }
    signal(SIGCHLD, SIG_DFL);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(1);
    return 0;
}

static void bytes_out(int fd, int count) {
    static const char zeros[1024];
    if (write(fd, zeros, (size_t)count) != count)
        die("write to a pipe: %s", strerror(errno));
}

static void bytes_in(int fd, int count) {
    char buffer[1024];
    while (count) {
        ssize_t got = read(fd, buffer, (size_t)count);
        if (got <= 0)
            die("read from a pipe: %s", strerror(errno));
        count -= (int)got;
    }
}

void stage_reached(void) { bytes_out(reached_pipe[1], 1); }
void stage_wait(int count) { bytes_in(reached_pipe[0], count); }
void stage_await_go(void) { bytes_in(go_pipe[0], 1); }
void stage_go(int count) { bytes_out(go_pipe[1], count); }

static void await_harness(void) {
    int byte;
    while ((byte = getchar()) != '\n')
        if (byte == EOF)
            _exit(1);
}

void stage_ready(const char *name) {
    printf("ready %s\n", name);
    fflush(stdout);
    await_harness();
}

void stage_result(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
    fflush(stdout);
    await_harness();
}

void stage_end(void) {
    signal(SIGCHLD, SIG_DFL);
    for (int i = 0; i < child_count; i++)
        kill(children[i], SIGKILL);
    for (int i = 0; i < child_count; i++)
        waitpid(children[i], NULL, 0);
    exit(0);
}
