/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fimbria-cni: the CNI plugin binary (CNI 1.1.0). It is started once for every pod operation, on a host that may have no
 * Python at all, so it only hands the request to the agent and the agent's answer to the runtime.
 *
 * Request on the socket: u32 length, u32 number of variables, "KEY=VALUE\0"..., then the network configuration from stdin;
 * the pod's network namespace goes along as an open descriptor (SCM_RIGHTS), so the agent need not share our mounts.
 * Answer: u32 exit status, u32 length, then what goes to stdout. Integers are in network byte order.
 * One of the variables is FIMBRIA_PROTOCOL, the number of this protocol: during an upgrade the agent may be of another
 * release. It counts up when an older agent would misunderstand a request; variables that it doesn't know it ignores.
 *
 * What works without an agent: VERSION. Everything else fails with a CNI error that tells the runtime to try again.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define PROTOCOL "FIMBRIA_PROTOCOL=1"
#define DEFAULT_SOCKET "/run/fimbria/cni.sock"
#define MAX_CONFIG (1 << 20)
#define MAX_REQUEST (MAX_CONFIG + (64 << 10))
#define MAX_ANSWER (1 << 20)
#ifndef TIMEOUT_MILLISECONDS /* tests have no time for the real one; kubelet gives up after 120 s */
#define TIMEOUT_MILLISECONDS 100000
#endif
#define AGENT_AWAY_MILLISECONDS (TIMEOUT_MILLISECONDS / 4) /* a restart takes a few seconds, kubelet's next try ten and more */
#define PAUSE_MILLISECONDS 50

enum cni_error { /* CNI specification, section "Error codes" */
	CNI_INVALID_ENVIRONMENT = 4,
	CNI_IO_FAILURE = 5,
	CNI_DECODE_FAILURE = 6,
	CNI_TRY_AGAIN_LATER = 11,
	CNI_NOT_AVAILABLE = 50, /* STATUS */
};

static const char *const forwarded[] = {
	"CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS",
};

static char request[MAX_REQUEST];
static char config[MAX_CONFIG + 1];
static char answer[2 * sizeof(uint32_t) + MAX_ANSWER];
static char version[32] = "1.1.0";
static struct timespec deadline;
static enum cni_error unavailable = CNI_TRY_AGAIN_LATER;

static int fail(enum cni_error code, const char *what, const char *details)
{
	printf("{\"cniVersion\":\"%s\",\"code\":%d,\"msg\":\"%s\",\"details\":\"%s\"}\n", version, code, what, details);
	return 1;
}

/* The end of the string that begins behind `at`: its closing quote, or the end of the text. */
static const char *string_end(const char *at)
{
	while (*at && *at != '"')
		at += *at == '\\' && at[1] ? 2 : 1;
	return at;
}

static void take_version(const char *value)
{
	size_t n;

	value += strspn(value, " \t\r\n");
	if (*value++ != ':')
		return;
	value += strspn(value, " \t\r\n");
	if (*value++ != '"')
		return;
	n = strspn(value, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.+-");
	if (n && n < sizeof(version) && value[n] == '"') {
		memcpy(version, value, n);
		version[n] = 0;
	}
}

/* An error must carry the version of the request, which is the outermost object's: prevResult has one of its own. */
static void find_version(void)
{
	static const char key[] = "cniVersion";
	int depth = 0;

	for (const char *at = config; *at; at++) {
		if (*at == '{' || *at == '[') {
			depth++;
		} else if (*at == '}' || *at == ']') {
			depth--;
		} else if (*at == '"') {
			const char *start = ++at;

			at = string_end(start);
			if (!*at)
				return;
			if (depth == 1 && (size_t)(at - start) == strlen(key) && !memcmp(start, key, strlen(key)))
				take_version(at + 1);
		}
	}
}

static ssize_t read_config(void)
{
	size_t length = 0;

	for (;;) {
		ssize_t n = read(STDIN_FILENO, config + length, MAX_CONFIG - length);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -1;
		if (n == 0)
			return (ssize_t)length;
		length += (size_t)n;
		if (length == MAX_CONFIG) {
			errno = EFBIG;
			return -1;
		}
	}
}

static void start_clock(void)
{
	clock_gettime(CLOCK_MONOTONIC, &deadline);
	deadline.tv_sec += TIMEOUT_MILLISECONDS / 1000;
	deadline.tv_nsec += TIMEOUT_MILLISECONDS % 1000 * 1000000L;
}

/* What is left until the deadline becomes the limit of the next system call: an agent that trickles gains nothing. */
static int limit(int fd, int option)
{
	struct timespec now;
	struct timeval left;
	long long us;

	clock_gettime(CLOCK_MONOTONIC, &now);
	us = (deadline.tv_sec - now.tv_sec) * 1000000LL + (deadline.tv_nsec - now.tv_nsec) / 1000;
	if (us <= 0) {
		errno = ETIMEDOUT;
		return -1;
	}
	left.tv_sec = us / 1000000;
	left.tv_usec = us % 1000000;
	return setsockopt(fd, SOL_SOCKET, option, &left, sizeof(left));
}

static int dial(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd;

	if (strlen(path) >= sizeof(address.sun_path)) {
		errno = ENAMETOOLONG;
		return -1;
	}
	strcpy(address.sun_path, path);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -1;
	if (!limit(fd, SO_SNDTIMEO) && !connect(fd, (struct sockaddr *)&address, sizeof(address)))
		return fd;
	close(fd);
	return -1;
}

/* An agent that is just being restarted, or replaced, is waited for. */
static int dial_patiently(const char *path, int milliseconds)
{
	const struct timespec pause = { .tv_nsec = PAUSE_MILLISECONDS * 1000000L };

	for (;; milliseconds -= PAUSE_MILLISECONDS) {
		int fd = dial(path);

		if (fd >= 0 || milliseconds <= 0 || (errno != ECONNREFUSED && errno != ENOENT))
			return fd;
		nanosleep(&pause, NULL);
	}
}

static int send_request(int fd, size_t length, int netns)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec part = { .iov_base = request, .iov_len = length };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };

	if (netns >= 0) {
		memset(&control, 0, sizeof(control));
		message.msg_control = &control;
		message.msg_controllen = sizeof(control.space);
		control.header.cmsg_level = SOL_SOCKET;
		control.header.cmsg_type = SCM_RIGHTS;
		control.header.cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(&control.header), &netns, sizeof(int));
	}
	while (part.iov_len) {
		ssize_t n = limit(fd, SO_SNDTIMEO) ? -1 : sendmsg(fd, &message, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -1;
		part.iov_base = (char *)part.iov_base + n;
		part.iov_len -= (size_t)n;
		message.msg_control = NULL;
		message.msg_controllen = 0;
	}
	return 0;
}

static int no_answer(const char *why)
{
	return fail(unavailable, "the Fimbria agent did not answer", why);
}

/* Nothing reaches stdout before the whole answer is there: half a result and then an error would be no JSON at all. */
static int relay_answer(int fd)
{
	size_t length = 0, wanted = 2 * sizeof(uint32_t);
	uint32_t word;

	while (length < wanted) {
		ssize_t n = limit(fd, SO_RCVTIMEO) ? -1 : read(fd, answer + length, wanted - length);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return no_answer(errno == EAGAIN || errno == ETIMEDOUT ? "it took too long; see the agent's log" :
									  strerror(errno));
		if (n == 0)
			return no_answer("it may just be restarting; see the agent's log");
		length += (size_t)n;
		if (length == 2 * sizeof(uint32_t)) {
			memcpy(&word, answer + sizeof(word), sizeof(word));
			wanted += ntohl(word);
			if (wanted > sizeof(answer))
				return no_answer("what it said is too long");
		}
	}
	memcpy(&word, answer, sizeof(word));
	fwrite(answer + 2 * sizeof(word), 1, length - 2 * sizeof(word), stdout);
	return ntohl(word) != 0;
}

static int print_versions(void)
{
	printf("{\"cniVersion\":\"%s\",\"supportedVersions\":[\"0.3.0\",\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\"]}\n", version);
	return 0;
}

static int run(void)
{
	const char *command = getenv("CNI_COMMAND");
	const char *path = getenv("CNI_NETNS");
	const char *socket_path = getenv("FIMBRIA_CNI_SOCKET");
	uint32_t variables = 0, word;
	size_t length = 8;
	ssize_t config_length;
	int netns = -1, fd;

	if (!command || !*command)
		return fail(CNI_INVALID_ENVIRONMENT, "CNI_COMMAND is not set",
			    "this program is a CNI plugin and is started by a container runtime");
	config_length = read_config();
	if (config_length < 0)
		return fail(CNI_IO_FAILURE, "cannot read the network configuration from stdin", strerror(errno));
	config[config_length] = 0;
	find_version();
	if (!strcmp(command, "VERSION"))
		return print_versions();
	if (!strcmp(command, "STATUS"))
		unavailable = CNI_NOT_AVAILABLE;

	for (size_t i = 0; i < sizeof(forwarded) / sizeof(*forwarded); i++) {
		const char *value = getenv(forwarded[i]);
		size_t room = sizeof(request) - MAX_CONFIG - sizeof(PROTOCOL) - length;
		int n;

		if (!value)
			continue;
		n = snprintf(request + length, room, "%s=%s", forwarded[i], value);
		if (n < 0 || (size_t)n >= room)
			return fail(CNI_INVALID_ENVIRONMENT, "the CNI variables are too long", forwarded[i]);
		length += (size_t)n + 1;
		variables++;
	}
	memcpy(request + length, PROTOCOL, sizeof(PROTOCOL));
	length += sizeof(PROTOCOL);
	variables++;
	memcpy(request + length, config, (size_t)config_length);
	length += (size_t)config_length;
	word = htonl((uint32_t)(length - 4));
	memcpy(request, &word, 4);
	word = htonl(variables);
	memcpy(request + 4, &word, 4);

	if (path && *path) {
		netns = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO would have us wait for its writer */
		/* On DEL the namespace may be gone already, and the agent still has to clean up. */
		if (netns < 0 && !strcmp(command, "ADD"))
			return fail(CNI_INVALID_ENVIRONMENT, "cannot open CNI_NETNS", strerror(errno));
	}
	start_clock();
	fd = dial_patiently(socket_path && *socket_path ? socket_path : DEFAULT_SOCKET,
			    strcmp(command, "STATUS") ? AGENT_AWAY_MILLISECONDS : 0);
	if (fd < 0)
		return fail(unavailable, "the Fimbria agent is not reachable on this node", strerror(errno));
	if (send_request(fd, length, netns))
		return fail(unavailable, "cannot hand the request to the Fimbria agent", strerror(errno));
	return relay_answer(fd);
}

int main(void)
{
	int status = run();

	if (fflush(stdout) || ferror(stdout)) {
		fprintf(stderr, "fimbria-cni: cannot write the answer: %s\n", strerror(errno));
		return 1;
	}
	return status;
}
