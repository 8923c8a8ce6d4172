/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
#pragma once
#include "base.h"

/* nat: LRU. Masquerading, and Services whose backend is elsewhere: two rows a binding, one for each direction, keyed by
 * what the packet carries before translation. */
struct nat_key {
	addr_t saddr;
	addr_t daddr;
	port_be_t sport;     /* ICMP echo: the identifier (sport on the way out, dport on the way in) */
	port_be_t dport;
	__u8 proto;
	__u8 direction;      /* enum direction: EGRESS leaves the node */
	__u16 pad;
};
_Static_assert(sizeof(struct nat_key) == 40, "struct nat_key");

enum nat_flag {
	NAT_SERVICE = 1 << 0,  /* answers come from a backend: their source becomes `frontend` */
};

struct nat_entry {
	addr_t addr;         /* EGRESS: new source; INGRESS: new destination */
	port_be_t port;
	__u16 flags;         /* enum nat_flag */
	__u32 service;       /* with NAT_SERVICE */
	ktime_ns_t used;
	addr_t frontend;     /* with NAT_SERVICE: what the client addressed */
	port_be_t frontend_port;
	__u8 pad[6];
};
_Static_assert(sizeof(struct nat_entry) == 56, "struct nat_entry");

/* fragments: LRU. Ports of a datagram whose first fragment has been seen. */
struct fragment_key {
	addr_t saddr;
	addr_t daddr;
	__u32 id;
	__u8 proto;
	__u8 pad[3];
};

struct fragment {
	port_be_t sport;
	port_be_t dport;
};
