/* Connections that do nothing: `idle SOCKET COUNT`.
 *
 * The harness reads the daemon's memory while none is open and when all are. */
#include <stdlib.h>

#include "client.h"
#include "stage.h"

int main(int argc, char **argv) {
    if (argc != 3)
        die("usage: idle SOCKET COUNT");
    int count = atoi(argv[2]);
    struct client *clients = calloc((size_t)count, sizeof *clients);
    stage_begin();
    stage_ready("idle");
    for (int i = 0; i < count; i++)
        client_connect(&clients[i], argv[1]);
    stage_result("{\"connections\": %d}", count);
    stage_end();
}
