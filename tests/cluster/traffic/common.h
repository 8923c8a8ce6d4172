// SPDX-License-Identifier: Apache-2.0
// What the two halves of `flows` share: time, addresses, and what the kernel says about a connection.
#pragma once
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { LINE = 256, ROOM = 8 << 20 };

// A datagram that finds no room in its socket isn't the network's loss. Takes CAP_NET_ADMIN; without it the kernel's limit.
static inline void make_room(int fd)
{
	int room = ROOM;
	if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room) < 0)
		setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &room, sizeof room);
}


// Microseconds since 1970: all processes of one machine, and the test that reads them, have one clock.
static inline uint64_t now_us(void)
{
	struct timespec t;
	clock_gettime(CLOCK_REALTIME, &t);
	return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static inline void sleep_us(uint64_t us)
{
	struct timespec t = {.tv_sec = (time_t)(us / 1000000), .tv_nsec = (long)(us % 1000000) * 1000};
	nanosleep(&t, NULL);
}

// Segments that were sent again although the other end hadn't got them. The other end says of each that it had got
// already (RFC 2883): those a busy machine causes, not the network.
struct resent {
	uint32_t all, needless;
};

static inline struct resent resent_of(int fd)
{
	struct tcp_info info;
	socklen_t size = sizeof info;
	memset(&info, 0, sizeof info);
	if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) < 0)
		return (struct resent){0, 0};
	return (struct resent){info.tcpi_total_retrans, info.tcpi_dsack_dups};
}

int serve(int argc, char **argv);
