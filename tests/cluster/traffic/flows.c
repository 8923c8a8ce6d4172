// SPDX-License-Identifier: Apache-2.0
// Traffic that never ends and accounts for every packet of it, so that what is lost has a time and a way.
//   flows serve tcp/PORT|udp/PORT...      servers (serve.c)
//   flows run FLOW...                     clients, for ever; prints JSON lines
//   flows born SERVER... -- FLOW...       one exchange of each flow, all at once; serves if none failed, ends with 1 if one did
// FLOW: NAME,KIND,ADDRESS,PORT,MILLISECONDS[,QUERY]. KIND:
//   tcp      one connection as long as it lives, a numbered line each time
//   connect  a new connection each time: there, a line, an answer, closed by both
//   udp      one socket, a numbered datagram each time, many under way
//   ask      a new UDP socket each time
//   dns      the same, for the address of QUERY
// Lines: {"at":US,"flow":NAME,"what":WHAT,"number":N,"began":US,"more":TEXT} for what went wrong, and each second
// {"at":US,"flows":{NAME:[SENT,ANSWERED,LOST,RESENT,WORST US of this second]}}, counted since the beginning. WHAT:
//   lost     a connection, request or datagram came to nothing: `more` says how
//   broken   a connection that lived for long ended
//   resent   an exchange succeeded only because a segment (SYN too) was sent again that the other end hadn't got
#include "common.h"
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <sys/resource.h>

enum { MAX_FLOWS = 48, UNDER_WAY = 1024, PATIENCE_US = 10000000, PAUSE_US = 100000, PRIORITY = -15 };

struct flow {
	char name[64], kind[8], host[48], query[128];
	unsigned port, interval_ms;
	struct sockaddr_storage address;
	socklen_t size;
	_Atomic uint64_t sent, answered, lost, resent, worst_us;
	uint64_t before; // resent in connections that are gone
	bool first_failed;
};

static pthread_mutex_t printing = PTHREAD_MUTEX_INITIALIZER;

__attribute__((format(printf, 5, 6))) static void report(struct flow *f, const char *what, uint64_t number, uint64_t began, const char *more, ...)
{
	va_list ap;
	pthread_mutex_lock(&printing);
	printf("{\"at\":%lu,\"flow\":\"%s\",\"what\":\"%s\",\"number\":%lu,\"began\":%lu,\"more\":\"", (unsigned long)now_us(), f->name, what,
	       (unsigned long)number, (unsigned long)began);
	va_start(ap, more);
	vprintf(more, ap);
	va_end(ap);
	puts("\"}");
	fflush(stdout);
	pthread_mutex_unlock(&printing);
}

static void took(struct flow *f, uint64_t began)
{
	uint64_t us = now_us() - began, worst = atomic_load(&f->worst_us);
	atomic_fetch_add(&f->answered, 1);
	while (us > worst && !atomic_compare_exchange_weak(&f->worst_us, &worst, us))
		;
}

static void failed(struct flow *f, const char *what, uint64_t number, uint64_t began, const char *step, int err)
{
	atomic_fetch_add(&f->lost, 1);
	report(f, what, number, began, "%s: %s", step, err == EAGAIN || err == EINPROGRESS ? "no answer" : err ? strerror(err) : "closed");
}

static int connected(const struct flow *f, int type)
{
	int fd = socket(f->address.ss_family, type | SOCK_CLOEXEC, 0), on = 1;
	struct timeval patience = {.tv_sec = PATIENCE_US / 1000000};
	if (fd < 0)
		return -1;
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience); // connect, too
	if (type == SOCK_STREAM)
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	if (connect(fd, (const void *)&f->address, f->size) < 0) {
		int err = errno;
		close(fd);
		errno = err;
		return -1;
	}
	return fd;
}

static void pace(uint64_t *next, unsigned interval_ms)
{
	uint64_t now = now_us();
	*next += (uint64_t)interval_ms * 1000;
	if (*next <= now)
		*next = now; // what a pause of the whole machine kept us from is not made up for in a burst
	else
		sleep_us(*next - now);
}

// Segments sent again because the other end hadn't got them: ours, and those that the server tells of its side.
static uint64_t truly(struct resent ours, uint32_t all, uint32_t needless)
{
	uint64_t here = ours.all > ours.needless ? ours.all - ours.needless : 0;
	return here + (all > needless ? all - needless : 0);
}

// ---- a connection as long as it lives ------------------------------------------------------------------------------

struct talk {
	int fd;
	uint64_t sent, answered, when[UNDER_WAY];
	uint32_t all, needless; // the server's
	size_t used;
	char buffer[1 << 14];
};

static bool hear(struct flow *f, struct talk *t)
{
	ssize_t n = recv(t->fd, t->buffer + t->used, sizeof t->buffer - t->used, MSG_DONTWAIT);
	if (n < 0 && errno == EAGAIN)
		return true;
	if (n <= 0) {
		failed(f, "broken", t->answered, t->when[t->answered % UNDER_WAY], "receive", n ? errno : 0);
		return false;
	}
	t->used += (size_t)n;
	for (char *end; (end = memchr(t->buffer, '\n', t->used));) {
		unsigned long number;
		*end = 0;
		if (sscanf(t->buffer, "%lu %u %u", &number, &t->all, &t->needless) != 3 || number != t->answered) {
			report(f, "broken", t->answered, t->when[t->answered % UNDER_WAY], "said %.60s", t->buffer);
			atomic_fetch_add(&f->lost, 1);
			return false;
		}
		took(f, t->when[t->answered++ % UNDER_WAY]);
		size_t eaten = (size_t)(end + 1 - t->buffer);
		memmove(t->buffer, end + 1, t->used - eaten);
		t->used -= eaten;
	}
	return true;
}

static bool say(struct flow *f, struct talk *t)
{
	char line[32];
	if (t->sent - t->answered == UNDER_WAY) {
		failed(f, "broken", t->answered, t->when[t->answered % UNDER_WAY], "receive", EAGAIN);
		return false;
	}
	int size = snprintf(line, sizeof line, "%lu\n", (unsigned long)t->sent);
	t->when[t->sent % UNDER_WAY] = now_us();
	ssize_t n = send(t->fd, line, (size_t)size, MSG_NOSIGNAL | MSG_DONTWAIT);
	if (n != size) {
		failed(f, "broken", t->sent, t->when[t->sent % UNDER_WAY], "send", n < 0 ? errno : EIO);
		return false;
	}
	t->sent++;
	atomic_fetch_add(&f->sent, 1);
	return true;
}

static void talk(struct flow *f, struct talk *t)
{
	for (uint64_t next = now_us();;) {
		uint64_t now = now_us();
		if (now >= next) {
			if (!say(f, t))
				return;
			next = (next + f->interval_ms * 1000 > now ? next : now) + f->interval_ms * 1000;
		}
		struct pollfd p = {.fd = t->fd, .events = POLLIN};
		struct timespec wait = {0, next > now ? (long)((next - now) % 1000000) * 1000 : 0};
		if (ppoll(&p, 1, &wait, NULL) > 0 && !hear(f, t))
			return;
		atomic_store(&f->resent, f->before + truly(resent_of(t->fd), t->all, t->needless));
	}
}

static void tcp(struct flow *f)
{
	struct talk *t = calloc(1, sizeof *t);
	for (;; sleep_us(PAUSE_US)) {
		uint64_t began = now_us();
		memset(t, 0, sizeof *t);
		t->fd = connected(f, SOCK_STREAM);
		if (t->fd < 0) {
			failed(f, "lost", f->sent, began, "connect", errno);
			continue;
		}
		talk(f, t);
		f->before = f->resent;
		close(t->fd);
	}
}

// ---- one socket, datagrams -----------------------------------------------------------------------------------------

struct mail {
	int fd;
	uint64_t sent, judged, when[UNDER_WAY];
	uint32_t arrived; // at the server, by its own count, when it last answered
	uint32_t dropped; // there, for want of room
	uint64_t last;	  // what it last answered
	bool got[UNDER_WAY];
};

static void take_mail(struct flow *f, struct mail *m)
{
	char in[LINE];
	for (ssize_t n; (n = recv(m->fd, in, sizeof in - 1, MSG_DONTWAIT)) != -1 || errno != EAGAIN;) {
		unsigned long number;
		uint32_t count, drops;
		if (n < 0) { // an ICMP error; what it answers is missed as such soon
			report(f, "note", m->sent, now_us(), "receive: %s", strerror(errno));
			continue;
		}
		in[n] = 0;
		if (sscanf(in, "%lu %u %u", &number, &count, &drops) != 3 || number >= m->sent || number < m->judged || m->got[number % UNDER_WAY])
			continue; // too late to count, or twice
		m->got[number % UNDER_WAY] = true;
		m->arrived = count;
		m->dropped = drops;
		m->last = number;
		took(f, m->when[number % UNDER_WAY]);
	}
}

static void miss_mail(struct flow *f, struct mail *m)
{
	for (uint64_t now = now_us(); m->judged < m->sent; m->judged++) {
		size_t at = m->judged % UNDER_WAY;
		if (!m->got[at]) {
			if (now - m->when[at] < PATIENCE_US)
				return;
			atomic_fetch_add(&f->lost, 1);
			report(f, "lost", m->judged, m->when[at], "no answer; at number %lu the server had got %u, and no room for %u of all",
			       (unsigned long)m->last, m->arrived, m->dropped);
		}
		m->got[at] = false;
	}
}

static void udp(struct flow *f)
{
	struct mail *m = calloc(1, sizeof *m);
	while ((m->fd = connected(f, SOCK_DGRAM)) < 0) {
		failed(f, "lost", 0, now_us(), "connect", errno);
		sleep_us(PAUSE_US);
	}
	make_room(m->fd);
	for (uint64_t next = now_us();;) {
		uint64_t now = now_us();
		if (now >= next && m->sent - m->judged < UNDER_WAY) {
			char line[32];
			int size = snprintf(line, sizeof line, "%lu", (unsigned long)m->sent);
			m->when[m->sent % UNDER_WAY] = now;
			for (int tries = 0; send(m->fd, line, (size_t)size, MSG_NOSIGNAL) < 0 && tries < 3; tries++)
				report(f, "note", m->sent, now, "send: %s", strerror(errno)); // most likely an earlier one's ICMP error
			m->sent++;
			atomic_fetch_add(&f->sent, 1);
			next = (next + f->interval_ms * 1000 > now ? next : now) + f->interval_ms * 1000;
		}
		struct pollfd p = {.fd = m->fd, .events = POLLIN};
		struct timespec wait = {0, next > now ? (long)((next - now) % 1000000) * 1000 : 1000000};
		if (ppoll(&p, 1, &wait, NULL) > 0)
			take_mail(f, m);
		miss_mail(f, m);
	}
}

// ---- something new each time -------------------------------------------------------------------------------------------

// There, a line, an answer, closed by both. False if it was lost.
static bool connect_once(struct flow *f, uint64_t number)
{
	char line[LINE];
	uint64_t began = now_us(), again;
	unsigned long said;
	uint32_t all = 0, needless = 0;
	int fd = connected(f, SOCK_STREAM), size = snprintf(line, sizeof line, "%lu\n", (unsigned long)number);
	if (fd < 0)
		return failed(f, "lost", number, began, "connect", errno), false;
	uint32_t syn = resent_of(fd).all;
	ssize_t n = send(fd, line, (size_t)size, MSG_NOSIGNAL) == size ? recv(fd, line, sizeof line - 1, 0) : -1;
	int err = n < 0 ? errno : 0;
	line[n > 0 ? n : 0] = 0;
	if (n > 0 && (sscanf(line, "%lu %u %u", &said, &all, &needless) != 3 || said != number))
		n = -1, err = EPROTO;
	if (n > 0)
		took(f, began);
	if (n <= 0) {
		close(fd);
		return failed(f, "lost", number, began, "answer", err), false;
	}
	shutdown(fd, SHUT_WR);
	n = recv(fd, line, sizeof line, 0);
	err = n < 0 ? errno : n ? EPROTO : 0;
	again = truly(resent_of(fd), all, needless);
	close(fd);
	if (n)
		return failed(f, "lost", number, began, "end", err), false;
	if (again) {
		atomic_fetch_add(&f->resent, again);
		report(f, "resent", number, began, "%u SYN of ours, %lu segments in all, of the server %u", syn, (unsigned long)again, all - needless);
	}
	return true;
}

static size_t dns_query(const struct flow *f, uint16_t number, char *out)
{
	static const char head[] = {1, 0, 0, 1, 0, 0, 0, 0, 0, 0}, tail[] = {0, 0, 1, 0, 1};
	char *at = out + 12;
	memcpy(out, &number, 2);
	memcpy(out + 2, head, sizeof head);
	for (const char *label = f->query; *label;) {
		size_t size = strcspn(label, ".");
		*at++ = (char)size;
		memcpy(at, label, size);
		at += size;
		label += size + (label[size] == '.');
	}
	memcpy(at, tail, sizeof tail);
	return (size_t)(at - out) + sizeof tail;
}

// RFC 1035, section 4.1.1: the number of the question, RCODE 0, and at least one answer
static int dns_judge(const char *in, ssize_t n, const char *question)
{
	if (n < 12 || memcmp(in, question, 2))
		return EPROTO;
	return (in[3] & 15) || !(in[6] || in[7]) ? ENOENT : 0;
}

static bool ask_once(struct flow *f, uint64_t number)
{
	char line[LINE + 32], in[1024];
	uint64_t began = now_us();
	bool dns = !strcmp(f->kind, "dns");
	int fd = connected(f, SOCK_DGRAM);
	if (fd < 0)
		return failed(f, "lost", number, began, "connect", errno), false;
	size_t size = dns ? dns_query(f, (uint16_t)number, line) : (size_t)snprintf(line, sizeof line, "%lu", (unsigned long)number);
	ssize_t n = send(fd, line, size, 0) == (ssize_t)size ? recv(fd, in, sizeof in - 1, 0) : -1;
	int err = n < 0 ? errno : 0;
	in[n > 0 ? n : 0] = 0;
	close(fd);
	if (!err)
		err = dns ? dns_judge(in, n, line) : strtoull(in, NULL, 10) == number ? 0 : EPROTO;
	if (err)
		return failed(f, "lost", number, began, "answer", err), false;
	took(f, began);
	return true;
}

static bool once(struct flow *f, uint64_t number)
{
	atomic_fetch_add(&f->sent, 1);
	return strcmp(f->kind, "connect") && strcmp(f->kind, "tcp") ? ask_once(f, number) : connect_once(f, number);
}

// ---- main ------------------------------------------------------------------------------------------------------------

static struct flow flows[MAX_FLOWS];

__attribute__((noreturn)) static void usage(const char *what)
{
	fprintf(stderr, "flows: %s: see the head of flows.c\n", what);
	exit(2);
}

static struct flow *parse(int at, const char *text)
{
	static const char *const kinds[] = {"tcp", "connect", "udp", "ask", "dns"};
	if (at == MAX_FLOWS)
		usage("too many flows");
	struct flow *f = &flows[at];
	struct sockaddr_in *in4 = (void *)&f->address;
	struct sockaddr_in6 *in6 = (void *)&f->address;
	bool known = false;
	if (sscanf(text, "%63[^,],%7[^,],%47[^,],%u,%u,%127[^,]", f->name, f->kind, f->host, &f->port, &f->interval_ms, f->query) < 5)
		usage(text);
	for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
		known |= !strcmp(f->kind, kinds[i]);
	if (!known || !f->interval_ms || f->interval_ms > 900 || f->port > 65535)
		usage(text);
	if (inet_pton(AF_INET, f->host, &in4->sin_addr) == 1) {
		in4->sin_family = AF_INET, in4->sin_port = htons((uint16_t)f->port), f->size = sizeof *in4;
	} else if (inet_pton(AF_INET6, f->host, &in6->sin6_addr) == 1) {
		in6->sin6_family = AF_INET6, in6->sin6_port = htons((uint16_t)f->port), f->size = sizeof *in6;
	} else {
		usage(text);
	}
	return f;
}

static void *body(void *arg)
{
	struct flow *f = arg;
	if (!strcmp(f->kind, "tcp"))
		tcp(f);
	else if (!strcmp(f->kind, "udp"))
		udp(f);
	uint64_t number = 0, next = now_us();
	for (;; number++, pace(&next, f->interval_ms))
		once(f, number);
	return NULL;
}

static void *body_once(void *arg)
{
	struct flow *f = arg;
	f->first_failed = !once(f, 0);
	return NULL;
}

static int start(int count, void *(*what)(void *), pthread_t *threads)
{
	pthread_attr_t small;
	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 1 << 17);
	for (int i = 0; i < count; i++)
		if (pthread_create(&threads[i], &small, what, &flows[i])) {
			perror("flows: thread");
			exit(1);
		}
	return count;
}

static void tick(int count)
{
	pthread_mutex_lock(&printing);
	printf("{\"at\":%lu,\"flows\":{", (unsigned long)now_us());
	for (int i = 0; i < count; i++) {
		struct flow *f = &flows[i];
		printf("%s\"%s\":[%lu,%lu,%lu,%lu,%lu]", i ? "," : "", f->name, (unsigned long)f->sent, (unsigned long)f->answered, (unsigned long)f->lost,
		       (unsigned long)f->resent, (unsigned long)atomic_exchange(&f->worst_us, 0));
	}
	puts("}}");
	fflush(stdout);
	pthread_mutex_unlock(&printing);
}

__attribute__((noreturn)) static void run(int argc, char **argv)
{
	pthread_t threads[MAX_FLOWS];
	for (int i = 0; i < argc; i++)
		parse(i, argv[i]);
	start(argc, body, threads);
	for (;; sleep_us(1000000))
		tick(argc);
}

static int born(int argc, char **argv)
{
	pthread_t threads[MAX_FLOWS];
	int servers = 0, bad = 0, count = 0;
	while (servers < argc && strcmp(argv[servers], "--"))
		servers++;
	for (int i = servers + 1; i < argc; i++)
		parse(count++, argv[i]);
	start(count, body_once, threads);
	for (int i = 0; i < count; i++) {
		pthread_join(threads[i], NULL);
		bad += flows[i].first_failed || flows[i].resent;
	}
	tick(count);
	return bad ? 1 : serve(servers, argv);
}

static void on_end(int sig)
{
	(void)sig;
	_exit(0);
}

int main(int argc, char **argv)
{
	signal(SIGTERM, on_end); // as pid 1 of a container we would not end otherwise
	signal(SIGINT, on_end);
	setpriority(PRIO_PROCESS, 0, PRIORITY); // what waits for a processor isn't lost; without CAP_SYS_NICE it may look so
	if (argc < 3)
		usage("nothing to do");
	if (!strcmp(argv[1], "serve"))
		return serve(argc - 2, argv + 2);
	if (!strcmp(argv[1], "run"))
		run(argc - 2, argv + 2);
	if (!strcmp(argv[1], "born"))
		return born(argc - 2, argv + 2);
	usage(argv[1]);
}
