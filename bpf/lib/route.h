/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* From a pod to where its packet goes, and the ways out of the node. */
#pragma once
#include "lib/encap.h"
#include "lib/forward.h"

/* Leave the node with bpf_fib_lookup() and bpf_redirect_neigh(); otherwise by the host stack. */
const volatile bool cfg_redirect_neigh = true;
/* What fits through the overlay, and what pods' devices are set to. */
const volatile __u32 cfg_pod_mtu = 1450;

#ifndef AF_INET
#define AF_INET 2
#define AF_INET6 10
#endif

__noinline int route_overlay(struct __sk_buff *skb, struct packet *p, struct remote *remote)
{
	if (!p || !remote)
		return TC_ACT_SHOT;
	if (p->wire_len > cfg_pod_mtu)
		return to_stack(skb, p, p->identity, TRACE_TO_STACK);
	if (decrement_ttl(skb, p) < 0)
		return drop(skb, p, DROP_WRITE_ERROR);
	if (set_tunnel_key(skb, &remote->tunnel, p->identity) < 0)
		return drop(skb, p, DROP_NO_TUNNEL_KEY);
	trace(skb, p, TRACE_TO_OVERLAY);
	skb->mark = MARK_TUNNEL_KEY;
	return bpf_redirect(cfg_overlay_ifindex, 0);
}

struct next_hop {
	struct bpf_redir_neigh neigh;
	ifindex_t ifindex;
	__u32 mtu;           /* with DROP_FRAGMENTATION_NOT_SUPPORTED: what fits */
};

/* The kernel's routing for a packet when it has these addresses. Returns 0 or the reason to drop. */
__noinline int find_next_hop(struct __sk_buff *skb, struct packet *p, addr_t *from, addr_t *to, struct next_hop *hop)
{
	struct bpf_fib_lookup fib = {};

	if (!p || !from || !to || !hop)
		return DROP_FIB_LOOKUP_FAILED;
	fib.ifindex = skb->ifindex;
	fib.l4_protocol = p->t.proto;
	fib.sport = p->t.sport;
	fib.dport = p->t.dport;
	fib.tot_len = p->wire_len;
	fib.family = is_v6(p) ? AF_INET6 : AF_INET;
	if (is_v6(p)) {
		__builtin_memcpy(fib.ipv6_src, from->b, 16);
		__builtin_memcpy(fib.ipv6_dst, to->b, 16);
	} else {
		fib.ipv4_src = addr_to_v4(from);
		fib.ipv4_dst = addr_to_v4(to);
	}
	int found = bpf_fib_lookup(skb, &fib, sizeof(fib), 0);

	if (found == BPF_FIB_LKUP_RET_FRAG_NEEDED) {
		hop->mtu = fib.mtu_result;
		return DROP_FRAGMENTATION_NOT_SUPPORTED;
	}
	if (found != BPF_FIB_LKUP_RET_SUCCESS && found != BPF_FIB_LKUP_RET_NO_NEIGH)
		return DROP_FIB_LOOKUP_FAILED;
	/* The look-up has left the next hop where the destination was. */
	hop->neigh.nh_family = fib.family;
	__builtin_memcpy(hop->neigh.ipv6_nh, fib.ipv6_dst, 16);
	hop->ifindex = fib.ifindex;
	return 0;
}

/* Out by a device of the node. */
static __always_inline int leave(struct __sk_buff *skb, struct packet *p, struct next_hop *hop, __u32 mark)
{
	if (decrement_ttl(skb, p) < 0)
		return drop(skb, p, DROP_WRITE_ERROR);
	trace(skb, p, TRACE_TO_NETWORK);
	skb->mark = mark;
	return bpf_redirect_neigh(hop->ifindex, &hop->neigh, sizeof(hop->neigh), 0);
}

/* Whatever the kernel's routing doesn't answer at once (too big, unreachable, needs an ICMP answer) is the stack's. */
__noinline int route_native(struct __sk_buff *skb, struct packet *p)
{
	struct next_hop hop = {};

	if (!p)
		return TC_ACT_SHOT;
	if (find_next_hop(skb, p, &p->t.saddr, &p->t.daddr, &hop))
		return to_stack(skb, p, p->identity, TRACE_TO_STACK);
	return leave(skb, p, &hop, mark_identity(p->identity));
}

/* What is known of a packet's destination. */
struct destination {
	struct endpoint *endpoint;      /* a pod of this node */
	struct remote *remote;          /* otherwise, if it is known at all */
	ifindex_t ifindex;              /* of a pod of this node, even if it has no endpoint */
};

/* Finds the destination and makes it the packet's peer. */
static __always_inline void find_destination(struct packet *p, struct destination *to)
{
	to->ifindex = 0;
	to->remote = NULL;
	to->endpoint = local_endpoint(&p->t.daddr, &to->ifindex);
	if (to->endpoint) {
		p->peer = to->endpoint->identity;
		p->peer_flags = REMOTE_POD;
	} else {
		to->remote = identify_peer(p, &p->t.daddr);
	}
}

/* The egress side has allowed the packet. */
static __always_inline int route(struct __sk_buff *skb, struct packet *p, const struct destination *to)
{
	struct remote *remote = to->remote;

	if (to->endpoint) {
		identity_t source = p->identity;

		/* Its trace event comes from the receiving side. */
		count(METRIC_FORWARDED, DIRECTION_EGRESS, p->len);
		return deliver(skb, p, to->endpoint, to->ifindex, source);
	}
	if (to->ifindex)
		return drop(skb, p, DROP_NO_LOCAL_ENDPOINT);
	if (p->peer == IDENTITY_HOST)
		return to_stack(skb, p, p->identity, TRACE_TO_HOST);
	if (ttl_expires(p))
		return to_stack(skb, p, p->identity, TRACE_TO_STACK);
	if (cfg_overlay_ifindex && remote && remote->flags & REMOTE_TUNNEL)
		return route_overlay(skb, p, remote);
	if (cfg_redirect_neigh)
		return route_native(skb, p);
	return to_stack(skb, p, p->identity, TRACE_TO_STACK);
}
