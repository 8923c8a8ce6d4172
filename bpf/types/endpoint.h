/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
#pragma once
#include "base.h"

enum endpoint_flag {
	/* Without READY every packet of the endpoint is dropped: its policy is not in the kernel yet. */
	ENDPOINT_READY = 1 << 0,
	ENDPOINT_ENFORCE_INGRESS = 1 << 1,
	ENDPOINT_ENFORCE_EGRESS = 1 << 2,
	/* The policy set has CIDR rules: the peer's address is looked up in `cidrs` too. */
	ENDPOINT_CIDR_INGRESS = 1 << 3,
	ENDPOINT_CIDR_EGRESS = 1 << 4,
};

/* endpoints: ifindex_t of the host side of the veth -> struct endpoint */
struct endpoint {
	__u32 id;            /* never reused while the node is up; a conntrack entry of another id is stale */
	identity_t identity;
	__u32 policy_set;    /* key in policy_sets; 0: none */
	__u32 flags;         /* enum endpoint_flag */
	addr_t addr4;        /* all zero: none */
	addr_t addr6;
	mac_t pod_mac;
	mac_t host_mac;      /* answers ARP and ND for the gateway */
	__u32 pad;
};
_Static_assert(sizeof(struct endpoint) == 64, "struct endpoint");

/* local_addrs: addr_t -> struct local_addr. The pods of this node. */
struct local_addr {
	ifindex_t ifindex;
	__u32 pad;
};
