// SPDX-License-Identifier: Apache-2.0
// The workload of the lab's pods: servers that say who they are and whom they see, and clients that measure and count.
//   labtool serve [--http PORT]... [--tcp PORT]... [--udp PORT]... [--name NAME]
//   labtool probe tcp|http|udp|icmp HOST PORT [--timeout MS] [--count N] [--interval MS] [--concurrency C] [--source ADDRESS]
//   labtool rr|crr tcp|udp|http HOST PORT [--seconds S | --milliseconds M] [--concurrency C]      crr: tcp and http
//   labtool stream tcp|udp HOST PORT [--seconds S] [--interval US] [--stall MS]
//   labtool sleep [SECONDS]
// HOST is an IPv4 or IPv6 address. Every answer is one JSON object in a line of its own. TCP and UDP servers echo; the line "who"
// is answered by {"name":...,"peer":...,"local":...}. The exit status of probe is 0 if every attempt succeeded, of stream if
// nothing was lost, late or reset.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/errqueue.h>
#include <netinet/icmp6.h>
#include <netinet/ip.h>
#include <netinet/ip_icmp.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MAX_PORTS = 16, MAX_CONNS = 4096, BUFFER = 2048, MAX_THREADS = 256 };

static volatile sig_atomic_t stopped;

static void on_stop(int sig)
{
	(void)sig;
	stopped = 1;
}

static void handle_stop(void)
{
	struct sigaction sa = {.sa_handler = on_stop}; // no SA_RESTART: blocking calls return
	sigaction(SIGTERM, &sa, NULL);
	sigaction(SIGINT, &sa, NULL);
	signal(SIGPIPE, SIG_IGN);
}

static uint64_t now_us(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static void sleep_us(uint64_t us)
{
	struct timespec t = {.tv_sec = (time_t)(us / 1000000), .tv_nsec = (long)(us % 1000000) * 1000};
	nanosleep(&t, NULL);
}

__attribute__((noreturn, format(printf, 1, 2))) static void usage_error(const char *fmt, ...)
{
	va_list ap;
	fputs("labtool: ", stderr);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputc('\n', stderr);
	exit(2);
}

static unsigned long number(const char *text, unsigned long max, const char *what)
{
	char *end;
	errno = 0;
	unsigned long value = strtoul(text, &end, 10);
	if (errno || *end || end == text || value > max)
		usage_error("%s: %s is no number up to %lu", what, text, max);
	return value;
}

// ---- addresses -------------------------------------------------------------------------------------------------

static socklen_t parse_address(const char *host, unsigned port, struct sockaddr_storage *out)
{
	struct sockaddr_in *in4 = (void *)out;
	struct sockaddr_in6 *in6 = (void *)out;
	memset(out, 0, sizeof *out);
	if (inet_pton(AF_INET, host, &in4->sin_addr) == 1) {
		in4->sin_family = AF_INET;
		in4->sin_port = htons((uint16_t)port);
		return sizeof *in4;
	}
	if (inet_pton(AF_INET6, host, &in6->sin6_addr) == 1) {
		in6->sin6_family = AF_INET6;
		in6->sin6_port = htons((uint16_t)port);
		return sizeof *in6;
	}
	usage_error("%s is no IPv4 or IPv6 address", host);
}

// "10.0.0.1:80" or "[fd00::1]:80"; addresses mapped into IPv6 by a dual-stack socket appear as the IPv4 they are
static void show_address(const struct sockaddr_storage *a, char *out, size_t size)
{
	char text[INET6_ADDRSTRLEN];
	if (a->ss_family == AF_INET) {
		const struct sockaddr_in *in4 = (const void *)a;
		inet_ntop(AF_INET, &in4->sin_addr, text, sizeof text);
		snprintf(out, size, "%s:%u", text, ntohs(in4->sin_port));
		return;
	}
	const struct sockaddr_in6 *in6 = (const void *)a;
	if (IN6_IS_ADDR_V4MAPPED(&in6->sin6_addr)) {
		inet_ntop(AF_INET, in6->sin6_addr.s6_addr + 12, text, sizeof text);
		snprintf(out, size, "%s:%u", text, ntohs(in6->sin6_port));
		return;
	}
	inet_ntop(AF_INET6, &in6->sin6_addr, text, sizeof text);
	snprintf(out, size, "[%s]:%u", text, ntohs(in6->sin6_port));
}

// ---- serve -----------------------------------------------------------------------------------------------------

enum kind { LISTEN_TCP, LISTEN_HTTP, SERVE_UDP, CONN_TCP, CONN_HTTP };

struct conn {
	int fd;
	enum kind kind;
	size_t used;
	char buffer[BUFFER];
};

static char server_name[256];

static int identity(char *out, size_t size, int fd, const struct sockaddr_storage *peer)
{
	struct sockaddr_storage local;
	socklen_t len = sizeof local;
	char peer_text[80], local_text[80];
	memset(&local, 0, sizeof local);
	getsockname(fd, (void *)&local, &len);
	show_address(peer, peer_text, sizeof peer_text);
	show_address(&local, local_text, sizeof local_text);
	return snprintf(out, size, "{\"name\":\"%s\",\"peer\":\"%s\",\"local\":\"%s\"}\n", server_name, peer_text, local_text);
}

static int dual_stack(int type, unsigned port)
{
	int on = 1, off = 0;
	struct sockaddr_in6 any6 = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port)};
	struct sockaddr_in any4 = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
	int fd = socket(AF_INET6, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	const void *address = &any6;
	socklen_t size = sizeof any6;
	if (fd < 0) { // a kernel without IPv6
		fd = socket(AF_INET, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
		address = &any4;
		size = sizeof any4;
	} else {
		setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
	}
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (bind(fd, address, size) < 0 || (type == SOCK_STREAM && listen(fd, 1024) < 0)) {
		fprintf(stderr, "labtool: cannot serve port %u: %s\n", port, strerror(errno));
		exit(1);
	}
	return fd;
}

static struct conn *add_conn(int epoll, int fd, enum kind kind)
{
	struct conn *c = calloc(1, sizeof *c);
	if (!c) {
		close(fd);
		return NULL;
	}
	c->fd = fd;
	c->kind = kind;
	struct epoll_event ev = {.events = EPOLLIN, .data.ptr = c};
	epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &ev);
	return c;
}

static void end_conn(struct conn *c)
{
	close(c->fd);
	free(c);
}

static void accept_all(int epoll, struct conn *listener)
{
	for (;;) {
		int fd = accept4(listener->fd, NULL, NULL, SOCK_CLOEXEC), on = 1;
		if (fd < 0)
			return;
		struct timeval patience = {.tv_sec = 1}; // one client that doesn't read must not hold up the others for long
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
		setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
		add_conn(epoll, fd, listener->kind == LISTEN_TCP ? CONN_TCP : CONN_HTTP);
	}
}

static void serve_udp(struct conn *c)
{
	char data[65536], answer[512];
	struct sockaddr_storage peer;
	for (int i = 0; i < 64; i++) {
		socklen_t len = sizeof peer;
		ssize_t n = recvfrom(c->fd, data, sizeof data, 0, (void *)&peer, &len);
		if (n < 0)
			return; // also errors that earlier answers met: they concern one client only
		if (n >= 3 && !memcmp(data, "who", 3)) {
			int size = identity(answer, sizeof answer, c->fd, &peer);
			sendto(c->fd, answer, (size_t)size, 0, (void *)&peer, len);
		} else {
			sendto(c->fd, data, (size_t)n, 0, (void *)&peer, len);
		}
	}
}

static bool send_all(int fd, const char *data, size_t size)
{
	while (size) {
		ssize_t n = send(fd, data, size, MSG_NOSIGNAL);
		if (n <= 0)
			return false;
		data += n;
		size -= (size_t)n;
	}
	return true;
}

static bool answer_http(struct conn *c, const struct sockaddr_storage *peer)
{
	char *end;
	while ((end = memmem(c->buffer, c->used, "\r\n\r\n", 4))) {
		char body[512], head[256 + sizeof body];
		*end = 0;
		bool close_after = strcasestr(c->buffer, "connection: close") || strstr(c->buffer, "HTTP/1.0\r\n");
		int body_size = identity(body, sizeof body, c->fd, peer);
		int head_size = snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%s\r\n",
					 body_size, close_after ? "Connection: close\r\n" : "");
		memcpy(head + head_size, body, (size_t)body_size); // one send, one packet
		if (!send_all(c->fd, head, (size_t)(head_size + body_size)) || close_after)
			return false;
		size_t eaten = (size_t)(end - c->buffer) + 4;
		memmove(c->buffer, c->buffer + eaten, c->used - eaten);
		c->used -= eaten;
	}
	return c->used < sizeof c->buffer - 1;
}

static bool answer_tcp(struct conn *c, const struct sockaddr_storage *peer)
{
	char answer[512];
	if (c->used >= 4 && !memcmp(c->buffer, "who\n", 4)) {
		int size = identity(answer, sizeof answer, c->fd, peer);
		c->used = 0;
		return send_all(c->fd, answer, (size_t)size);
	}
	bool ok = send_all(c->fd, c->buffer, c->used);
	c->used = 0;
	return ok;
}

static bool serve_stream(struct conn *c)
{
	struct sockaddr_storage peer;
	socklen_t len = sizeof peer;
	ssize_t n = recv(c->fd, c->buffer + c->used, sizeof c->buffer - 1 - c->used, 0);
	if (n <= 0 || getpeername(c->fd, (void *)&peer, &len) < 0)
		return false;
	c->used += (size_t)n;
	c->buffer[c->used] = 0;
	return c->kind == CONN_HTTP ? answer_http(c, &peer) : answer_tcp(c, &peer);
}

static int cmd_serve(int argc, char **argv)
{
	static const struct option options[] = {{"http", 1, 0, 'h'}, {"tcp", 1, 0, 't'}, {"udp", 1, 0, 'u'}, {"name", 1, 0, 'n'}, {0, 0, 0, 0}};
	int epoll = epoll_create1(EPOLL_CLOEXEC), opt, ports = 0;
	gethostname(server_name, sizeof server_name - 1);
	while ((opt = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (opt == 'n') {
			snprintf(server_name, sizeof server_name, "%s", optarg);
			continue;
		}
		if (opt == '?' || ++ports > MAX_PORTS)
			return 2;
		unsigned port = (unsigned)number(optarg, 65535, "port");
		int type = opt == 'u' ? SOCK_DGRAM : SOCK_STREAM;
		add_conn(epoll, dual_stack(type, port), opt == 'h' ? LISTEN_HTTP : opt == 't' ? LISTEN_TCP : SERVE_UDP);
	}
	if (!ports)
		usage_error("serve: no port given");
	while (!stopped) {
		struct epoll_event events[64];
		int n = epoll_wait(epoll, events, 64, -1);
		for (int i = 0; i < n; i++) {
			struct conn *c = events[i].data.ptr;
			if (c->kind == LISTEN_TCP || c->kind == LISTEN_HTTP)
				accept_all(epoll, c);
			else if (c->kind == SERVE_UDP)
				serve_udp(c);
			else if (!serve_stream(c))
				end_conn(c);
		}
	}
	return 0;
}

// ---- clients ---------------------------------------------------------------------------------------------------

struct client {
	const char *proto, *host, *source;
	unsigned port;
	unsigned long timeout_ms, count, interval_ms, concurrency, seconds, milliseconds, interval_us, stall_ms;
	struct sockaddr_storage address;
	socklen_t address_len;
};

static const char *result_of(int err)
{
	switch (err) {
	case 0: return "ok";
	case ECONNREFUSED: return "refused";
	case ECONNRESET:
	case EPIPE: return "reset";
	case EHOSTUNREACH:
	case ENETUNREACH:
	case ENONET: return "unreachable";
	case EACCES:
	case EPERM: return "prohibited";
	case EAGAIN:
	case EINPROGRESS:
	case ETIMEDOUT: return "timeout";
	case EMSGSIZE: return "too-big";
	case EPROTO: return "bad-answer";
	default: return "error";
	}
}

static int open_socket(const struct client *c, int type, int proto)
{
	int fd = socket(c->address.ss_family, type | SOCK_CLOEXEC, proto), on = 1;
	if (fd < 0)
		return -1;
	struct timeval tv = {.tv_sec = (time_t)(c->timeout_ms / 1000), .tv_usec = (suseconds_t)(c->timeout_ms % 1000) * 1000};
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof tv); // bounds connect as well
	if (type == SOCK_STREAM)
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	if (c->address.ss_family == AF_INET)
		setsockopt(fd, IPPROTO_IP, IP_RECVERR, &on, sizeof on); // so that ICMP errors end the wait
	else
		setsockopt(fd, IPPROTO_IPV6, IPV6_RECVERR, &on, sizeof on);
	if (c->source) {
		struct sockaddr_storage source;
		socklen_t len = parse_address(c->source, 0, &source);
		if (bind(fd, (void *)&source, len) < 0) {
			close(fd);
			return -1;
		}
	}
	if (connect(fd, (const void *)&c->address, c->address_len) < 0) {
		int err = errno;
		close(fd);
		errno = err;
		return -1;
	}
	return fd;
}

// One request and its answer on an open connection; 0 or an errno
static int exchange(int fd, const char *request, size_t size, char *answer, size_t answer_size)
{
	if (send(fd, request, size, MSG_NOSIGNAL) != (ssize_t)size)
		return errno;
	ssize_t n = recv(fd, answer, answer_size - 1, 0);
	if (n < 0)
		return errno;
	if (n == 0)
		return ECONNRESET;
	answer[n] = 0;
	return 0;
}

static int http_exchange(int fd, const struct client *c, bool keep, char *answer, size_t size)
{
	char request[256];
	char host[64];
	snprintf(host, sizeof host, c->address.ss_family == AF_INET6 ? "[%s]" : "%s", c->host);
	int n = snprintf(request, sizeof request, "GET / HTTP/1.1\r\nHost: %s:%u\r\n%s\r\n", host, c->port, keep ? "" : "Connection: close\r\n");
	int err = exchange(fd, request, (size_t)n, answer, size);
	if (err)
		return err;
	return strncmp(answer, "HTTP/1.", 7) ? EPROTO : 0;
}

static uint16_t checksum(const void *data, size_t size)
{
	const uint16_t *p = data;
	uint32_t sum = 0;
	for (; size > 1; size -= 2)
		sum += *p++;
	sum = (sum >> 16) + (sum & 0xffff);
	return (uint16_t)~(sum + (sum >> 16));
}

static int icmp_exchange(int fd, bool v6, uint16_t id, uint16_t seq)
{
	struct icmphdr request = {.type = v6 ? ICMP6_ECHO_REQUEST : ICMP_ECHO};
	uint8_t reply[1500];
	request.un.echo.id = id;
	request.un.echo.sequence = seq;
	if (!v6) // the kernel fills in ICMPv6's
		request.checksum = checksum(&request, sizeof request);
	if (send(fd, &request, sizeof request, 0) < 0)
		return errno;
	for (;;) {
		ssize_t n = recv(fd, reply, sizeof reply, 0);
		if (n < 0)
			return errno;
		size_t skip = v6 ? 0 : (size_t)(reply[0] & 15) * 4;
		struct icmphdr *got = (void *)(reply + skip);
		if ((size_t)n >= skip + sizeof *got && got->type == (v6 ? ICMP6_ECHO_REPLY : ICMP_ECHOREPLY) && got->un.echo.id == id &&
		    got->un.echo.sequence == seq)
			return 0;
	}
}

static int probe_once(const struct client *c, char *answer, size_t size)
{
	static _Atomic uint16_t sequence;
	bool v6 = c->address.ss_family == AF_INET6, udp = !strcmp(c->proto, "udp"), icmp = !strcmp(c->proto, "icmp");
	int err, fd = open_socket(c, icmp ? SOCK_RAW : udp ? SOCK_DGRAM : SOCK_STREAM, icmp ? (v6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP) : 0);
	answer[0] = 0;
	if (fd < 0)
		return errno;
	if (icmp)
		err = icmp_exchange(fd, v6, (uint16_t)getpid(), ++sequence);
	else if (!strcmp(c->proto, "http"))
		err = http_exchange(fd, c, false, answer, size);
	else
		err = exchange(fd, "who\n", 4, answer, size);
	close(fd);
	return err;
}

static void print_json_text(FILE *out, const char *text)
{
	fputc('"', out);
	for (; *text; text++) {
		unsigned char ch = (unsigned char)*text;
		if (ch == '"' || ch == '\\')
			fprintf(out, "\\%c", ch);
		else if (ch < 0x20 || ch >= 0x7f)
			fprintf(out, "\\u%04x", ch);
		else
			fputc(ch, out);
	}
	fputc('"', out);
}

// What our own servers say is JSON and stands as such under "answer"; what others say is text, its end cut off
static void print_answer(FILE *out, const char *proto, char *answer)
{
	char *body = answer;
	if (!strcmp(proto, "http")) {
		fprintf(out, ",\"status\":%d", atoi(answer + 9));
		body = strstr(answer, "\r\n\r\n");
		body = body ? body + 4 : answer;
	}
	body[strcspn(body, "\r\n")] = 0;
	fputs(",\"answer\":", out);
	if (!strncmp(body, "{\"name\":", 8) && body[strlen(body) - 1] == '}')
		fputs(body, out);
	else
		print_json_text(out, body);
}

static pthread_mutex_t print_lock = PTHREAD_MUTEX_INITIALIZER;
static atomic_ulong attempts_left, failures;

static void *probe_thread(void *arg)
{
	const struct client *c = arg;
	char answer[BUFFER];
	while (!stopped) {
		unsigned long left = atomic_load(&attempts_left);
		do {
			if (!left)
				return NULL;
		} while (!atomic_compare_exchange_weak(&attempts_left, &left, left - 1));
		uint64_t begin = now_us();
		int err = probe_once(c, answer, sizeof answer);
		uint64_t took = now_us() - begin;
		if (err)
			atomic_fetch_add(&failures, 1);
		pthread_mutex_lock(&print_lock);
		printf("{\"result\":\"%s\",\"proto\":\"%s\",\"host\":\"%s\",\"port\":%u,\"latency_us\":%lu", result_of(err), c->proto, c->host,
		       c->port, (unsigned long)took);
		if (err)
			printf(",\"error\":\"%s\"", strerror(err));
		else if (answer[0])
			print_answer(stdout, c->proto, answer);
		puts("}");
		fflush(stdout);
		pthread_mutex_unlock(&print_lock);
		if (left > 1 && c->interval_ms)
			sleep_us(c->interval_ms * 1000);
	}
	return NULL;
}

static void run_threads(void *(*body)(void *), struct client *c)
{
	pthread_t threads[MAX_THREADS];
	unsigned long started = 0;
	while (started < c->concurrency && !pthread_create(&threads[started], NULL, body, c))
		started++;
	for (unsigned long i = 0; i < started; i++)
		pthread_join(threads[i], NULL);
}

// ---- load ------------------------------------------------------------------------------------------------------

static atomic_ulong operations, errors;
static uint64_t load_end;
static bool new_connection_each;

static int open_for(const struct client *c)
{
	return open_socket(c, !strcmp(c->proto, "udp") ? SOCK_DGRAM : SOCK_STREAM, 0);
}

static int one_operation(const struct client *c, int fd, char *answer)
{
	if (!strcmp(c->proto, "http"))
		return http_exchange(fd, c, !new_connection_each, answer, BUFFER);
	return exchange(fd, "x", 1, answer, BUFFER);
}

static void *load_thread(void *arg)
{
	const struct client *c = arg;
	char answer[BUFFER];
	int fd = -1;
	while (!stopped && now_us() < load_end) {
		if (fd < 0)
			fd = open_for(c);
		int err = fd < 0 ? errno : one_operation(c, fd, answer);
		atomic_fetch_add(err ? &errors : &operations, 1);
		if (fd >= 0 && (err || new_connection_each)) {
			// a load of short connections would run out of ports in TIME_WAIT: end with a reset
			struct linger abort_on_close = {.l_onoff = 1};
			setsockopt(fd, SOL_SOCKET, SO_LINGER, &abort_on_close, sizeof abort_on_close);
			close(fd);
			fd = -1;
		}
		if (err)
			sleep_us(1000);
	}
	if (fd >= 0)
		close(fd);
	return NULL;
}

static int load(struct client *c)
{
	uint64_t begin = now_us();
	load_end = begin + (c->milliseconds ? c->milliseconds * 1000 : c->seconds * 1000000);
	run_threads(load_thread, c);
	double seconds = (double)(now_us() - begin) / 1e6;
	printf("{\"mode\":\"%s\",\"proto\":\"%s\",\"operations\":%lu,\"errors\":%lu,\"seconds\":%.3f,\"per_second\":%.1f}\n",
	       new_connection_each ? "crr" : "rr", c->proto, operations, errors, seconds, (double)operations / seconds);
	return errors ? 1 : 0;
}

// ---- stream ----------------------------------------------------------------------------------------------------

struct stream {
	uint64_t sent, received, gaps, stalls, late_us, last_us, expected;
	int error;
	size_t used;
	char buffer[1 << 16];
};

static void stream_event(const char *event, uint64_t value)
{
	printf("{\"event\":\"%s\",\"value\":%lu}\n", event, (unsigned long)value);
	fflush(stdout);
}

static void got_number(struct stream *s, uint64_t n)
{
	if (n != s->expected) {
		s->gaps++;
		stream_event("gap", s->expected);
	}
	s->expected = n + 1;
	s->received++;
}

static void take_answers(struct stream *s, uint64_t stall_us)
{
	uint64_t now = now_us(), waited = now - s->last_us;
	char *line = s->buffer, *end;
	s->buffer[s->used] = 0;
	while ((end = memchr(line, '\n', (size_t)(s->buffer + s->used - line)))) {
		*end = 0;
		got_number(s, strtoull(line, NULL, 10));
		line = end + 1;
	}
	s->used -= (size_t)(line - s->buffer);
	memmove(s->buffer, line, s->used);
	if (waited > s->late_us)
		s->late_us = waited;
	if (waited > stall_us) {
		s->stalls++;
		stream_event("stall_us", waited);
	}
	s->last_us = now;
}

static bool stream_read(struct stream *s, int fd, uint64_t stall_us)
{
	ssize_t n = recv(fd, s->buffer + s->used, sizeof s->buffer - 1 - s->used, MSG_DONTWAIT);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return true;
	if (n <= 0) {
		s->error = n ? errno : ECONNRESET;
		return false;
	}
	s->used += (size_t)n;
	take_answers(s, stall_us);
	return true;
}

static bool stream_write(struct stream *s, int fd)
{
	char line[32];
	int size = snprintf(line, sizeof line, "%lu\n", (unsigned long)s->sent);
	ssize_t n = send(fd, line, (size_t)size, MSG_NOSIGNAL | MSG_DONTWAIT);
	if (n == size) {
		s->sent++;
		return true;
	}
	if (n < 0 && errno == EAGAIN)
		return true; // the window is full: a stall shows by itself
	s->error = n < 0 ? errno : EIO;
	return false;
}

static void stream_run(struct stream *s, int fd, const struct client *c)
{
	uint64_t end = c->seconds ? now_us() + c->seconds * 1000000 : UINT64_MAX, next = now_us(), drain = 0;
	s->last_us = next;
	for (;;) {
		uint64_t now = now_us();
		if (!drain && (stopped || now >= end))
			drain = now + c->timeout_ms * 1000;
		if (drain && (s->received == s->sent || now >= drain))
			return;
		if (!drain && now >= next) {
			if (!stream_write(s, fd))
				return;
			next += c->interval_us;
			if (next < now) // after a pause of the whole process don't make up for it in a burst
				next = now + c->interval_us;
		}
		struct pollfd p = {.fd = fd, .events = POLLIN};
		uint64_t wait = drain ? drain - now : next > now ? next - now : 0;
		struct timespec ts = {.tv_sec = (time_t)(wait / 1000000), .tv_nsec = (long)(wait % 1000000) * 1000};
		if (ppoll(&p, 1, &ts, NULL) > 0 && !stream_read(s, fd, c->stall_ms * 1000))
			return;
	}
}

static int stream(struct client *c)
{
	static struct stream s;
	int fd = open_for(c);
	if (fd < 0) {
		printf("{\"event\":\"%s\",\"ok\":false,\"error\":\"%s\"}\n", result_of(errno), strerror(errno));
		return 1;
	}
	stream_event("connected", 1);
	stream_run(&s, fd, c);
	uint64_t silent = s.received < s.sent ? now_us() - s.last_us : 0;
	if (silent > s.late_us)
		s.late_us = silent;
	bool ok = !s.error && !s.gaps && !s.stalls && s.received == s.sent;
	printf("{\"ok\":%s,\"sent\":%lu,\"received\":%lu,\"lost\":%lu,\"gaps\":%lu,\"stalls\":%lu,\"longest_wait_us\":%lu,\"ended\":\"%s\"}\n",
	       ok ? "true" : "false", s.sent, s.received, s.sent - s.received, s.gaps, s.stalls, s.late_us, s.error ? result_of(s.error) : "by us");
	close(fd);
	return ok ? 0 : 1;
}

// ---- main ------------------------------------------------------------------------------------------------------

static void client_options(struct client *c, int argc, char **argv)
{
	static const struct option options[] = {
		{"timeout", 1, 0, 't'}, {"count", 1, 0, 'n'}, {"interval", 1, 0, 'i'}, {"concurrency", 1, 0, 'c'},
		{"seconds", 1, 0, 's'}, {"milliseconds", 1, 0, 'm'}, {"stall", 1, 0, 'l'}, {"source", 1, 0, 'a'}, {0, 0, 0, 0}};
	int opt;
	while ((opt = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (opt) {
		case 't': c->timeout_ms = number(optarg, 3600000, "timeout"); break;
		case 'n': c->count = number(optarg, 100000000, "count"); break;
		case 'i': c->interval_ms = c->interval_us = number(optarg, 3600000000, "interval"); break;
		case 'c': c->concurrency = number(optarg, MAX_THREADS, "concurrency"); break;
		case 's': c->seconds = number(optarg, 1000000, "seconds"); break;
		case 'm': c->milliseconds = number(optarg, 1000000000, "milliseconds"); break;
		case 'l': c->stall_ms = number(optarg, 3600000, "stall"); break;
		case 'a': c->source = optarg; break;
		default: exit(2);
		}
	}
	if (argc - optind < 3 && !(argc - optind == 2 && !strcmp(argv[optind], "icmp")))
		usage_error("%s needs PROTOCOL HOST PORT", argv[0]);
	c->proto = argv[optind];
	c->host = argv[optind + 1];
	c->port = argc - optind > 2 ? (unsigned)number(argv[optind + 2], 65535, "port") : 0;
	c->address_len = parse_address(c->host, strcmp(c->proto, "icmp") ? c->port : 0, &c->address);
}

static void need_protocol(const struct client *c, const char *const *known)
{
	for (; *known; known++)
		if (!strcmp(c->proto, *known))
			return;
	usage_error("%s isn't possible here", c->proto);
}

static int cmd_client(const char *mode, int argc, char **argv)
{
	static const char *const any[] = {"tcp", "http", "udp", "icmp", NULL}, *const loads[] = {"tcp", "http", "udp", NULL},
			  *const connections[] = {"tcp", "http", NULL}, *const streams[] = {"tcp", "udp", NULL};
	struct client c = {.timeout_ms = 1000, .count = 1, .concurrency = 1, .seconds = 5, .interval_us = 1000, .stall_ms = 200};
	if (!strcmp(mode, "stream"))
		c.seconds = 0;
	client_options(&c, argc, argv);
	need_protocol(&c, !strcmp(mode, "probe") ? any : !strcmp(mode, "rr") ? loads : !strcmp(mode, "crr") ? connections : streams);
	if (!strcmp(mode, "stream"))
		return stream(&c);
	if (strcmp(mode, "probe")) {
		new_connection_each = !strcmp(mode, "crr");
		return load(&c);
	}
	atomic_store(&attempts_left, c.count);
	run_threads(probe_thread, &c);
	return failures ? 1 : 0;
}

int main(int argc, char **argv)
{
	static const char *const clients[] = {"probe", "rr", "crr", "stream", NULL};
	const char *mode = argc > 1 ? argv[1] : "";
	handle_stop();
	for (int i = 0; clients[i]; i++)
		if (!strcmp(mode, clients[i]))
			return cmd_client(mode, argc - 1, argv + 1);
	if (!strcmp(mode, "serve"))
		return cmd_serve(argc - 1, argv + 1);
	if (!strcmp(mode, "sleep")) {
		uint64_t end = argc > 2 ? now_us() + number(argv[2], 1000000000, "seconds") * 1000000 : UINT64_MAX;
		while (!stopped && now_us() < end)
			sleep_us(end - now_us() > 3600000000ULL ? 3600000000ULL : end - now_us());
		return 0;
	}
	fputs("usage: labtool serve | probe | rr | crr | stream | sleep (see the head of its source)\n", stderr);
	return 2;
}
