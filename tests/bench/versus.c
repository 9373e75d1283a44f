/* Method calls on two buses in turns: `versus SOCKET OTHER WINDOW BYTES SIGNATURE SECONDS`.
 *
 * For figures that differ by a few percent where the machine's speed changes by more from one
 * second to the next: both buses and their clients are there all the time, a slice of calls on
 * the one is followed by a slice on the other, in the order ABBA, and what counts is the median
 * of the ratios of neighbours. SECONDS is for both together.
 */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "calling.h"

#define SLICE_SECONDS 0.008
enum { MAX_PAIRS = 4096 };

static int ascending(const void *left, const void *right) {
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

int main(int argc, char **argv) {
    char name[64];
    static struct client clients[2];
    static struct outcome outcome;
    static double ratios[MAX_PAIRS];
    if (argc != 7)
        die("usage: versus SOCKET OTHER WINDOW BYTES SIGNATURE SECONDS");
    unsigned window = (unsigned)atoi(argv[3]);
    size_t bytes = (size_t)atol(argv[4]);
    int pairs = (int)(atof(argv[6]) / SLICE_SECONDS / 2) + 1;
    if (window < 1 || window > MAX_WINDOW || pairs > MAX_PAIRS)
        die("window 1 to %d, at most %d pairs of slices", MAX_WINDOW, MAX_PAIRS);
    snprintf(name, sizeof name, "org.kbusd.Bench.Versus%d", (int)getpid()); /* as in calls.c */
    stage_begin();
    for (int bus = 0; bus < 2; bus++)
        if (!stage_fork())
            serve(argv[1 + bus], name);
    stage_wait(2);
    struct template call = echo_call(name, argv[5], bytes);
    for (int bus = 0; bus < 2; bus++) {
        client_connect(&clients[bus], argv[1 + bus]);
        run(&clients[bus], &call, window, 4 * SLICE_SECONDS, &outcome); /* warm */
    }
    stage_ready("versus");
    uint64_t calls = 0;
    for (int pair = 0; pair < pairs; pair++) {
        double rate[2];
        for (int turn = 0; turn < 2; turn++) {
            int bus = (pair + turn) % 2;
            run(&clients[bus], &call, window, SLICE_SECONDS, &outcome);
            rate[bus] = (double)outcome.calls / (double)outcome.elapsed_ns;
            calls += outcome.calls;
        }
        ratios[pair] = rate[0] / rate[1];
    }
    qsort(ratios, (size_t)pairs, sizeof *ratios, ascending);
    stage_result("{\"calls\": %llu, \"throughput_ratio\": %.4f, \"lower_quartile\": %.4f, "
                 "\"upper_quartile\": %.4f}",
                 (unsigned long long)calls, ratios[pairs / 2], ratios[pairs / 4],
                 ratios[pairs * 3 / 4]);
    stage_end();
}
