/* Method calls without a bus: `direct BYTES SECONDS`, the caller and the echo service of calls.c on the
 * two ends of a socketpair. What a bus could reach that costs nothing:
 *
 * - "streamed": the receiver copies the first bytes out while the sender still copies the last in;
 * - "whole": it begins when all of the message is in the socket. So does who gets it from a bus,
 *   which must have all of a message before it gives away the first byte: a sender that stops
 *   halfway would else hold up the receiver for ever, or be made up for by bytes that nobody sent.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "calling.h"

struct side {
    struct client client;
    int told, tell; /* by bytes in a pipe that a message is in the socket; -1 if that is not waited for */
};

static void await(const struct side *side) {
    char byte;
    if (side->told >= 0 && read(side->told, &byte, 1) != 1)
        die("read from a pipe: %s", strerror(errno));
}

static void tell(const struct side *side) {
    if (side->tell >= 0 && write(side->tell, "", 1) != 1)
        die("write to a pipe: %s", strerror(errno));
}

static _Noreturn void answer(struct side *side) {
    struct message call;
    for (;;) {
        await(side);
        client_next(&side->client, &call);
        client_reply(&side->client, &call, call.body, call.body_size);
        tell(side);
    }
}

static void call_repeatedly(struct side *side, struct template *call, double seconds,
                            struct outcome *outcome) {
    struct message reply;
    uint64_t begin = now_ns(), end = begin + (uint64_t)(seconds * 1e9), now = begin;
    memset(outcome, 0, sizeof *outcome);
    while (now < end) {
        uint64_t sent = now;
        client_send(&side->client, call);
        tell(side);
        await(side);
        client_next(&side->client, &reply);
        now = now_ns();
        histogram_add(&outcome->latency, now - sent);
        outcome->calls++;
    }
    outcome->elapsed_ns = now - begin;
}

/* Whether the socket holds a whole message now. The kernel doubles what it is asked for. */
static bool widen(int fd, size_t bytes) {
    int size = (int)bytes * 2, got = 0;
    socklen_t length = sizeof got;
    if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size))
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    return !getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &got, &length) && got >= size;
}

static void measure(const char *phase, bool whole, size_t bytes, double seconds) {
    static struct outcome outcome;
    struct side sides[2];
    int ends[2], there[2], back[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) || pipe(there) || pipe(back))
        die("socketpair: %s", strerror(errno));
    for (int i = 0; i < 2; i++) {
        if (whole && !widen(ends[i], bytes))
            return; /* only root may have it as large */
        client_adopt(&sides[i].client, ends[i]);
        sides[i].told = whole ? (i ? there[0] : back[0]) : -1;
        sides[i].tell = whole ? (i ? back[1] : there[1]) : -1;
    }
    struct template call = echo_call("org.kbusd.Bench.Direct", "ay", bytes);
    if (!stage_fork())
        answer(&sides[1]);
    call_repeatedly(&sides[0], &call, seconds / 8, &outcome); /* warm */
    stage_ready(phase);
    call_repeatedly(&sides[0], &call, seconds, &outcome);
    double rate = (double)outcome.calls / ((double)outcome.elapsed_ns / 1e9);
    stage_result("{\"calls\": %llu, \"per_second\": %.2f, \"us_per_call\": %.3f, "
                 "\"p50_us\": %.3f, \"p99_us\": %.3f, \"mb_per_second\": %.3f}",
                 (unsigned long long)outcome.calls, rate, 1e6 / rate,
                 histogram_quantile_us(&outcome.latency, 0.5),
                 histogram_quantile_us(&outcome.latency, 0.99), rate * (double)bytes / 1e6);
}

int main(int argc, char **argv) {
    if (argc != 3)
        die("usage: direct BYTES SECONDS");
    stage_begin();
    measure("streamed", false, (size_t)atol(argv[1]), atof(argv[2]));
    measure("whole", true, (size_t)atol(argv[1]), atof(argv[2]));
    stage_end();
}
