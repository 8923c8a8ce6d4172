/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
#pragma once
#include "base.h"

enum remote_flag {
	REMOTE_POD = 1 << 0,        /* an address of a pod network: never masqueraded */
	REMOTE_NODE = 1 << 1,       /* an address of a node (this one has IDENTITY_HOST) */
	REMOTE_TUNNEL = 1 << 2,     /* reached by encapsulation to `tunnel` (overlay mode) */
	REMOTE_NO_MASQUERADE = 1 << 3,
};

/* key of ipcache and cidrs, both longest-prefix-match */
struct prefix_key {
	__u32 prefixlen;     /* 0..128, IPv4 is PREFIX_V4 + n */
	addr_t addr;
};
_Static_assert(sizeof(struct prefix_key) == 20, "struct prefix_key");

/* ipcache: struct prefix_key -> struct remote. What is known about an address of the cluster; a miss is the world. */
struct remote {
	identity_t identity;
	__u32 flags;         /* enum remote_flag */
	addr_t tunnel;       /* node address */
};

/* cidrs: struct prefix_key -> struct cidr. The prefixes that policies on this node name. */
struct cidr {
	identity_t identity; /* IDENTITY_SCOPE_CIDR | n */
};
