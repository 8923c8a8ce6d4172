/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fimbria-cni: the CNI plugin binary (CNI 1.1.0). It is started once for every pod operation, on a host that may have no
 * Python at all, so it only hands the request to the agent and the agent's answer to the runtime.
 *
 * Request on the socket: u32 length, u32 number of variables, "KEY=VALUE\0"..., then the network configuration from stdin;
 * the pod's network namespace goes along as an open descriptor (SCM_RIGHTS), so the agent need not share our mounts.
 * Answer: u32 exit status, then what goes to stdout until the end of the stream. Integers are in network byte order.
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
#include <unistd.h>

#define DEFAULT_SOCKET "/run/fimbria/cni.sock"
#define MAX_CONFIG (1 << 20)
#define MAX_REQUEST (MAX_CONFIG + (64 << 10))
#define ANSWER_TIMEOUT_SECONDS 100

enum cni_error { /* CNI specification, section "Error codes" */
	CNI_INVALID_ENVIRONMENT = 4,
	CNI_IO_FAILURE = 5,
	CNI_DECODE_FAILURE = 6,
	CNI_TRY_AGAIN_LATER = 11,
	CNI_NOT_AVAILABLE = 50, /* STATUS */
};

static const char *const forwarded[] = {
	"CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH", "CNI_NETNS_OVERRIDE",
};

static char request[MAX_REQUEST];
static char config[MAX_CONFIG + 1];
static char version[16] = "1.1.0";

static int fail(enum cni_error code, const char *what, const char *details)
{
	printf("{\"cniVersion\":\"%s\",\"code\":%d,\"msg\":\"%s\",\"details\":\"%s\"}\n", version, code, what, details);
	return 1;
}

/* The error must carry the version of the request; a full parser for that one word would be larger than all the rest. */
static void find_version(void)
{
	const char *at = strstr(config, "\"cniVersion\"");
	size_t n = 0;

	if (!at)
		return;
	at += strlen("\"cniVersion\"");
	at += strspn(at, " \t\r\n:");
	if (*at++ != '"')
		return;
	while (n < sizeof(version) - 1 && ((at[n] >= '0' && at[n] <= '9') || at[n] == '.'))
		n++;
	if (n && at[n] == '"') {
		memcpy(version, at, n);
		version[n] = 0;
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

static int dial(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	struct timeval timeout = { .tv_sec = ANSWER_TIMEOUT_SECONDS };
	int fd;

	if (strlen(path) >= sizeof(address.sun_path)) {
		errno = ENAMETOOLONG;
		return -1;
	}
	strcpy(address.sun_path, path);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -1;
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
	if (connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0)
		return fd;
	close(fd);
	return -1;
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
		ssize_t n = sendmsg(fd, &message, MSG_NOSIGNAL);

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

static ssize_t read_some(int fd, void *into, size_t size)
{
	ssize_t n;

	do
		n = read(fd, into, size);
	while (n < 0 && errno == EINTR);
	return n;
}

/* Nothing reaches stdout before the whole answer is there: half a result and then an error would be no JSON at all. */
static int relay_answer(int fd)
{
	static char answer[MAX_CONFIG];
	size_t length = 0;
	uint32_t status;
	ssize_t n;

	while ((n = read_some(fd, answer + length, sizeof(answer) - length)) > 0)
		length += (size_t)n;
	if (n < 0 || length < sizeof(status))
		return fail(CNI_TRY_AGAIN_LATER, "the Fimbria agent did not answer",
			    "it may just be restarting; see the agent's log");
	memcpy(&status, answer, sizeof(status));
	fwrite(answer + sizeof(status), 1, length - sizeof(status), stdout);
	return (int)ntohl(status);
}

static int print_versions(void)
{
	printf("{\"cniVersion\":\"%s\",\"supportedVersions\":[\"0.3.0\",\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\"]}\n", version);
	return 0;
}

int main(void)
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

	for (size_t i = 0; i < sizeof(forwarded) / sizeof(*forwarded); i++) {
		const char *value = getenv(forwarded[i]);
		size_t room = sizeof(request) - MAX_CONFIG - length;
		int n;

		if (!value)
			continue;
		n = snprintf(request + length, room, "%s=%s", forwarded[i], value);
		if (n < 0 || (size_t)n >= room)
			return fail(CNI_INVALID_ENVIRONMENT, "the CNI variables are too long", forwarded[i]);
		length += (size_t)n + 1;
		variables++;
	}
	memcpy(request + length, config, (size_t)config_length);
	length += (size_t)config_length;
	word = htonl((uint32_t)(length - 4));
	memcpy(request, &word, 4);
	word = htonl(variables);
	memcpy(request + 4, &word, 4);

	if (path && *path) {
		netns = open(path, O_RDONLY | O_CLOEXEC);
		/* On DEL the namespace may be gone already, and the agent still has to clean up. */
		if (netns < 0 && !strcmp(command, "ADD"))
			return fail(CNI_INVALID_ENVIRONMENT, "cannot open CNI_NETNS", strerror(errno));
	}
	fd = dial(socket_path && *socket_path ? socket_path : DEFAULT_SOCKET);
	if (fd < 0)
		return fail(strcmp(command, "STATUS") ? CNI_TRY_AGAIN_LATER : CNI_NOT_AVAILABLE,
			    "the Fimbria agent is not reachable on this node", strerror(errno));
	if (send_request(fd, length, netns))
		return fail(CNI_TRY_AGAIN_LATER, "cannot hand the request to the Fimbria agent", strerror(errno));
	return relay_answer(fd);
}
