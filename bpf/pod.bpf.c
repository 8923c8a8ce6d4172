// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* Both directions of a pod's veth, seen from the host: ingress is what the pod sends. */
#include "lib/arp_nd.h"
#include "lib/forward.h"
#include "lib/hairpin.h"
#include "lib/identity.h"
#include "lib/nodeport_reply.h"
#include "lib/parse.h"
#include "lib/refuse.h"
#include "lib/route.h"
#include "lib/translate.h"
#include "lib/source.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

static __always_inline int from_pod_ip(struct __sk_buff *skb, struct packet *p, struct endpoint *ep)
{
	int reason = parse(skb, p);

	if (is_v6(p) && is_link_control(p))
		return answer_nd(skb, p, ep);
	/* Group membership goes nowhere: no multicast is forwarded. */
	if (!is_v6(p) && p->t.proto == IPPROTO_IGMP)
		return TC_ACT_SHOT;
	if (!reason)
		reason = check_source_addr(p, ep);
	if (reason)
		return drop(skb, p, reason);
	if (is_multicast(&p->t.daddr) || is_link_local(&p->t.daddr))
		return drop(skb, p, DROP_STALE_OR_UNROUTABLE_IP);
	if (is_for_router(p)) {
		reason = hairpin_back(skb, p, ep);
		if (reason != HAIRPIN_NONE)
			return reason ? drop(skb, p, reason) : answer(skb, ep);
	}
	struct destination to;

	find_destination(p, &to);
	if (!(p->peer_flags & REMOTE_POD) || p->flags & PACKET_ERROR) {
		reason = service_translate(skb, p, ep);
		if (reason == DROP_SERVICE_NO_BACKEND && !(p->flags & PACKET_SILENT)) {
			drop(skb, p, reason);
			return refuse(skb, p, ep);
		}
		if (reason)
			return drop(skb, p, reason);
		if (p->service)
			find_destination(p, &to);
		if (p->service && to.endpoint == ep) {
			reason = hairpin(skb, p, ep);
			return reason ? drop(skb, p, reason) : answer(skb, ep);
		}
	}
	/* It could leave with the node's address, and other nodes would believe what it says about identities. */
	if (is_tunnel(p) && !(p->peer_flags & REMOTE_POD))
		return drop(skb, p, DROP_INVALID_IDENTITY);
	reason = judge(skb, p, ep);
	if (reason)
		return drop(skb, p, reason);
	if (p->flags & PACKET_UNTRANSLATE)
		return reply_from_pod(skb, p);
	return route(skb, p, &to);
}

SEC("tc")
int from_pod(struct __sk_buff *skb)
{
	ifindex_t ifindex = skb->ifindex;
	struct packet p = {.direction = DIRECTION_EGRESS};
	int reason;

	note_epoch(&p);
	struct endpoint *ep = bpf_map_lookup_elem(&endpoints, &ifindex);

	p.len = skb->len - L3_OFFSET;
	if (!ep || !(ep->flags & ENDPOINT_READY))
		return drop(skb, &p, DROP_EP_NOT_READY);
	/* What the pod's side of the veth chose would bind all of its traffic to one queue of the NIC. */
	skb->queue_mapping = 0;
	p.endpoint = ep->id;
	p.identity = ep->identity;
	reason = check_source_mac(skb, ep);
	if (reason)
		return drop(skb, &p, reason);
	if (skb->vlan_present)
		return drop(skb, &p, DROP_UNSUPPORTED_L2_PROTOCOL);
	if (skb->protocol == bpf_htons(ETH_P_ARP))
		return answer_arp(skb, ep);
	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return drop(skb, &p, DROP_UNSUPPORTED_L2_PROTOCOL);
	return from_pod_ip(skb, &p, ep);
}

/* What the host stack sends to the pod. */
SEC("tc")
int to_pod(struct __sk_buff *skb)
{
	ifindex_t ifindex = skb->ifindex;
	struct packet p = {.direction = DIRECTION_INGRESS};
	__u32 mark = skb->mark;
	int reason;

	note_epoch(&p);
	struct endpoint *ep = bpf_map_lookup_elem(&endpoints, &ifindex);

	p.len = skb->len - L3_OFFSET;
	if (!ep)
		return drop(skb, &p, DROP_EP_NOT_READY);
	skb->mark = 0;
	if (mark == MARK_ANSWER || skb->protocol == bpf_htons(ETH_P_ARP))
		return VERDICT_NEXT;
	reason = parse(skb, &p);
	/* The node's own only: forwarded packets have a lower hop limit, and policy. */
	if (is_v6(&p) && is_link_control(&p) && (p.ttl == ND_HOP_LIMIT || is_multicast(&p.t.daddr)))
		return VERDICT_NEXT;
	identify_peer(&p, &p.t.saddr);
	if ((mark & MARK_MASK) == MARK_IDENTITY)
		p.peer = mark >> 8;
	if (!reason)
		reason = receive(skb, &p, ep);
	return reason ? drop(skb, &p, reason) : VERDICT_NEXT;
}
