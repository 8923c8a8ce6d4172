/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Who an address belongs to. */
#pragma once
#include "include/packet.h"
#include "maps/ipcache.h"

/* This node's own, that pods' packets leave with; zero if it has none of the family. */
const volatile addr_t cfg_node_addr4 = {};
const volatile addr_t cfg_node_addr6 = {};

static __always_inline void node_addr(addr_t *to, bool v6)
{
	if (v6)
		config_addr(to, &cfg_node_addr6);
	else
		config_addr(to, &cfg_node_addr4);
}

/* NULL: the world. */
static __always_inline struct remote *ipcache_lookup(const addr_t *addr)
{
	struct prefix_key key = {.prefixlen = sizeof(addr_t) * 8, .addr = *addr};

	return bpf_map_lookup_elem(&ipcache, &key);
}

/* Fills in the peer by its address. */
static __always_inline struct remote *identify_peer(struct packet *p, const addr_t *addr)
{
	struct remote *remote = ipcache_lookup(addr);

	p->peer = remote ? remote->identity : IDENTITY_WORLD;
	p->peer_flags = remote ? remote->flags : 0;
	return remote;
}
