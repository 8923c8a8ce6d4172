// SPDX-License-Identifier: Apache-2.0
// The servers. One answer a line (TCP) or datagram (UDP): the number that came, what the server knows that the client
// can't, whom the server sees, and who it is:
//   TCP  NUMBER RESENT NEEDLESS PEER NAME        segments that the server sent again, and those of them in vain
//   UDP  NUMBER COUNT DROPPED PEER NAME          datagrams that came from this peer so far, and that found no room here
#include "common.h"
#include <linux/sock_diag.h>
#include <sys/epoll.h>

enum { BACKLOG = 4096, PEERS = 4096, MAX_EVENTS = 64 };

struct end {
	int fd;
	enum { LISTENS, STREAM, DATAGRAMS } kind;
	size_t used;
	char buffer[LINE];
};

static char name[65];

static void show(const struct sockaddr_in6 *peer, char *out, size_t size)
{
	char text[INET6_ADDRSTRLEN];
	bool mapped = IN6_IS_ADDR_V4MAPPED(&peer->sin6_addr);
	inet_ntop(mapped ? AF_INET : AF_INET6, peer->sin6_addr.s6_addr + (mapped ? 12 : 0), text, sizeof text);
	snprintf(out, size, "%s", text);
}

static void answer(char *out, size_t size, const char *number, uint32_t a, uint32_t b, const struct sockaddr_in6 *peer)
{
	char seen[INET6_ADDRSTRLEN];
	show(peer, seen, sizeof seen);
	snprintf(out, size, "%.32s %u %u %s %s\n", number, a, b, seen, name);
}

static void watch(int epoll, int fd, int kind)
{
	struct end *e = calloc(1, sizeof *e);
	if (!e) {
		close(fd);
		return;
	}
	e->fd = fd;
	e->kind = kind;
	struct epoll_event ev = {.events = EPOLLIN, .data.ptr = e};
	epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &ev);
}

// How many datagrams came from a peer; peers that share a place forget each other.
static uint32_t counted(const struct sockaddr_in6 *peer)
{
	static struct {
		struct in6_addr addr;
		in_port_t port;
		uint32_t count;
	} seen[PEERS];
	uint32_t hash = peer->sin6_port;
	for (int i = 0; i < 4; i++)
		hash = hash * 31 + peer->sin6_addr.s6_addr32[i];
	hash %= PEERS;
	if (seen[hash].port != peer->sin6_port || memcmp(&seen[hash].addr, &peer->sin6_addr, sizeof peer->sin6_addr)) {
		seen[hash].addr = peer->sin6_addr;
		seen[hash].port = peer->sin6_port;
		seen[hash].count = 0;
	}
	return ++seen[hash].count;
}

static uint32_t dropped(int fd)
{
	uint32_t info[SK_MEMINFO_VARS] = {0};
	socklen_t size = sizeof info;
	getsockopt(fd, SOL_SOCKET, SO_MEMINFO, info, &size);
	return info[SK_MEMINFO_DROPS];
}

static void datagrams(struct end *e)
{
	uint32_t drops = dropped(e->fd);
	for (int i = 0; i < 64; i++) {
		char in[LINE], out[LINE];
		struct sockaddr_in6 peer;
		struct iovec io = {in, sizeof in - 1};
		char control[128];
		struct msghdr m = {&peer, sizeof peer, &io, 1, control, sizeof control, 0};
		ssize_t n = recvmsg(e->fd, &m, MSG_DONTWAIT);
		if (n < 0)
			return; // also what earlier answers met: it concerns one client only
		in[n] = 0;
		answer(out, sizeof out, in, counted(&peer), drops, &peer);
		io = (struct iovec){out, strlen(out)};
		sendmsg(e->fd, &m, MSG_DONTWAIT); // with the control data: from the address that was asked
	}
}

static bool stream(struct end *e)
{
	struct sockaddr_in6 peer;
	socklen_t size = sizeof peer;
	ssize_t n = recv(e->fd, e->buffer + e->used, sizeof e->buffer - 1 - e->used, MSG_DONTWAIT);
	if (n < 0)
		return errno == EAGAIN;
	if (!n || getpeername(e->fd, (void *)&peer, &size) < 0)
		return false;
	e->used += (size_t)n;
	for (char *end; (end = memchr(e->buffer, '\n', e->used));) {
		char out[LINE];
		struct resent r = resent_of(e->fd);
		*end = 0;
		answer(out, sizeof out, e->buffer, r.all, r.needless, &peer);
		if (send(e->fd, out, strlen(out), MSG_NOSIGNAL | MSG_DONTWAIT) != (ssize_t)strlen(out))
			return false;
		size_t eaten = (size_t)(end + 1 - e->buffer);
		memmove(e->buffer, end + 1, e->used - eaten);
		e->used -= eaten;
	}
	return e->used < sizeof e->buffer - 1;
}

static void take(int epoll, int listener)
{
	for (int fd, on = 1; (fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) >= 0;) {
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
		watch(epoll, fd, STREAM);
	}
}

static int open_port(int type, const char *text)
{
	struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)atoi(text))};
	int fd = socket(AF_INET6, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), on = 1, off = 0;
	setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (type == SOCK_DGRAM) {
		setsockopt(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, &on, sizeof on);
		make_room(fd);
	}
	if (fd < 0 || bind(fd, (void *)&any, sizeof any) < 0 || (type == SOCK_STREAM && listen(fd, BACKLOG) < 0)) {
		fprintf(stderr, "flows: can't serve port %s: %s\n", text, strerror(errno));
		exit(1);
	}
	return fd;
}

// PROTOCOL/PORT..., for ever
int serve(int argc, char **argv)
{
	int epoll = epoll_create1(EPOLL_CLOEXEC);
	gethostname(name, sizeof name - 1);
	for (int i = 0; i < argc; i++) {
		bool udp = !strncmp(argv[i], "udp/", 4);
		if (!udp && strncmp(argv[i], "tcp/", 4)) {
			fprintf(stderr, "flows: %s is neither tcp/PORT nor udp/PORT\n", argv[i]);
			return 2;
		}
		watch(epoll, open_port(udp ? SOCK_DGRAM : SOCK_STREAM, argv[i] + 4), udp ? DATAGRAMS : LISTENS);
	}
	for (;;) {
		struct epoll_event events[MAX_EVENTS];
		int n = epoll_wait(epoll, events, MAX_EVENTS, -1);
		for (int i = 0; i < n; i++) {
			struct end *e = events[i].data.ptr;
			if (e->kind == LISTENS)
				take(epoll, e->fd);
			else if (e->kind == DATAGRAMS)
				datagrams(e);
			else if (!stream(e)) {
				close(e->fd);
				free(e);
			}
		}
	}
}
