/* Method calls: `calls SOCKET PAIRS WINDOW BYTES SIGNATURE SECONDS`.
 *
 * Each pair is an echo service that owns a well-known name and a caller that keeps WINDOW calls
 * in flight, each with one argument of BYTES bytes that comes back in the reply. Window 1 is
 * the round trip, pairs > 1 shows whether the bus scales. Latency is from before the call's
 * sendmsg until its reply is parsed.
 *
 * With a window above 1, WINDOW messages must fit the sockets' buffers: two blocking sides that
 * both write would wait for ever (100 messages of 200 B do).
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "calling.h"

static const char *socket_path, *signature;
static unsigned window;
static pid_t run_id;
static size_t bytes;

/* A new one in each run: that of the last may still be somebody's who was killed just now. */
static void service_name(char *out, size_t size, int pair) {
    snprintf(out, size, "org.kbusd.Bench.Echo%d_%d", pair, (int)run_id);
}

static void call_repeatedly(int pair, double seconds, struct outcome *outcome) {
    struct client client;
    char name[64];
    service_name(name, sizeof name, pair);
    client_connect(&client, socket_path);
    struct template call = echo_call(name, signature, bytes);
    run(&client, &call, window, seconds / 8, outcome); /* warm: caches, routes, introductions */
    stage_reached();
    stage_await_go();
    run(&client, &call, window, seconds, outcome);
    stage_reached();
    stage_await_go();
}

int main(int argc, char **argv) {
    if (argc != 7)
        die("usage: calls SOCKET PAIRS WINDOW BYTES SIGNATURE SECONDS");
    socket_path = argv[1];
    int pairs = atoi(argv[2]);
    window = (unsigned)atoi(argv[3]);
    bytes = (size_t)atol(argv[4]);
    signature = argv[5];
    double seconds = atof(argv[6]);
    if (pairs < 1 || pairs > 64 || window < 1 || window > MAX_WINDOW)
        die("pairs 1 to 64, window 1 to %d", MAX_WINDOW);
    run_id = getpid();
    stage_begin();
    struct outcome *outcomes = shared_memory((size_t)pairs * sizeof *outcomes);
    for (int pair = 0; pair < pairs; pair++)
        if (!stage_fork()) {
            char name[64];
            service_name(name, sizeof name, pair);
            serve(socket_path, name);
        }
    stage_wait(pairs);
    for (int pair = 0; pair < pairs; pair++)
        if (!stage_fork()) {
            call_repeatedly(pair, seconds, &outcomes[pair]);
            return 0;
        }
    stage_wait(pairs);
    stage_ready("calls");
    stage_go(pairs);
    stage_wait(pairs);
    double rate = 0;
    uint64_t calls = 0;
    struct histogram *all = calloc(1, sizeof *all);
    for (int pair = 0; pair < pairs; pair++) {
        calls += outcomes[pair].calls;
        rate += (double)outcomes[pair].calls / ((double)outcomes[pair].elapsed_ns / 1e9);
        histogram_merge(all, &outcomes[pair].latency);
    }
    stage_result("{\"calls\": %llu, \"per_second\": %.2f, \"us_per_call\": %.3f, "
                 "\"p50_us\": %.3f, \"p99_us\": %.3f, \"mean_us\": %.3f, \"mb_per_second\": %.3f}",
                 (unsigned long long)calls, rate, 1e6 / rate, histogram_quantile_us(all, 0.5),
                 histogram_quantile_us(all, 0.99), histogram_mean_us(all),
                 rate * (double)bytes / 1e6);
    stage_end();
}
