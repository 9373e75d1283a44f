/* What the measuring programs share: phases in step with the harness, child processes that
 * never outlive the run, and a histogram.
 *
 * A program prints "ready NAME", waits for a line on stdin, measures, prints one line of JSON,
 * waits for a line again (the harness reads the CPU time of all processes meanwhile, so nothing
 * may end before), and goes on to its next phase or exits 0.
 */
#pragma once

#include <stdint.h>
#include <sys/types.h>

/* Log-linear: 256 buckets for each power of two, so a value is known to 0.4 %. */
enum { HISTOGRAM_SUB = 256, HISTOGRAM_BUCKETS = 40 * HISTOGRAM_SUB };

struct histogram {
    uint64_t count, sum;
    uint32_t buckets[HISTOGRAM_BUCKETS];
};

void histogram_add(struct histogram *, uint64_t ns);
void histogram_merge(struct histogram *into, const struct histogram *from);
double histogram_quantile_us(const struct histogram *, double quantile);
double histogram_mean_us(const struct histogram *);

void *shared_memory(size_t size); /* zeroed; shared with the children forked later */

/* As fork(): the child dies with us, and its end before stage_end() ends us with 1. */
pid_t stage_fork(void);
/* For children: tell the parent that a milestone is reached. For the parent: wait for `count`. */
void stage_reached(void);
void stage_wait(int count);
/* For children: block until the parent's n-th stage_go(). */
void stage_await_go(void);
void stage_go(int children);
/* For the parent: one phase's talk with the harness. */
void stage_ready(const char *name);
void stage_result(const char *format, ...) __attribute__((format(printf, 1, 2)));
_Noreturn void stage_end(void);
void stage_begin(void); /* first of all, in the parent */
