/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
#pragma once
#include "base.h"

/* frontends: struct frontend_key -> struct frontend */
struct frontend_key {
	addr_t addr;
	port_be_t port;
	__u8 proto;
	__u8 scope;          /* 0; reserved for internal/external scope */
};
_Static_assert(sizeof(struct frontend_key) == 20, "struct frontend_key");

enum frontend_flag {
	FRONTEND_CLUSTER_IP = 1 << 0,
};

struct frontend {
	__u32 service;       /* id of one port of one Service and family */
	__u32 count;         /* number of slots; 0: refuse */
	__u32 flags;
	__u32 pad;
};
_Static_assert(sizeof(struct frontend) == 16, "struct frontend");

/* service_slots: struct slot_key -> __u32 backend id */
struct slot_key {
	__u32 service;
	__u32 slot;          /* 0..count-1 */
};
_Static_assert(sizeof(struct slot_key) == 8, "struct slot_key");

/* backends: __u32 -> struct backend */
struct backend {
	addr_t addr;
	port_be_t port;
	__u8 proto;
	__u8 flags;
};
_Static_assert(sizeof(struct backend) == 20, "struct backend");

/* sock_revnat: LRU. What a socket believes it talks to. */
struct sock_revnat_key {
	__u64 cookie;        /* bpf_get_socket_cookie() */
	addr_t addr;         /* backend */
	port_be_t port;
	__u16 pad;
	__u32 pad2;
};
_Static_assert(sizeof(struct sock_revnat_key) == 32, "struct sock_revnat_key");

struct sock_revnat {
	addr_t addr;         /* frontend */
	port_be_t port;
	__u16 pad;
	__u32 service;
};
_Static_assert(sizeof(struct sock_revnat) == 24, "struct sock_revnat");

/* sock_choices: LRU. The backend that an unconnected UDP socket was given for a frontend: its datagrams are one flow
 * and stay together for as long as the backend keeps its slot. */
struct sock_choice_key {
	__u64 cookie;
	__u32 service;
	__u32 pad;
};
_Static_assert(sizeof(struct sock_choice_key) == 16, "struct sock_choice_key");

struct sock_choice {
	__u32 slot;
	__u32 backend;       /* the slot may have been given to another one since */
};
