/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* What a packet from outside may be: for tc and XDP alike. */
#pragma once
#include "lib/nat.h"
#include "maps/endpoint.h"

static __always_inline bool for_node(const struct packet *p)
{
	return config_addr_is(is_v6(p) ? &cfg_node_addr6 : &cfg_node_addr4, &p->t.daddr);
}

/* A pod of this node? */
static __always_inline bool is_local(const addr_t *addr)
{
	/* Linux 6.1 takes a map's key from this frame's stack, not from a caller's. */
	addr_t key = *addr;

	return bpf_map_lookup_elem(&local_addrs, &key);
}

/* Nobody outside has our own address or a local pod's, and remote pods come through the tunnel where there is one. The peer
 * is known. */
static __always_inline bool is_spoofed(const struct packet *p)
{
	if (p->peer == IDENTITY_HOST || is_local(&p->t.saddr))
		return true;
	return cfg_overlay_ifindex && p->peer_flags & REMOTE_POD && p->peer_flags & REMOTE_TUNNEL;
}
