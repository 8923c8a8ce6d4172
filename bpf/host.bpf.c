// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* Both directions of the node's own devices towards the network. */
#include "lib/forward.h"
#include "lib/identity.h"
#include "lib/nat.h"
#include "lib/nodeport.h"
#include "lib/nodeport_reply.h"
#include "lib/outside.h"
#include "lib/parse.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* A packet for a service from outside goes to a backend. One that now is for a pod of this node goes on as such. */
#define SERVICE_GOES_ON -2

static __always_inline int from_client(struct __sk_buff *skb, struct packet *p, __u32 owner, struct next_hop *hop)
{
	bool error = p->flags & PACKET_ERROR;
	enum backend_place place = PLACE_POD;
	__u32 chosen = 0;
	int reason = 0;

	if (error)
		reason = nodeport_error(skb, p);
	else if (p->flags & PACKET_PORTS)
		reason = nodeport_choose(p, owner, &chosen);
	if (!p->service && !reason)
		return SERVICE_GOES_ON;
	identify_peer(p, &p->t.saddr);
	if (is_spoofed(p))
		reason = DROP_INVALID_SOURCE_IP;
	if (!reason && chosen)
		reason = nodeport_remember(p, chosen);
	if (!reason) {
		place = place_of(error ? &p->t.daddr : &p->backend.addr);
		reason = nodeport_send(skb, p, place, hop);
	}
	if (reason)
		return nodeport_drop(skb, p, reason, hop->mtu);
	if (place == PLACE_ELSEWHERE)
		return nodeport_leave(skb, p, hop);
	if (place == PLACE_POD)
		return SERVICE_GOES_ON;
	trace(skb, p, TRACE_TO_HOST);
	return VERDICT_NEXT;
}

/* An answer to this node's address that is for somebody behind it. */
static __always_inline int from_server(struct __sk_buff *skb, struct packet *p, struct next_hop *hop)
{
	int reason = unmasquerade(skb, p, hop);

	if (reason)
		return nodeport_drop(skb, p, reason, hop->mtu);
	return p->flags & PACKET_UNTRANSLATE ? reply_leave(skb, p, hop) : SERVICE_GOES_ON;
}

SEC("tc")
int from_network(struct __sk_buff *skb)
{
	struct packet p = {.direction = DIRECTION_INGRESS};
	struct next_hop hop = {};
	ifindex_t ifindex = 0;
	int verdict;

	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return VERDICT_NEXT;
	/* What we can't read may still be the stack's. */
	int unread = parse(skb, &p);
	bool own = for_node(&p);

	if (own && (unread || is_tunnel(&p)))
		return VERDICT_NEXT;
	if (own && unmasquerade_wanted(&p)) {
		verdict = from_server(skb, &p, &hop);
		if (verdict != SERVICE_GOES_ON)
			return verdict;
		own = for_node(&p);
	}
	note_epoch(&p);
	struct endpoint *ep = own ? NULL : local_endpoint(&p.t.daddr, &ifindex);

	if (!ep && !unread) {
		verdict = from_client(skb, &p, own ? OWNER_THIS_NODE : OWNER_ASK, &hop);
		if (verdict != SERVICE_GOES_ON)
			return verdict;
		if (p.service)
			ep = local_endpoint(&p.t.daddr, &ifindex);
	}
	if (!ep)
		return VERDICT_NEXT;
	if (!p.service) {
		identify_peer(&p, &p.t.saddr);
		if (!unread)
			unread = is_spoofed(&p) ? DROP_INVALID_SOURCE_IP : nodeport_arrived(skb, &p);
	}
	return unread ? drop(skb, &p, unread) : deliver(skb, &p, ep, ifindex, p.peer);
}

static __always_inline int from_stack(struct __sk_buff *skb, struct packet *p, __u32 mark, int unread)
{
	ifindex_t ifindex;
	struct endpoint *ep = local_endpoint(&p->t.saddr, &ifindex);

	if (ep) {
		p->endpoint = ep->id;
		p->identity = ep->identity;
		if (!unread && (mark & MARK_MASK) == MARK_REPLY)
			return reply_from_stack(skb, p, ep->id);
		if (!masquerade_on(p))
			return 0;
		return unread ? unread : masquerade(skb, p);
	}
	if (unread || is_tunnel(p))
		return 0;
	if (p->flags & PACKET_ERROR) {
		ep = local_endpoint(&p->inner.daddr, &ifindex);
		int reason = reply_from_stack(skb, p, ep ? ep->id : 0);

		return reason || p->service ? reason : masquerade_error(skb, p);
	}
	return p->flags & PACKET_PORTS && node_may_serve() ? reply_from_stack(skb, p, 0) : 0;
}

SEC("tc")
int to_network(struct __sk_buff *skb)
{
	struct packet p = {.direction = DIRECTION_EGRESS};
	__u32 mark = skb->mark;

	if (mark == MARK_ANSWER || (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6)))
		return VERDICT_NEXT;
	int unread = parse(skb, &p);
	int reason = from_stack(skb, &p, mark, unread);

	return reason ? drop(skb, &p, reason) : VERDICT_NEXT;
}
