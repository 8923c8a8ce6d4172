/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* What backends answer to clients outside: the frontend becomes the source again, and the client's port its own. */
#pragma once
#include "lib/conntrack.h"
#include "lib/forward.h"
#include "lib/nat.h"
#include "lib/route.h"
#include "maps/nodeport.h"

/* A pod's answer, which judge() has allowed and marked PACKET_UNTRANSLATE. It is routed as from the frontend. What the
 * kernel's routing doesn't answer at once is the stack's, as it is; to_network addresses what comes out of there. */
static __always_inline int reply_from_pod(struct __sk_buff *skb, struct packet *p)
{
	struct next_hop hop = {};

	if (!cfg_redirect_neigh || ttl_expires(p) ||
	    find_next_hop(skb, p, &p->frontend.addr, &p->t.daddr, &hop)) {
		trace(skb, p, TRACE_TO_STACK);
		skb->mark = p->identity << 8 | MARK_REPLY;
		return VERDICT_NEXT;
	}
	int reason = reply_address(skb, p);

	return reason ? drop(skb, p, reason) : leave(skb, p, &hop, MARK_ANSWER);
}

/* Finds the frontend that `key`'s connection was opened by. */
static __always_inline bool reply_known(struct packet *p, const struct ct_key *key, __u32 endpoint)
{
	const struct ct_entry *e = ct_lookup(key, endpoint, coarse_now());

	if (!e || !e->service || e->flags & CT_OPENED_EGRESS)
		return false;
	p->service = e->service;
	p->frontend.addr = e->frontend;
	p->frontend.port = e->frontend_port;
	p->flags |= PACKET_UNTRANSLATE | (e->flags & CT_BOUND ? PACKET_BOUND : 0);
	return true;
}

static __always_inline void note_serving(__u64 expires)
{
	__u32 zero = 0;
	ktime_ns_t *until = bpf_map_lookup_elem(&node_serves, &zero);

	if (until && *until < expires)
		*until = expires + NSEC_PER_SEC;
}

static __always_inline bool node_may_serve(void)
{
	__u32 zero = 0;
	const ktime_ns_t *until = bpf_map_lookup_elem(&node_serves, &zero);

	return until && *until && *until > coarse_now();
}

/* A packet from the stack to the network: what a pod (`endpoint`) or this node itself (0) answers to a service's client,
 * or an error of either, or of the stack, about what such a client sent. Returns 0 or the reason to drop. */
__noinline int reply_from_stack(struct __sk_buff *skb, struct packet *p, __u32 endpoint)
{
	struct ct_key key;

	if (!p)
		return DROP_INVALID_PACKET;
	if (p->flags & PACKET_ERROR)
		ct_key_of(&key, &p->inner, DIRECTION_INGRESS, endpoint ? CT_SCOPE_CONNECTION : CT_SCOPE_NODE);
	else
		ct_key_of(&key, &p->t, DIRECTION_EGRESS, endpoint ? CT_SCOPE_CONNECTION : CT_SCOPE_NODE);
	return reply_known(p, &key, endpoint) ? reply_address(skb, p) : 0;
}

/* An answer that came back to this node through a binding: unmasquerade() has given it its destination and the way. */
static __always_inline int reply_leave(struct __sk_buff *skb, struct packet *p, struct next_hop *hop)
{
	int reason = untranslate(skb, p);

	return reason ? drop(skb, p, reason) : leave(skb, p, hop, MARK_ANSWER);
}
