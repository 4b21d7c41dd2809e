/* A closed-loop load client: keep-alive connections, each a session that sends one chat after the other.
 *
 * Owns the requests' shape and the reading of answers. Prints one JSON line. Speaks to 127.0.0.1 alone.
 *
 *   load PORT CONNECTIONS REQUESTS_MAX SECONDS STREAM TOKENS PROMPT_BYTES CLASS
 *
 * A session's history stays and only its last message, a turn number, is new: what an agent sends. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

enum { MESSAGE_BYTES = 2000, ROOM = 1 << 17, GRACE_S = 20 };
typedef enum { HEAD, SIZE, CHUNK, PLAIN } State;

typedef struct {
    int fd, is_busy;
    char *request;
    size_t length, sent, turn_at;
    long turn;
    char *in;                /* unread bytes of the answer */
    size_t held;
    State state;
    size_t left;             /* bytes of this chunk or body */
    int status, is_done;     /* is_done: [DONE] came, or the answer is no stream */
    char tail[16];           /* last bytes of the body before this read: a mark may be split */
    long tokens;
    double begun, first;
} Session;

static int poller, port, is_stream, tokens, prompt_bytes;
static const char *class_name;
static long allowed, started, ended, failed, tokens_seen, bytes_seen;
static int bad_status;
static double *ttft_us, *total_us;
static long ttft_count, total_count;

static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec / 1e9; }

static void watch(Session *s, int operation, unsigned events) {
    struct epoll_event event = {.events = events, .data.ptr = s};
    epoll_ctl(poller, operation, s->fd, &event);
}

static void dial(Session *s) {
    int one = 1;
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    s->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(s->fd, (struct sockaddr *)&at, sizeof at)) { perror("connect"); exit(2); }
    setsockopt(s->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    fcntl(s->fd, F_SETFL, O_NONBLOCK);
    watch(s, EPOLL_CTL_ADD, EPOLLIN);
}

static void push(Session *s) {
    while (s->sent < s->length) {
        ssize_t n = send(s->fd, s->request + s->sent, s->length - s->sent, MSG_NOSIGNAL);
        if (n < 0) break;
        s->sent += n;
    }
    watch(s, EPOLL_CTL_MOD, EPOLLIN | (s->sent < s->length ? EPOLLOUT : 0));
}

static void begin(Session *s) {
    char number[16];
    if (started >= allowed) { s->is_busy = 0; return; }
    started++;
    s->is_busy = 1;
    snprintf(number, sizeof number, "%08ld", s->turn++);
    memcpy(s->request + s->turn_at, number, 8);
    s->sent = s->held = 0;
    s->state = HEAD;
    s->is_done = 0;
    s->tokens = -1;
    memset(s->tail, 0, sizeof s->tail);
    s->begun = now();
    s->first = 0;
    push(s);
}

static void end(Session *s, int is_broken) {
    double at = now();
    ended++;
    if (is_broken || s->status != 200 || !s->is_done || (s->tokens >= 0 && s->tokens != tokens)) {
        failed++;
        if (s->status != 200) bad_status = s->status;
    } else {
        total_us[total_count++] = (at - s->begun) * 1e6;
        if (is_stream) ttft_us[ttft_count++] = (s->first - s->begun) * 1e6;
        tokens_seen += tokens;
    }
    if (is_broken) { close(s->fd); dial(s); }
    begin(s);
}

/* Look for the marks of an answer in its body; those that a read may have split are searched in the joint as well. */
static void scan(Session *s, const char *data, size_t size) {
    static const char done[] = "data: [DONE]", spent[] = "\"completion_tokens\":";
    char joint[32];
    size_t head = size < 16 ? size : 16, tail = size < 16 ? size : 16;
    if (!s->first) s->first = now();
    bytes_seen += size;
    memcpy(joint, s->tail, 16);
    memcpy(joint + 16, data, head);
    if (memmem(joint, 16 + head, done, sizeof done - 1) || memmem(data, size, done, sizeof done - 1)) s->is_done = 1;
    const char *count = memmem(data, size, spent, sizeof spent - 1);
    if (count) s->tokens = strtol(count + sizeof spent - 1, 0, 10);
    memmove(s->tail, s->tail + tail, 16 - tail);
    memcpy(s->tail + 16 - tail, data + size - tail, tail);
}

static int read_head(Session *s, size_t *at) {
    char *stop = memmem(s->in, s->held, "\r\n\r\n", 4);
    if (!stop) return 0;
    *stop = 0;
    s->status = atoi(s->in + 9);
    char *length = strcasestr(s->in, "\r\ncontent-length:");
    s->state = length ? PLAIN : SIZE;
    s->left = length ? strtoul(length + 17, 0, 10) : 0;
    if (length) s->is_done = 1;
    *at = stop + 4 - s->in;
    return 1;
}

static int read_size(Session *s, size_t *at) {
    char *stop = memmem(s->in + *at, s->held - *at, "\r\n", 2);
    if (!stop) return 0;
    s->left = strtoul(s->in + *at, 0, 16) + 2;
    if (s->left == 2 && s->held < (size_t)(stop - s->in) + 4) return 0;
    *at = stop + 2 - s->in;
    s->state = CHUNK;
    return 1;
}

/* Take the unread bytes as far as they go. Returns 1 when the answer is whole. */
static int eat(Session *s) {
    size_t at = 0;
    int is_whole = 0;
    while (!is_whole && (at < s->held || (s->state == PLAIN && !s->left))) {
        if (s->state == HEAD) {
            if (!read_head(s, &at)) break;
        } else if (s->state == SIZE) {
            if (!read_size(s, &at)) break;
            if (s->left == 2) is_whole = 1;
        } else {
            size_t size = s->held - at < s->left ? s->held - at : s->left;
            size_t body = s->state == PLAIN ? size : s->left > 2 ? (size < s->left - 2 ? size : s->left - 2) : 0;
            if (body) scan(s, s->in + at, body);
            at += size;
            s->left -= size;
            if (!s->left && s->state == PLAIN) is_whole = 1;
            else if (!s->left) s->state = SIZE;
        }
    }
    memmove(s->in, s->in + at, s->held - at);
    s->held -= at;
    return is_whole;
}

static void receive(Session *s) {
    ssize_t n = recv(s->fd, s->in + s->held, ROOM - s->held - 1, 0);
    if (n < 0) return;
    if (n == 0) {
        if (s->is_busy) end(s, 1);
        else close(s->fd);
        return;
    }
    s->held += n;
    if (eat(s)) end(s, 0);
}

/* Some words, the same for one seed. */
static int words(char *to, int size, unsigned seed) {
    static const char *list[] = {"the", "request", "waits", "for", "its", "first", "token", "while", "another", "step",
        "runs", "and", "a", "worker", "reads", "cached", "blocks", "of", "long", "prefix", "in", "order", "to", "answer"};
    int k = 0;
    while (k < size - 12) {
        seed = seed * 1103515245 + 12345;
        k += sprintf(to + k, "%s ", list[(seed >> 16) % 24]);
    }
    while (k < size) to[k++] = '.';
    return k;
}

static void compose(Session *s, int number) {
    char *body = malloc(prompt_bytes + prompt_bytes / 20 + 4096);
    int message = prompt_bytes < 4 * MESSAGE_BYTES ? prompt_bytes / 4 : MESSAGE_BYTES;
    int k = sprintf(body, "{\"model\":\"mock\",\"max_tokens\":%d,\"stream\":%s,%s\"ignore_eos\":true,\"messages\":["
        "{\"role\":\"system\",\"content\":\"", tokens, is_stream ? "true" : "false",
        is_stream ? "\"stream_options\":{\"include_usage\":true}," : "");
    k += words(body + k, message, 7);
    for (int at = message, turn = 0; at < prompt_bytes - message; at += message, turn++) {
        k += sprintf(body + k, "\"},{\"role\":\"%s\",\"content\":\"", turn % 2 ? "assistant" : "user");
        k += words(body + k, message, 1000 * number + turn);
    }
    k += sprintf(body + k, "\"},{\"role\":\"user\",\"content\":\"Turn ");
    int turn_at = k;
    k += sprintf(body + k, "00000000\"}]}");
    s->request = malloc(k + 512);
    int head = sprintf(s->request, "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAccept: application/json\r\n"
        "Content-Type: application/json\r\nUser-Agent: OpenAI/Python 3.54.0\r\nAuthorization: Bearer none\r\n"
        "x-stainless-read-timeout: 600\r\nx-headway-class: %s\r\nx-session-id: s%05d\r\nContent-Length: %d\r\n\r\n",
        port, class_name, number, k);
    memcpy(s->request + head, body, k);
    s->length = head + k;
    s->turn_at = head + turn_at;
    s->in = malloc(ROOM);
    free(body);
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double quantile(double *values, long count, double share) {
    return count ? values[(long)((count - 1) * share)] : -1;
}

int main(int count, char **given) {
    if (count != 9) { fprintf(stderr, "see the head of load.c\n"); return 2; }
    signal(SIGPIPE, SIG_IGN);
    port = atoi(given[1]);
    int sessions = atoi(given[2]);
    allowed = atol(given[3]);
    double seconds = atof(given[4]);
    is_stream = atoi(given[5]);
    tokens = atoi(given[6]);
    prompt_bytes = atoi(given[7]);
    class_name = given[8];
    poller = epoll_create1(EPOLL_CLOEXEC);
    ttft_us = malloc(sizeof *ttft_us * (allowed + 1));
    total_us = malloc(sizeof *total_us * (allowed + 1));
    Session *all = calloc(sessions, sizeof *all);
    for (int i = 0; i < sessions; i++) { compose(&all[i], i); dial(&all[i]); }
    double opened = now(), stop = opened + seconds;
    for (int i = 0; i < sessions; i++) begin(&all[i]);
    struct epoll_event events[256];
    while (ended < started) {
        int ready = epoll_wait(poller, events, 256, 1000);
        if (now() > stop) allowed = 0;  /* what runs may end, nothing more begins */
        if (now() > stop + GRACE_S) break;
        for (int i = 0; i < ready; i++) {
            Session *s = events[i].data.ptr;
            if (events[i].events & EPOLLOUT) push(s);
            if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(s);
        }
    }
    double wall = now() - opened;
    qsort(ttft_us, ttft_count, sizeof *ttft_us, compare);
    qsort(total_us, total_count, sizeof *total_us, compare);
    printf("{\"ok\":%ld,\"failed\":%ld,\"bad_status\":%d,\"wall_s\":%.3f,\"tokens\":%ld,\"body_bytes\":%ld,"
        "\"ttft_p50_us\":%.0f,\"ttft_p99_us\":%.0f,\"total_p50_us\":%.0f,\"total_p99_us\":%.0f}\n",
        total_count, failed + started - ended, bad_status, wall, tokens_seen, bytes_seen,
        quantile(ttft_us, ttft_count, 0.5), quantile(ttft_us, ttft_count, 0.99),
        quantile(total_us, total_count, 0.5), quantile(total_us, total_count, 0.99));
    return 0;
}
