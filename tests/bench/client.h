/* A D-Bus client with nothing in it that could be measured by mistake.
 *
 * The benchmark wants the time of the bus, so its clients do as little as a
 * client can: messages are marshalled once and only their serial is patched;
 * each is sent with one sendmsg, as every D-Bus library does; what has arrived
 * is read with one recv of up to a buffer's size and parsed in place. All
 * sockets are blocking and keep the kernel's default buffer sizes.
 *
 * What comes from the bus is trusted: it is the thing under test, started by the
 * harness. Whatever goes wrong ends the process with a line on stderr, so that
 * no figure is ever taken from a run in which something failed.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { METHOD_CALL = 1, METHOD_RETURN = 2, ERROR = 3, SIGNAL = 4 };
enum { NO_REPLY_EXPECTED = 1 };

struct client {
    int fd;
    uint32_t serial;     /* of the message that was sent last */
    char unique[256];    /* our unique name, as Hello returned it */
    uint8_t *in;         /* what was received: [start, end) is not parsed yet */
    size_t capacity, start, end;
};

/* A received message; every pointer leads into the client's buffer and is good
 * until the next client_next(). Absent header fields are "". */
struct message {
    uint8_t type;
    uint32_t serial, reply_serial;
    const char *sender, *member, *signature, *error_name;
    const uint8_t *body;
    size_t body_size;
};

/* A marshalled message to send again and again: `body` may be written to. */
struct template {
    uint8_t *bytes;
    size_t size;
    uint8_t *body;
};

_Noreturn void die(const char *format, ...) __attribute__((format(printf, 1, 2)));
uint64_t now_ns(void); /* CLOCK_MONOTONIC */

/* Connects to the socket `path` ("@name": an abstract one), authenticates as
 * sd-bus does (all of SASL in one write) and says Hello. */
void client_connect(struct client *, const char *path);
void client_close(struct client *);
/* A client on a socket that needs no greeting. */
void client_adopt(struct client *, int fd);
void client_request_name(struct client *, const char *name);
void client_add_match(struct client *, const char *rule);

/* Blocks until a whole message is there. */
void client_next(struct client *, struct message *);
/* Whether client_next() would return without a system call. */
bool client_buffered(const struct client *);

/* Any of the names may be NULL. The body is `body_size` zero bytes. */
struct template template_new(uint8_t type, uint8_t flags, const char *destination,
                             const char *path, const char *interface, const char *member,
                             const char *signature, size_t body_size);
/* Sends the template under the next serial, which is returned. */
uint32_t client_send(struct client *, struct template *);
/* Answers a call with `body`; the header is rebuilt only when the caller, the size or the
 * signature differs from the last answer's. */
void client_reply(struct client *, const struct message *call, const uint8_t *body, size_t size);

/* Writes the body of a call that carries `size` bytes as one argument: a string for "s", an
 * array of bytes for "ay". */
size_t argument_size(const char *signature, size_t size);
void argument_fill(uint8_t *body, const char *signature, size_t size);
