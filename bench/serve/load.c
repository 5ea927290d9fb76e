// Load on an OpenAI-compatible server that costs the machine next to nothing: one thread, epoll, HTTP/1.1 keep-alive.
//
//   load PORT PATH REQUESTS -c CONNECTIONS -n COUNT    closed loop: lines in order, from the top again after the last
//   load PORT PATH REQUESTS -o                         open loop: each line at its time
//   and: -d SECONDS (no new requests after that)  -H 'Name: value'  -q (acknowledge every segment at once)
//        -g FILE (gaps between content events, microseconds, as binary uint32)
//
// REQUESTS, one a line:  previous \t delay_us \t body    previous = number of the line whose answer it waits for, -1 =
// none; delay_us counts from that answer's end, or from the start.
// Output, one a line:    line status fault start_us ttft_us e2e_us events output_tokens prompt_tokens cached_tokens
// fault: 0 none, 1 connection lost, 2 stream without [DONE], 3 error event. A last line: "wall_us N".
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { NONE, LOST, CUT, ERROR_EVENT };
enum { SIZE, DATA, DATA_END, TRAILER };

typedef struct {
    long previous, delay_us, length, next;  // next: the line that follows this one, -1 = none
    char *body;
} Line;

typedef struct {
    int fd, busy, done, fault, status, chunked, in_head, chunk_state;
    long line, out_length, out_sent, head_length, content_length, received, chunk_left, text_length, text_room;
    long events, output_tokens, prompt_tokens, cached_tokens;
    uint64_t started, first, last;
    char *out, *text, head[8192];
} Connection;

typedef struct { uint64_t at; long line; } Due;

static Line *lines;
static long line_count, completed, issued, wanted;
static Connection **connections;
static int connection_count, connection_room, poller, quick_ack, open_loop;
static uint64_t origin;
static struct sockaddr_in server;
static const char *path;
static char extra_headers[4096];
static FILE *gaps;
static Due *dues;
static long due_count, due_room;

static uint64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000ull + t.tv_nsec / 1000;
}

static void die(const char *what) { perror(what); exit(1); }

// --- what is due when: a binary heap ------------------------------------------------------------------------------

static void due_push(uint64_t at, long line) {
    if (due_count == due_room) dues = realloc(dues, (due_room = due_room ? 2 * due_room : 1024) * sizeof *dues);
    long i = due_count++;
    for (; i && dues[(i - 1) / 2].at > at; i = (i - 1) / 2) dues[i] = dues[(i - 1) / 2];
    dues[i] = (Due){at, line};
}

static long due_pop(void) {
    long line = dues[0].line, i = 0;
    Due last = dues[--due_count];
    for (;;) {
        long child = 2 * i + 1;
        if (child >= due_count) break;
        if (child + 1 < due_count && dues[child + 1].at < dues[child].at) child++;
        if (dues[child].at >= last.at) break;
        dues[i] = dues[child];
        i = child;
    }
    dues[i] = last;
    return line;
}

// --- reading answers ----------------------------------------------------------------------------------------------

static void number(const char *text, const char *key, long *into) {
    const char *found = strstr(text, key);
    if (found) *into = atol(found + strlen(key));
}

static void usage(Connection *c, const char *text) {
    number(text, "\"completion_tokens\":", &c->output_tokens);
    number(text, "\"prompt_tokens\":", &c->prompt_tokens);
    number(text, "\"cached_tokens\":", &c->cached_tokens);
}

static void on_line(Connection *c, char *text, uint64_t now) {
    if (!strncmp(text, "data: [DONE]", 12)) { c->done = 1; return; }
    if (*text == '{') { c->done = 1; usage(c, text); return; }  // a whole answer
    if (strncmp(text, "data: ", 6)) return;
    char *content = strstr(text, "\"content\":\"");
    if (content && content[11] != '"') {
        if (!c->first) c->first = now;
        else if (gaps) { uint32_t gap = now - c->last; fwrite(&gap, 4, 1, gaps); }
        c->last = now;
        c->events++;
    } else if (strstr(text, "\"error\":{")) c->fault = ERROR_EVENT;
    if (strstr(text, "\"usage\":{")) usage(c, text);
}

static void on_body(Connection *c, const char *data, long length, uint64_t now) {
    if (c->text_length + length + 1 > c->text_room)
        c->text = realloc(c->text, c->text_room = 2 * (c->text_length + length + 1));
    memcpy(c->text + c->text_length, data, length);
    c->text_length += length;
    char *start = c->text, *end;
    while ((end = memchr(start, '\n', c->text + c->text_length - start))) {
        *end = 0;
        on_line(c, start, now);
        start = end + 1;
    }
    c->text_length -= start - c->text;
    memmove(c->text, start, c->text_length);
}

static long on_head(Connection *c, const char *data, long length) {  // bytes used; in_head is 0 once it is complete
    for (long i = 0; i < length; i++) {
        if (c->head_length == sizeof c->head - 1) { c->fault = LOST; return length; }
        c->head[c->head_length++] = data[i];
        if (c->head_length < 4 || memcmp(c->head + c->head_length - 4, "\r\n\r\n", 4)) continue;
        c->head[c->head_length] = 0;
        c->in_head = 0;
        c->status = atoi(c->head + 9);
        c->chunked = strcasestr(c->head, "transfer-encoding: chunked") != 0;
        char *given = strcasestr(c->head, "content-length:");
        c->content_length = given ? atol(given + 15) : -1;
        return i + 1;
    }
    return length;
}

static int digit(char ch) { return ch <= '9' ? ch - '0' : (ch | 32) - 'a' + 10; }

static int on_data(Connection *c, const char *data, long length, uint64_t now) {  // 1 = the answer is complete
    long i = c->in_head ? on_head(c, data, length) : 0;
    if (c->in_head) return 0;
    if (!c->chunked) {
        on_body(c, data + i, length - i, now);
        c->received += length - i;
        if (c->received < c->content_length) return 0;
        if (c->text_length) on_body(c, "\n", 1, now);
        return 1;
    }
    while (i < length) switch (c->chunk_state) {
        case SIZE:
            if (data[i] == '\n') c->chunk_state = c->chunk_left ? DATA : TRAILER;
            else if (data[i] != '\r') c->chunk_left = 16 * c->chunk_left + digit(data[i]);
            i++;
            break;
        case DATA: {
            long part = length - i < c->chunk_left ? length - i : c->chunk_left;
            on_body(c, data + i, part, now);
            i += part;
            if (!(c->chunk_left -= part)) c->chunk_state = DATA_END;
            break;
        }
        case DATA_END:
            if (data[i++] == '\n') c->chunk_state = SIZE;
            break;
        default:
            if (data[i++] != '\n') break;
            if (c->text_length) on_body(c, "\n", 1, now);  // a whole answer need not end with a line
            return 1;
    }
    return 0;
}

// --- connections --------------------------------------------------------------------------------------------------

static void open_socket(Connection *c) {
    int on = 1;
    if ((c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0)) < 0) die("socket");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(c->fd, (void *)&server, sizeof server) && errno != EINPROGRESS) die("connect");
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET | EPOLLRDHUP, .data.ptr = c};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event)) die("epoll_ctl");
}

static void send_out(Connection *c) {
    while (c->out_sent < c->out_length) {
        ssize_t sent = send(c->fd, c->out + c->out_sent, c->out_length - c->out_sent, MSG_NOSIGNAL);
        if (sent <= 0) return;
        c->out_sent += sent;
    }
}

static Connection *free_connection(void) {
    for (int i = connection_count - 1; i >= 0; i--)
        if (!connections[i]->busy) return connections[i];
    if (connection_count == connection_room)
        connections = realloc(connections, (connection_room = connection_room ? 2 * connection_room : 256) * sizeof *connections);
    Connection *c = calloc(1, sizeof *c);
    c->fd = -1;
    return connections[connection_count++] = c;
}

static void start(Connection *c, long line) {
    Line *l = &lines[line];
    c->out = realloc(c->out, l->length + sizeof extra_headers + 512);
    c->out_length = sprintf(c->out, "POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n%sContent-Length: %ld\r\n\r\n",
                            path, extra_headers, l->length);
    memcpy(c->out + c->out_length, l->body, l->length);
    c->out_length += l->length;
    c->out_sent = c->head_length = c->received = c->chunk_left = c->text_length = c->events = 0;
    c->content_length = c->output_tokens = c->prompt_tokens = c->cached_tokens = -1;
    c->done = c->fault = c->status = c->chunked = c->chunk_state = 0;
    c->in_head = c->busy = 1;
    c->first = c->last = 0;
    c->line = line;
    c->started = now_us();
    issued++;
    if (c->fd < 0) open_socket(c);
    else send_out(c);
}

static void finish(Connection *c, uint64_t end_us) {
    uint64_t now = now_us();
    if (!c->fault && c->status == 200 && !c->done) c->fault = CUT;
    printf("%ld\t%d\t%d\t%lu\t%ld\t%lu\t%ld\t%ld\t%ld\t%ld\n", c->line, c->status, c->fault, c->started - origin,
           c->first ? (long)(c->first - c->started) : -1, now - c->started, c->events, c->output_tokens,
           c->prompt_tokens, c->cached_tokens);
    completed++;
    c->busy = 0;
    if (open_loop) {
        long next = lines[c->line].next;
        if (next >= 0) due_push(now + lines[next].delay_us, next);
    } else if (now >= end_us) wanted = issued;
    else if (issued < wanted) start(c, issued % line_count);
}

static void receive(Connection *c, uint64_t end_us) {
    static char buffer[1 << 18];
    for (;;) {
        ssize_t got = recv(c->fd, buffer, sizeof buffer, 0);
        uint64_t now = now_us();
        if (quick_ack) { int on = 1; setsockopt(c->fd, IPPROTO_TCP, TCP_QUICKACK, &on, sizeof on); }
        if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (got <= 0) {
            close(c->fd);
            c->fd = -1;
            if (c->busy) { c->fault = LOST; finish(c, end_us); }
            return;
        }
        if (c->busy && on_data(c, buffer, got, now)) finish(c, end_us);
        if (c->fd < 0) return;
    }
}

// --- main ---------------------------------------------------------------------------------------------------------

static void read_lines(const char *name) {
    FILE *file = fopen(name, "r");
    char *text = 0;
    size_t room = 0;
    long length, capacity = 0;
    if (!file) die(name);
    while ((length = getline(&text, &room, file)) > 0) {
        if (text[length - 1] == '\n') text[--length] = 0;
        if (line_count == capacity) lines = realloc(lines, (capacity = capacity ? 2 * capacity : 4096) * sizeof *lines);
        char *rest = text, *previous = strsep(&rest, "\t"), *delay = strsep(&rest, "\t");
        if (!rest) { fprintf(stderr, "%s: line %ld has no body\n", name, line_count); exit(1); }
        lines[line_count++] = (Line){atol(previous), atol(delay), strlen(rest), -1, strdup(rest)};
    }
    fclose(file);
    for (long i = 0; i < line_count; i++)
        if (lines[i].previous >= 0) lines[lines[i].previous].next = i;
}

int main(int count, char **words) {
    double seconds = 1e9;
    int concurrency = 0;
    if (count < 4) { fprintf(stderr, "usage: see load.c\n"); return 2; }
    for (int i = 4; i < count; i++) {
        if (!strcmp(words[i], "-o")) open_loop = 1;
        else if (!strcmp(words[i], "-q")) quick_ack = 1;
        else if (i + 1 == count) { fprintf(stderr, "%s: needs a value\n", words[i]); return 2; }
        else if (!strcmp(words[i], "-c")) concurrency = atoi(words[++i]);
        else if (!strcmp(words[i], "-n")) wanted = atol(words[++i]);
        else if (!strcmp(words[i], "-d")) seconds = atof(words[++i]);
        else if (!strcmp(words[i], "-g")) { if (!(gaps = fopen(words[++i], "wb"))) die(words[i]); }
        else if (!strcmp(words[i], "-H")) { strncat(extra_headers, words[++i], 1000); strcat(extra_headers, "\r\n"); }
        else { fprintf(stderr, "%s: unknown\n", words[i]); return 2; }
    }
    server.sin_family = AF_INET;
    server.sin_port = htons(atoi(words[1]));
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    path = words[2];
    read_lines(words[3]);
    poller = epoll_create1(0);
    origin = now_us();
    uint64_t end_us = origin + (uint64_t)(seconds * 1e6);
    if (open_loop) {
        wanted = line_count;
        for (long i = 0; i < line_count; i++) if (lines[i].previous < 0) due_push(origin + lines[i].delay_us, i);
    } else for (int i = 0; i < concurrency && issued < wanted; i++) start(free_connection(), issued % line_count);
    struct epoll_event events[256];
    while (completed < wanted) {
        uint64_t now = now_us();
        if (open_loop && now > end_us) { due_count = 0; wanted = issued; }
        if (now > end_us + 60000000ull) break;  // what has not answered by now is left out, and missed by the reader
        while (due_count && dues[0].at <= now) start(free_connection(), due_pop());
        uint64_t wait_us = 100000;
        if (due_count && dues[0].at < now + wait_us) wait_us = dues[0].at <= now ? 0 : dues[0].at - now;
        struct timespec wait = {0, wait_us * 1000};  // in whole milliseconds it would spin through the last one
        int ready = epoll_pwait2(poller, events, 256, &wait, 0);
        for (int i = 0; i < ready; i++) {
            Connection *c = events[i].data.ptr;
            if (c->fd < 0) continue;
            if (c->busy && events[i].events & EPOLLOUT) send_out(c);
            receive(c, end_us);
        }
    }
    if (gaps) fclose(gaps);
    printf("wall_us %lu\n", now_us() - origin);
    return 0;
}
