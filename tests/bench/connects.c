/* Connect, authenticate, Hello, close: `connects SOCKET SPACED PAUSE_MS SEQUENTIAL`.
 *
 * Phase "spaced": SPACED connections, with a pause after each, as programs start on a quiet
 * machine. Phase "sustained": SEQUENTIAL connections one right after the other. A connection's
 * time ends with the reply to Hello; the rate of "sustained" includes the closing.
 */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "client.h"
#include "stage.h"

static void run(const char *name, const char *path, int count, long pause_ms) {
    struct histogram *latency = calloc(1, sizeof *latency);
    struct timespec pause = {pause_ms / 1000, pause_ms % 1000 * 1000000};
    stage_ready(name);
    uint64_t begin = now_ns();
    for (int i = 0; i < count; i++) {
        struct client client;
        uint64_t before = now_ns();
        client_connect(&client, path);
        histogram_add(latency, now_ns() - before);
        client_close(&client);
        if (pause_ms)
            nanosleep(&pause, NULL);
    }
    double seconds = (double)(now_ns() - begin) / 1e9;
    stage_result("{\"connects\": %d, \"per_second\": %.2f, \"ms_per_connect\": %.4f, "
                 "\"p50_us\": %.3f, \"p99_us\": %.3f, \"mean_us\": %.3f}",
                 count, count / seconds, seconds * 1e3 / count,
                 histogram_quantile_us(latency, 0.5), histogram_quantile_us(latency, 0.99),
                 histogram_mean_us(latency));
    free(latency);
}

int main(int argc, char **argv) {
    if (argc != 5)
        die("usage: connects SOCKET SPACED PAUSE_MS SEQUENTIAL");
    stage_begin();
    run("spaced", argv[1], atoi(argv[2]), atol(argv[3]));
    run("sustained", argv[1], atoi(argv[4]), 0);
    stage_end();
}
