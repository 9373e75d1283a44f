/* One caller and the echo service that it calls, for the programs that measure method calls. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "client.h"
#include "stage.h"

enum { MAX_WINDOW = 1024 };

struct outcome {
    uint64_t calls, elapsed_ns;
    struct histogram latency;
};

/* Owns `name` on the bus at `path` and answers each call with its own body; says stage_reached()
 * once it does. */
_Noreturn void serve(const char *path, const char *name);
/* A call of that service with one argument of `bytes` bytes. */
struct template echo_call(const char *name, const char *signature, size_t bytes);
/* Keeps `window` such calls in flight for so long, then waits for the rest. */
void run(struct client *client, struct template *call, unsigned window, double seconds,
         struct outcome *outcome);
