/* See calling.h. */
#include "calling.h"

#include <string.h>

void serve(const char *path, const char *name) {
    struct client client;
    struct message call;
    client_connect(&client, path);
    client_request_name(&client, name);
    stage_reached();
    for (;;) {
        client_next(&client, &call);
        if (call.type == METHOD_CALL)
            client_reply(&client, &call, call.body, call.body_size);
    }
}

struct template echo_call(const char *name, const char *signature, size_t bytes) {
    struct template call = template_new(METHOD_CALL, 0, name, "/org/kbusd/Bench",
                                        "org.kbusd.Bench", "Echo", signature,
                                        argument_size(signature, bytes));
    argument_fill(call.body, signature, bytes);
    return call;
}

void run(struct client *client, struct template *call, unsigned window, double seconds,
         struct outcome *outcome) {
    static uint64_t sent_at[MAX_WINDOW]; /* by serial: replies come in the order of the calls */
    struct message reply;
    size_t size = (size_t)(call->bytes + call->size - call->body);
    uint64_t begin = now_ns(), end = begin + (uint64_t)(seconds * 1e9), now = begin;
    uint32_t expected = client->serial + 1;
    unsigned flying = 0;
    memset(outcome, 0, sizeof *outcome);
    for (;;) {
        while (flying < window && now < end) {
            now = now_ns();
            uint32_t serial = client_send(client, call);
            sent_at[serial % MAX_WINDOW] = now;
            flying++;
        }
        if (!flying)
            break;
        do {
            client_next(client, &reply);
            if (reply.type != METHOD_RETURN)
                continue;
            if (reply.reply_serial != expected++ || reply.body_size != size)
                die("reply to %u with %zu bytes instead of %u", reply.reply_serial,
                    reply.body_size, expected - 1);
            now = now_ns();
            histogram_add(&outcome->latency, now - sent_at[reply.reply_serial % MAX_WINDOW]);
            outcome->calls++;
            flying--;
        } while (flying && client_buffered(client));
    }
    outcome->elapsed_ns = now - begin;
}
