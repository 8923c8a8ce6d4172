/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
#pragma once
#include "base.h"

/* Every port of every Service, in three steps: `frontends` says which service id an address and port stand for,
 * `service_slots` which backend is in a slot of it, `backends` where that is. Frontends of one Service port that lead to
 * the same endpoints share an id. docs/design/service.md tells how packets and sockets find their frontend. */

enum frontend_scope {
	SCOPE_ALL = 0,       /* clients outside the cluster; those inside too, unless FRONTEND_TWO_SCOPES */
	SCOPE_INTERNAL = 1,  /* pods and nodes, for a frontend with FRONTEND_TWO_SCOPES */
};

/* frontends: struct frontend_key -> struct frontend
 *
 * A node port is one row per family, under the family's unspecified address (:: or ::ffff:0.0.0.0): it stands for every
 * address of every node. A row with port 0 and protocol 0 (FRONTEND_ADDRESS) says that an address belongs to Services
 * alone: ports of it that have no row of their own refuse. */
struct frontend_key {
	addr_t addr;
	port_be_t port;
	__u8 proto;
	__u8 scope;          /* enum frontend_scope */
};
_Static_assert(sizeof(struct frontend_key) == 20, "struct frontend_key");

enum frontend_flag {
	FRONTEND_CLUSTER_IP = 1 << 0,    /* not for clients outside the cluster, unless cfg_external_cluster_ip */
	FRONTEND_NODE_PORT = 1 << 1,
	FRONTEND_HOST_PORT = 1 << 2,     /* a pod's hostPort */
	FRONTEND_TWO_SCOPES = 1 << 3,    /* clients inside the cluster have a row of their own, under SCOPE_INTERNAL */
	FRONTEND_AFFINITY = 1 << 4,      /* a client keeps its backend for `affinity_seconds` after its last connection */
	FRONTEND_SOURCE_RANGES = 1 << 5, /* clients must be in source_ranges */
	FRONTEND_SOURCE_DENY = 1 << 6,   /* with SOURCE_RANGES: must not be */
	FRONTEND_TABLE = 1 << 7,         /* backends come from service_tables, not from slots (Maglev, weights) */
	FRONTEND_HASH = 1 << 8,          /* with TABLE: indexed by a hash of the connection instead of at random */
	FRONTEND_DIRECT_RETURN = 1 << 9, /* a remote backend's node answers the client itself */
	FRONTEND_SILENT = 1 << 10,       /* no slots: drop without an answer; the endpoints are on other nodes */
	FRONTEND_EXEMPT = 1 << 11,       /* some clients bypass it: see service_exempt */
	FRONTEND_ADDRESS = 1 << 12,      /* the row of an address, see above */
};

struct frontend {
	__u32 service;       /* id of one port of one Service and family, and of one choice of its endpoints */
	__u32 count;         /* number of slots; 0: refuse */
	__u32 flags;         /* enum frontend_flag */
	__u32 affinity_seconds;
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

/* service_tables: __u32 service -> inner array of cfg_table_size __u32 backend ids. Only of FRONTEND_TABLE. */

/* service_members: struct member_key -> __u32 1. The backends in the slots of services with FRONTEND_AFFINITY: a
 * remembered choice holds for as long as its row is there. */
struct member_key {
	__u32 service;
	__u32 backend;
};
_Static_assert(sizeof(struct member_key) == 8, "struct member_key");

/* affinity: LRU, struct affinity_key -> struct affinity */
struct affinity_key {
	addr_t client;       /* by packet: its address; by socket: the network namespace's cookie in the first 8 bytes */
	__u32 service;
	__u32 by_namespace;  /* 1: `client` is a cookie */
};
_Static_assert(sizeof(struct affinity_key) == 24, "struct affinity_key");

struct affinity {
	ktime_ns_t used;
	__u32 backend;
	__u32 pad;
};

/* source_ranges: longest prefix match, struct source_key -> __u32 1. Of services with FRONTEND_SOURCE_RANGES. */
struct source_key {
	__u32 prefixlen;     /* 32 + 0..128 (IPv4: 32 + PREFIX_V4 + n) */
	__u32 service;
	addr_t addr;
};
_Static_assert(sizeof(struct source_key) == 24, "struct source_key");

/* service_exempt: struct exempt_key -> __u32 1. Clients that see addresses as they are. */
struct exempt_key {
	__u64 client;        /* network namespace cookie, or endpoint id */
	__u32 service;       /* 0: every service (by namespace only) */
	__u32 by_endpoint;   /* 1: `client` is an endpoint id */
};
_Static_assert(sizeof(struct exempt_key) == 16, "struct exempt_key");

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
