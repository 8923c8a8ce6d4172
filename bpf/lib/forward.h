/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Where a packet goes next, and the last step to an endpoint. */
#pragma once
#include "include/config.h"
#include "lib/conntrack.h"
#include "lib/nat_table.h"
#include "lib/rewrite.h"
#include "lib/trace.h"
#include "maps/endpoint.h"

static __always_inline struct endpoint *local_endpoint(const addr_t *addr, ifindex_t *ifindex)
{
	const struct local_addr *local = bpf_map_lookup_elem(&local_addrs, addr);

	if (!local)
		return NULL;
	*ifindex = local->ifindex;
	return bpf_map_lookup_elem(&endpoints, ifindex);
}

/* To the host stack, which knows the source's identity again in a later program by the mark. */
static __always_inline int to_stack(struct __sk_buff *skb, struct packet *p, identity_t source, __u32 point)
{
	trace(skb, p, point);
	skb->mark = mark_identity(source);
	return VERDICT_NEXT;
}

/* The stack answers a packet whose time is up: TTL expired, too big. */
static __always_inline bool ttl_expires(const struct packet *p)
{
	return p->ttl <= 1;
}

static __always_inline int decrement_ttl(struct __sk_buff *skb, struct packet *p)
{
	__u8 ttl = p->ttl - 1;
	struct {
		__u8 ttl;
		__u8 proto;
		__u16 check;
	} v4;

	if (is_v6(p))
		return bpf_skb_store_bytes(skb, L3_OFFSET + offsetof(struct ipv6hdr, hop_limit), &ttl, 1,
					   BPF_F_RECOMPUTE_CSUM);
	/* The three lie side by side: one load and one store. */
	if (bpf_skb_load_bytes(skb, L3_OFFSET + offsetof(struct iphdr, ttl), &v4, sizeof(v4)) < 0)
		return -1;
	v4.check = csum_fold((__u64)(__u16)~v4.check + word_diff(bpf_htons(p->ttl << 8), bpf_htons(ttl << 8)));
	v4.ttl = ttl;
	return bpf_skb_store_bytes(skb, L3_OFFSET + offsetof(struct iphdr, ttl), &v4, sizeof(v4), 0);
}

/* A reply of a service's backend: the client knows the frontend only. */
static __always_inline int untranslate(struct __sk_buff *skb, struct packet *p)
{
	int reason;

	if (!(p->flags & PACKET_UNTRANSLATE))
		return 0;
	if (!(p->flags & PACKET_ERROR))
		return rewrite(skb, p, &p->frontend, END_SOURCE);
	/* The error may come from the backend itself or from a router on the way. */
	if (addr_equal(&p->t.saddr, &p->inner.daddr)) {
		reason = rewrite(skb, p, &p->frontend, END_SOURCE);
		if (reason)
			return reason;
	}
	return rewrite_inner(skb, p, &p->frontend, END_DESTINATION);
}

/* The client's end behind a binding that only exchanged its port. */
static __always_inline bool bound_client(const struct packet *p, struct end *client)
{
	struct nat_key back;
	const struct tuple *t = &p->t;
	bool error = p->flags & PACKET_ERROR;

	if (error)
		t = &p->inner;
	/* The embedded packet was on its way to the backend. */
	back.saddr = error ? t->daddr : t->saddr;
	back.daddr = error ? t->saddr : t->daddr;
	back.sport = error ? t->dport : t->sport;
	back.dport = error ? t->sport : t->dport;
	back.proto = t->proto;
	back.direction = DIRECTION_INGRESS;
	back.pad = 0;
	const struct nat_entry *e = nat_find(&back);

	if (!e)
		return false;
	client->addr = e->addr;
	client->port = e->port;
	return true;
}

/* Both ends of an answer, or of an error about what the client sent, become what the client knows. Returns 0 or the reason
 * to drop. */
__noinline int reply_address(struct __sk_buff *skb, struct packet *p)
{
	struct end client = {};
	int reason;

	if (!p)
		return DROP_INVALID_PACKET;
	if (p->flags & PACKET_BOUND) {
		if (!bound_client(p, &client))
			return DROP_NAT_NO_MAPPING;
		reason = p->flags & PACKET_ERROR ? rewrite_inner(skb, p, &client, END_SOURCE)
						 : rewrite(skb, p, &client, END_DESTINATION);
		if (reason)
			return reason;
	}
	return untranslate(skb, p);
}

/* All that an endpoint's side asks of a packet for it, with p->peer known. Returns 0 or the reason to drop. */
static __always_inline int receive(struct __sk_buff *skb, struct packet *p, struct endpoint *ep)
{
	int reason;

	p->direction = DIRECTION_INGRESS;
	p->endpoint = ep->id;
	p->identity = ep->identity;
	if (!(ep->flags & ENDPOINT_READY))
		return DROP_EP_NOT_READY;
	reason = judge(skb, p, ep);
	if (reason)
		return reason;
	trace(skb, p, TRACE_TO_ENDPOINT);
	return p->flags & PACKET_UNTRANSLATE ? reply_address(skb, p) : 0;
}

/* Frame for the pod, as if the stack had routed it. */
__noinline int address_frame(struct __sk_buff *skb, struct packet *p, struct endpoint *ep)
{
	struct frame_macs macs;

	if (!p || !ep)
		return DROP_WRITE_ERROR;
	macs.dst = ep->pod_mac;
	macs.src = ep->host_mac;
	if (decrement_ttl(skb, p) < 0)
		return DROP_WRITE_ERROR;
	return bpf_skb_store_bytes(skb, 0, &macs, sizeof(macs), 0) < 0 ? DROP_WRITE_ERROR : 0;
}

/* Hands a packet for a pod of this node to it, from an ingress hook. `source` is what p->peer is to the receiver. */
static __always_inline int deliver(struct __sk_buff *skb, struct packet *p, struct endpoint *ep, ifindex_t ifindex,
				   identity_t source)
{
	/* Only here it is known which frontend a client outside addressed. */
	bool here = cfg_redirect_peer || p->flags & PACKET_OUTSIDE;
	int reason;

	if (!here || ttl_expires(p))
		return to_stack(skb, p, source, TRACE_TO_STACK);
	p->peer = source;
	p->flags &= ~PACKET_UNTRANSLATE;
	reason = receive(skb, p, ep);
	if (!reason && !cfg_redirect_peer) {
		skb->mark = MARK_ANSWER;
		return VERDICT_NEXT;
	}
	if (!reason)
		reason = address_frame(skb, p, ep);
	if (reason)
		return drop(skb, p, reason);
	skb->mark = 0;
	return bpf_redirect_peer(ifindex, 0);
}
