// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* Both directions of the node's own devices towards the network. */
#include "lib/forward.h"
#include "lib/identity.h"
#include "lib/nat.h"
#include "lib/parse.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

static __always_inline bool for_node(const struct packet *p)
{
	return config_addr_is(is_v6(p) ? &cfg_node_addr6 : &cfg_node_addr4, &p->t.daddr);
}

/* Nobody outside has our own address or a local pod's, and remote pods come through the tunnel where there is one. */
static __always_inline bool is_spoofed(const struct packet *p)
{
	if (p->peer == IDENTITY_HOST || bpf_map_lookup_elem(&local_addrs, &p->t.saddr))
		return true;
	return cfg_overlay_ifindex && p->peer_flags & REMOTE_POD && p->peer_flags & REMOTE_TUNNEL;
}

SEC("tc")
int from_network(struct __sk_buff *skb)
{
	struct packet p = {.direction = DIRECTION_INGRESS};
	ifindex_t ifindex = 0;
	int reason;

	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return VERDICT_NEXT;
	/* What we can't read may still be the stack's. */
	int unread = parse(skb, &p);

	if (masquerade_on(&p) && for_node(&p)) {
		if (unread || !unmasquerade_wanted(&p))
			return VERDICT_NEXT;
		reason = unmasquerade(skb, &p);
		if (reason)
			return drop(skb, &p, reason);
	}
	note_epoch(&p);
	struct endpoint *ep = local_endpoint(&p.t.daddr, &ifindex);

	if (!ep)
		return VERDICT_NEXT;
	identify_peer(&p, &p.t.saddr);
	if (unread)
		return drop(skb, &p, unread);
	if (is_spoofed(&p))
		return drop(skb, &p, DROP_INVALID_SOURCE_IP);
	return deliver(skb, &p, ep, ifindex, p.peer);
}

SEC("tc")
int to_network(struct __sk_buff *skb)
{
	struct packet p = {.direction = DIRECTION_EGRESS};
	ifindex_t ifindex = 0;
	int reason;

	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return VERDICT_NEXT;
	int unread = parse(skb, &p);
	struct endpoint *ep = local_endpoint(&p.t.saddr, &ifindex);

	if (!masquerade_on(&p))
		return VERDICT_NEXT;
	if (ep) {
		p.endpoint = ep->id;
		p.identity = ep->identity;
		reason = unread ? unread : masquerade(skb, &p);
	} else {
		reason = p.flags & PACKET_ERROR ? masquerade_error(skb, &p) : 0;
	}
	return reason ? drop(skb, &p, reason) : VERDICT_NEXT;
}
