/* One signal to many: `fanout SOCKET SUBSCRIBERS WINDOW BYTES SECONDS`.
 *
 * An emitter and SUBSCRIBERS processes, each with one match rule. Nothing may queue without
 * bound, or the figure would be that of a memory allocator: the emitter sends bursts of WINDOW/2
 * signals and is never more than two bursts ahead of the slowest subscriber, which it learns
 * through a page of shared memory and a futex, so that nothing but the bus is between them.
 *
 * Phase "saturated": deliveries a second, and the latency under that load. Phase "single": one
 * signal at a time, until all have it: the latency when there is no queue. Each subscriber
 * checks that it sees every signal once and in order.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "client.h"
#include "stage.h"

enum { SLOTS = 64, MAX_SUBSCRIBERS = 256 };

/* The signal's body, signature "ttus": what the subscriber needs to judge it. */
struct tick {
    uint64_t sequence, sent_ns;
    uint32_t burst; /* the burst that ends with this signal, or 0 */
    uint32_t text_length;
    char text[];
};

struct page {
    _Atomic uint32_t completed; /* the last burst that everyone has: the emitter sleeps on it */
    _Atomic uint32_t phase;
    _Atomic uint32_t arrived[SLOTS]; /* subscribers that have burst n, at n % SLOTS */
    struct histogram latency[][2];   /* of each subscriber, in each phase */
};

static const char *socket_path;
static struct page *page;
static unsigned subscribers;
static size_t bytes;

static void complete(uint32_t burst) {
    uint32_t seen = atomic_load(&page->completed);
    while (seen < burst && !atomic_compare_exchange_weak(&page->completed, &seen, burst))
        ;
    syscall(SYS_futex, &page->completed, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static void subscribe(unsigned index) {
    struct client client;
    struct message message;
    uint64_t expected = 1;
    client_connect(&client, socket_path);
    client_add_match(&client, "type='signal',interface='org.kbusd.Bench',member='Tick'");
    stage_reached();
    for (;;) {
        client_next(&client, &message);
        if (message.type != SIGNAL || strcmp(message.member, "Tick"))
            continue;
        struct tick tick;
        memcpy(&tick, message.body, sizeof tick); /* not aligned in the receive buffer */
        if (tick.sequence != expected++)
            die("subscriber %u got signal %llu instead of %llu", index,
                (unsigned long long)tick.sequence, (unsigned long long)expected - 1);
        histogram_add(&page->latency[index][atomic_load(&page->phase)],
                      now_ns() - tick.sent_ns);
        if (tick.burst &&
            atomic_fetch_add(&page->arrived[tick.burst % SLOTS], 1) + 1 == subscribers)
            complete(tick.burst);
    }
}

static void await(uint32_t burst) {
    uint32_t seen;
    while ((seen = atomic_load(&page->completed)) < burst)
        if (syscall(SYS_futex, &page->completed, FUTEX_WAIT, seen, NULL, NULL, 0) < 0 &&
            errno != EAGAIN && errno != EINTR)
            die("futex: %s", strerror(errno));
}

struct emitter {
    struct client client;
    struct template signal;
    uint64_t sequence;
    uint32_t burst;
};

/* Returns the number of signals; `elapsed_ns` is until everyone has the last one. */
static uint64_t emit(struct emitter *emitter, unsigned length, unsigned ahead, double seconds,
                     uint64_t *elapsed_ns) {
    struct tick *tick = (struct tick *)emitter->signal.body;
    uint64_t begin = now_ns(), first = emitter->sequence;
    do {
        uint32_t burst = ++emitter->burst;
        if (burst > ahead)
            await(burst - ahead);
        atomic_store(&page->arrived[burst % SLOTS], 0);
        for (unsigned i = 1; i <= length; i++) {
            tick->sequence = ++emitter->sequence;
            tick->burst = i == length ? burst : 0;
            tick->sent_ns = now_ns();
            client_send(&emitter->client, &emitter->signal);
        }
    } while (now_ns() - begin < (uint64_t)(seconds * 1e9));
    await(emitter->burst);
    *elapsed_ns = now_ns() - begin;
    return emitter->sequence - first;
}

static void phase(struct emitter *emitter, uint32_t number, const char *name, unsigned length,
                  unsigned ahead, double seconds) {
    uint64_t elapsed_ns;
    emit(emitter, length, ahead, seconds / 8, &elapsed_ns); /* warm */
    for (unsigned i = 0; i < subscribers; i++)
        memset(&page->latency[i][number], 0, sizeof page->latency[i][number]);
    atomic_store(&page->phase, number);
    stage_ready(name);
    uint64_t signals = emit(emitter, length, ahead, seconds, &elapsed_ns);
    struct histogram *all = calloc(1, sizeof *all);
    for (unsigned i = 0; i < subscribers; i++)
        histogram_merge(all, &page->latency[i][number]);
    double rate = (double)signals * subscribers / ((double)elapsed_ns / 1e9);
    stage_result("{\"signals\": %llu, \"deliveries\": %llu, \"deliveries_per_second\": %.2f, "
                 "\"us_per_delivery\": %.3f, \"p50_us\": %.3f, \"p99_us\": %.3f, "
                 "\"mean_us\": %.3f}",
                 (unsigned long long)signals, (unsigned long long)signals * subscribers, rate,
                 1e6 / rate, histogram_quantile_us(all, 0.5), histogram_quantile_us(all, 0.99),
                 histogram_mean_us(all));
    free(all);
}

int main(int argc, char **argv) {
    if (argc != 6)
        die("usage: fanout SOCKET SUBSCRIBERS WINDOW BYTES SECONDS");
    socket_path = argv[1];
    subscribers = (unsigned)atoi(argv[2]);
    unsigned window = (unsigned)atoi(argv[3]);
    bytes = (size_t)atol(argv[4]);
    double seconds = atof(argv[5]);
    if (subscribers < 1 || subscribers > MAX_SUBSCRIBERS || window < 2 ||
        bytes <= sizeof(struct tick))
        die("subscribers 1 to %d, window 2 or more, bytes above %zu", MAX_SUBSCRIBERS,
            sizeof(struct tick));
    stage_begin();
    page = shared_memory(sizeof *page + subscribers * sizeof page->latency[0]);
    for (unsigned i = 0; i < subscribers; i++)
        if (!stage_fork())
            subscribe(i);
    stage_wait((int)subscribers);
    struct emitter emitter = {0};
    client_connect(&emitter.client, socket_path);
    emitter.signal = template_new(SIGNAL, NO_REPLY_EXPECTED, NULL, "/org/kbusd/Bench",
                                  "org.kbusd.Bench", "Tick", "ttus", bytes);
    struct tick *tick = (struct tick *)emitter.signal.body;
    tick->text_length = (uint32_t)(bytes - sizeof *tick - 1);
    memset(tick->text, 'x', tick->text_length);
    phase(&emitter, 0, "saturated", window / 2, 2, seconds);
    phase(&emitter, 1, "single", 1, 1, seconds / 2);
    stage_end();
}
