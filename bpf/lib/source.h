/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* A pod may only speak for itself. */
#pragma once
#include "include/packet.h"
#include "lib/arp_nd.h"

static __always_inline int check_source_mac(struct __sk_buff *skb, const struct endpoint *ep)
{
	mac_t src;

	if (bpf_skb_load_bytes(skb, ETH_ALEN, &src, sizeof(src)) < 0)
		return DROP_INVALID_PACKET;
	return mac_equal(&src, &ep->pod_mac) ? 0 : DROP_INVALID_SOURCE_MAC;
}

static __always_inline bool is_multicast(const addr_t *addr)
{
	if (addr_is_v4(addr))
		return addr->b[12] >= 224;
	return addr->b[0] == 0xff;
}

static __always_inline int check_source_addr(const struct packet *p, const struct endpoint *ep)
{
	const addr_t *own = is_v6(p) ? &ep->addr6 : &ep->addr4;

	if (addr_is_zero(own) || !addr_equal(own, &p->t.saddr))
		return DROP_INVALID_SOURCE_IP;
	/* A pod is no router: it complains about what it got, not about other pods' connections. */
	return p->flags & PACKET_ERROR && !addr_equal(own, &p->inner.daddr) ? DROP_INVALID_SOURCE_IP : 0;
}
