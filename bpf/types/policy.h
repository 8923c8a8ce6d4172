/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
#pragma once
#include "base.h"

enum policy_verdict {
	POLICY_VERDICT_ALLOW = 1,
	POLICY_VERDICT_DENY = 2,
};

enum policy_entry_flag {
	/* CIDR entries speak about the world (CiliumNetworkPolicy fromCIDR, toCIDR). With this flag the addresses of pods
	 * and nodes are allowed as well (NetworkPolicy ipBlock), also where the verdict denies the world's. */
	POLICY_ENTRY_CIDR_ANY_PEER = 1 << 0,
};

/* identities: identity_t -> 1. The allocated identities that this node's policy sets speak about. A set has no entry for
 * an identity whose labels the compiler hasn't seen, not even the denies that its labels ask for. So whoever isn't listed
 * is nobody yet, and may not talk to an endpoint that enforces. Written after the sets, removed before them. */

/* policy_sets: __u32 -> inner map (LPM): struct policy_key -> struct policy_entry.
 *
 * A decision takes up to three look-ups with the packet's protocol and port: the peer's identity, the CIDR identity of
 * its address (if the endpoint has the CIDR flag), and peer 0 (any). Any deny wins over any allow; none at all is
 * denied by default. Within one peer the longest prefix decides, so the compiler leaves out an allow that a shorter
 * deny covers. */
struct policy_key {
	__u32 prefixlen;     /* POLICY_PREFIX_ANY_PROTO, _ANY_PORT or up to _FULL; a port range is a set of prefixes */
	identity_t peer;     /* 0: any */
	__u8 direction;      /* enum direction */
	__u8 proto;          /* IPPROTO_*; for ICMP and ICMPv6 the "port" is the type, in the high byte */
	port_be_t port;
};
_Static_assert(sizeof(struct policy_key) == 12, "struct policy_key");

enum policy_prefix {
	POLICY_PREFIX_ANY_PROTO = 40,
	POLICY_PREFIX_ANY_PORT = 48,
	POLICY_PREFIX_FULL = 64,
};

struct policy_entry {
	__u8 verdict;        /* enum policy_verdict */
	__u8 flags;          /* enum policy_entry_flag */
	__u16 pad;
	rule_id_t rule;
};
