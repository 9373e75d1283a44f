/* See client.h. The wire format is that of the D-Bus specification, chapters "Message
 * Protocol" and "Authentication Protocol"; all messages are little-endian. */
#define _GNU_SOURCE
#include "client.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the benchmark's clients marshal in the machine's order and announce little-endian"
#endif

enum { FIRST_CAPACITY = 256 * 1024 };

void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("bench client: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    _exit(1);
}

uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static size_t align(size_t value, size_t to) { return (value + to - 1) & ~(to - 1); }

static uint32_t load32(const uint8_t *at) {
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static void store32(uint8_t *at, uint32_t value) { memcpy(at, &value, sizeof value); }

/* Sends all of it, however often the kernel takes only a part. */
static void send_all(int fd, struct iovec *parts, size_t count) {
    struct msghdr head = {.msg_iov = parts, .msg_iovlen = count};
    while (head.msg_iovlen) {
        ssize_t sent = sendmsg(fd, &head, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR)
                continue;
            die("send: %s", strerror(errno));
        }
        while (head.msg_iovlen && (size_t)sent >= head.msg_iov->iov_len) {
            sent -= (ssize_t)head.msg_iov->iov_len;
            head.msg_iov++;
            head.msg_iovlen--;
        }
        if (head.msg_iovlen) {
            head.msg_iov->iov_base = (uint8_t *)head.msg_iov->iov_base + sent;
            head.msg_iov->iov_len -= (size_t)sent;
        }
    }
}

static void receive_some(struct client *client) {
    for (;;) {
        ssize_t got =
            recv(client->fd, client->in + client->end, client->capacity - client->end, 0);
        if (got > 0) {
            client->end += (size_t)got;
            return;
        }
        if (got == 0)
            die("the bus closed the connection");
        if (errno != EINTR)
            die("recv: %s", strerror(errno));
    }
}

/* The size of the message at the head of the buffer, 0 while its first 16 bytes are missing. */
static size_t pending_size(const struct client *client) {
    if (client->end - client->start < 16)
        return 0;
    const uint8_t *head = client->in + client->start;
    return align(16 + (size_t)load32(head + 12), 8) + load32(head + 4);
}

bool client_buffered(const struct client *client) {
    size_t size = pending_size(client);
    return size && client->end - client->start >= size;
}

/* Makes room for `size` bytes from `start` on. */
static void make_room(struct client *client, size_t size) {
    if (client->capacity - client->start >= size)
        return;
    memmove(client->in, client->in + client->start, client->end - client->start);
    client->end -= client->start;
    client->start = 0;
    if (client->capacity < size) {
        client->capacity = align(size, 4096);
        client->in = realloc(client->in, client->capacity);
        if (!client->in)
            die("no memory for a message of %zu bytes", size);
    }
}

static void parse(const uint8_t *data, struct message *message) {
    size_t fields_end = 16 + (size_t)load32(data + 12);
    *message = (struct message){
        .type = data[1],
        .serial = load32(data + 8),
        .sender = "",
        .member = "",
        .signature = "",
        .error_name = "",
        .body = data + align(fields_end, 8),
        .body_size = load32(data + 4),
    };
    if (data[0] != 'l')
        die("a message in the wrong byte order");
    for (size_t at = 16; at < fields_end;) {
        at = align(at, 8);
        uint8_t code = data[at];
        uint8_t type = data[at + 2]; /* after the code: signature length 1, type, NUL */
        at += 4;
        if (type == 'u') {
            if (code == 5)
                message->reply_serial = load32(data + at);
            at += 4;
        } else if (type == 'g') {
            if (code == 8)
                message->signature = (const char *)data + at + 1;
            at += 1u + data[at] + 1u;
        } else {
            const char *text = (const char *)data + at + 4;
            if (code == 3)
                message->member = text;
            else if (code == 4)
                message->error_name = text;
            else if (code == 7)
                message->sender = text;
            at += 4 + (size_t)load32(data + at) + 1;
        }
    }
}

void client_next(struct client *client, struct message *message) {
    if (client->start == client->end)
        client->start = client->end = 0;
    size_t size;
    while (!(size = pending_size(client)) || client->end - client->start < size) {
        make_room(client, size ? size : 16);
        receive_some(client);
    }
    parse(client->in + client->start, message);
    client->start += size;
    if (message->type == ERROR)
        die("error %s: %s", message->error_name,
            message->signature[0] == 's' ? (const char *)message->body + 4 : "");
}

static uint8_t *field(uint8_t *at, const uint8_t *base, uint8_t code, char type,
                      const char *value) {
    at = (uint8_t *)base + align((size_t)(at - base), 8);
    *at++ = code;
    *at++ = 1;
    *at++ = (uint8_t)type;
    *at++ = 0;
    size_t length = strlen(value);
    if (type == 'g') {
        *at++ = (uint8_t)length;
    } else {
        store32(at, (uint32_t)length);
        at += 4;
    }
    memcpy(at, value, length + 1);
    return at + length + 1;
}

/* Marshals a header; `reply_serial` 0 leaves the field out. Returns its padded size. When there
 * is a reply serial, it stands first, so that it is to be patched at offset 20. */
static size_t write_header(uint8_t *out, uint8_t type, uint8_t flags, uint32_t reply_serial,
                           const char *destination, const char *path, const char *interface,
                           const char *member, const char *signature, size_t body_size) {
    uint8_t *at = out + 16;
    out[0] = 'l';
    out[1] = type;
    out[2] = flags;
    out[3] = 1;
    store32(out + 4, (uint32_t)body_size);
    store32(out + 8, 0);
    if (reply_serial) {
        memcpy(at, "\5\1u", 4);
        store32(at + 4, reply_serial);
        at += 8;
    }
    if (path)
        at = field(at, out, 1, 'o', path);
    if (interface)
        at = field(at, out, 2, 's', interface);
    if (member)
        at = field(at, out, 3, 's', member);
    if (destination)
        at = field(at, out, 6, 's', destination);
    if (signature && *signature)
        at = field(at, out, 8, 'g', signature);
    store32(out + 12, (uint32_t)(at - out - 16));
    return align((size_t)(at - out), 8);
}

struct template template_new(uint8_t type, uint8_t flags, const char *destination,
                             const char *path, const char *interface, const char *member,
                             const char *signature, size_t body_size) {
    struct template result;
    result.bytes = calloc(1, 2048 + body_size);
    if (!result.bytes)
        die("no memory for a message of %zu bytes", body_size);
    size_t header = write_header(result.bytes, type, flags, 0, destination, path, interface,
                                 member, signature, body_size);
    result.body = result.bytes + header;
    result.size = header + body_size;
    return result;
}

uint32_t client_send(struct client *client, struct template *message) {
    store32(message->bytes + 8, ++client->serial);
    struct iovec part = {message->bytes, message->size};
    send_all(client->fd, &part, 1);
    return client->serial;
}

void client_reply(struct client *client, const struct message *call, const uint8_t *body,
                  size_t size) {
    static uint8_t header[2048];
    static char caller[256], signature[256];
    static size_t header_size, last_size = SIZE_MAX;
    if (size != last_size || strcmp(caller, call->sender) ||
        strcmp(signature, call->signature)) {
        snprintf(caller, sizeof caller, "%s", call->sender);
        snprintf(signature, sizeof signature, "%s", call->signature);
        last_size = size;
        memset(header, 0, sizeof header);
        header_size = write_header(header, METHOD_RETURN, NO_REPLY_EXPECTED, 1, caller, NULL,
                                   NULL, NULL, signature, size);
    }
    store32(header + 8, ++client->serial);
    store32(header + 20, call->serial);
    struct iovec parts[] = {{header, header_size}, {(uint8_t *)body, size}};
    send_all(client->fd, parts, 2);
}

size_t argument_size(const char *signature, size_t size) {
    return 4 + size + (signature[0] == 's' ? 1 : 0);
}

void argument_fill(uint8_t *body, const char *signature, size_t size) {
    store32(body, (uint32_t)size);
    memset(body + 4, 'x', size);
    if (signature[0] == 's')
        body[4 + size] = 0;
}

/* Calls the bus driver with one string (and, with `flags`, an unsigned after it) and waits. */
static void driver_call(struct client *client, const char *member, const char *text,
                        bool with_flags, struct message *reply) {
    size_t length = text ? strlen(text) : 0;
    size_t size = text ? 4 + length + 1 : 0;
    if (with_flags)
        size = align(size, 4) + 4;
    struct template call =
        template_new(METHOD_CALL, 0, "org.freedesktop.DBus", "/org/freedesktop/DBus",
                     "org.freedesktop.DBus", member, text ? with_flags ? "su" : "s" : NULL, size);
    if (text) {
        store32(call.body, (uint32_t)length);
        memcpy(call.body + 4, text, length);
    }
    uint32_t serial = client_send(client, &call);
    do
        client_next(client, reply);
    while (reply->type != METHOD_RETURN || reply->reply_serial != serial);
    free(call.bytes);
}

static void authenticate(struct client *client) {
    static const char request[] = "\0AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n";
    struct iovec part = {(void *)request, sizeof request - 1};
    send_all(client->fd, &part, 1);
    /* Three lines come back: DATA, OK <guid>, AGREE_UNIX_FD. */
    for (int lines = 0; lines < 3;) {
        size_t before = client->end;
        receive_some(client);
        for (size_t at = before; at < client->end; at++)
            lines += client->in[at] == '\n';
    }
    client->in[client->end] = 0;
    if (!strstr((char *)client->in, "\nOK ") || !strstr((char *)client->in, "\nAGREE_UNIX_FD"))
        die("the bus refused to authenticate us: %s", (char *)client->in);
    client->end = 0;
}

void client_adopt(struct client *client, int fd) {
    *client = (struct client){.fd = fd, .capacity = FIRST_CAPACITY, .in = malloc(FIRST_CAPACITY)};
    if (fd < 0 || !client->in)
        die("socket: %s", strerror(errno));
}

void client_connect(struct client *client, const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t length = strlen(path);
    if (length >= sizeof address.sun_path)
        die("socket path too long: %s", path);
    memcpy(address.sun_path, path, length + 1);
    if (path[0] == '@')
        address.sun_path[0] = 0;
    else
        length++;
    client_adopt(client, socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (connect(client->fd, (struct sockaddr *)&address,
                (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length)))
        die("connect to %s: %s", path, strerror(errno));
    authenticate(client);
    struct message reply;
    driver_call(client, "Hello", NULL, false, &reply);
    snprintf(client->unique, sizeof client->unique, "%s", (const char *)reply.body + 4);
}

void client_close(struct client *client) {
    close(client->fd);
    free(client->in);
    client->in = NULL;
    client->fd = -1;
}

void client_request_name(struct client *client, const char *name) {
    struct message reply;
    driver_call(client, "RequestName", name, true, &reply);
    uint32_t code = load32(reply.body);
    while (code == 2) { /* whoever has it was killed just now: the bus need not have noticed yet */
        client_next(client, &reply);
        if (reply.type == SIGNAL && reply.member && !strcmp(reply.member, "NameAcquired") &&
            !strcmp((const char *)reply.body + 4, name))
            code = 1;
    }
    if (code != 1)
        die("RequestName %s returned %u", name, code);
}

void client_add_match(struct client *client, const char *rule) {
    struct message reply;
    driver_call(client, "AddMatch", rule, false, &reply);
}
