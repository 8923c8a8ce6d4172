/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Meaning travels as typedef names: the Python codec picks its converter by them. */
#pragma once
#include <linux/types.h>
#include <stdbool.h>

/* Every address is 16 bytes; IPv4 is stored IPv4-mapped (::ffff:a.b.c.d, RFC 4291 2.5.5.2), so that one map and one
 * source text serve both families. An IPv4 prefix of length n has length 96 + n. */
typedef struct {
	union {
		__u8 b[16];
		__be32 w[4];
	};
} addr_t;

typedef struct {
	__u8 b[6];
} mac_t;

typedef __u32 identity_t;   /* numeric security identity; 24 bits travel in a VNI */
typedef __u32 ifindex_t;
typedef __u32 rule_id_t;    /* 0: no rule, the default applied */
typedef __u16 port_be_t;    /* network byte order; 0: none or any */
typedef __u64 ktime_ns_t;   /* bpf_ktime_get_ns() */

#define PREFIX_V4 96

enum reserved_identity {
	IDENTITY_UNKNOWN = 0,
	IDENTITY_HOST = 1,
	IDENTITY_WORLD = 2,
	IDENTITY_UNMANAGED = 3,
	IDENTITY_HEALTH = 4,
	IDENTITY_INIT = 5,
	IDENTITY_REMOTE_NODE = 6,
	IDENTITY_KUBE_APISERVER = 7,
	IDENTITY_MIN_ALLOCATED = 256,
	/* CIDR identities are local to a node and never leave it. */
	IDENTITY_SCOPE_CIDR = 1 << 24,
};

enum direction {
	DIRECTION_INGRESS = 0, /* towards the endpoint */
	DIRECTION_EGRESS = 1,  /* from the endpoint */
};
