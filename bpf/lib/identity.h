/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Who an address belongs to. */
#pragma once
#include "include/packet.h"
#include "maps/ipcache.h"

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
