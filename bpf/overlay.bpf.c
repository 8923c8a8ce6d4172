// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* Both directions of the VXLAN device. */
#include "lib/encap.h"
#include "lib/forward.h"
#include "lib/hairpin.h"
#include "lib/identity.h"
#include "lib/nodeport.h"
#include "lib/nodeport_reply.h"
#include "lib/parse.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

static __always_inline bool is_ip(const struct __sk_buff *skb)
{
	return skb->protocol == bpf_htons(ETH_P_IP) || skb->protocol == bpf_htons(ETH_P_IPV6);
}

/* Only nodes of the cluster may vouch for an identity. */
static __always_inline int check_tunnel(struct __sk_buff *skb, identity_t *source)
{
	addr_t node;
	int reason = get_tunnel_key(skb, &node, source);

	if (reason)
		return reason;
	const struct remote *remote = ipcache_lookup(&node);

	if (!remote || !(remote->flags & REMOTE_NODE) || remote->identity == IDENTITY_HOST)
		return DROP_NO_TUNNEL_ENDPOINT;
	return identity_claimable(*source) ? 0 : DROP_INVALID_VNI;
}

SEC("tc")
int from_overlay(struct __sk_buff *skb)
{
	struct packet p = {.direction = DIRECTION_INGRESS};
	struct next_hop hop = {};
	ifindex_t ifindex = 0;
	identity_t source = 0;
	int reason;

	p.len = skb->len - L3_OFFSET;
	if (!is_ip(skb))
		return TC_ACT_SHOT;
	reason = check_tunnel(skb, &source);
	p.peer = source;
	if (!reason)
		reason = parse(skb, &p);
	if (reason)
		return drop(skb, &p, reason);
	/* The frame is addressed to the sender's idea of a gateway. */
	if (skb->pkt_type != PACKET_HOST)
		bpf_skb_change_type(skb, PACKET_HOST);
	note_epoch(&p);
	struct endpoint *ep = local_endpoint(&p.t.daddr, &ifindex);

	if (ep && source == IDENTITY_WORLD)
		reason = nodeport_arrived(skb, &p);
	if (reason)
		return drop(skb, &p, reason);
	if (ep)
		return deliver(skb, &p, ep, ifindex, source);
	if (is_router(&p.t.daddr, is_v6(&p)) && unmasquerade_wanted(&p)) {
		reason = unmasquerade(skb, &p, &hop);
		if (reason)
			return drop(skb, &p, reason);
		if (p.flags & PACKET_UNTRANSLATE)
			return reply_leave(skb, &p, &hop);
	}
	return to_stack(skb, &p, source, TRACE_TO_STACK);
}

/* What the host stack sends to remote pods. */
SEC("tc")
int to_overlay(struct __sk_buff *skb)
{
	struct packet p = {.direction = DIRECTION_EGRESS, .identity = IDENTITY_REMOTE_NODE};
	__u32 mark = skb->mark;
	int reason;

	skb->mark = 0;
	if (mark == MARK_TUNNEL_KEY)
		return VERDICT_NEXT;
	if (!is_ip(skb))
		return TC_ACT_SHOT;
	if ((mark & MARK_MASK) == MARK_IDENTITY)
		p.identity = mark >> 8;
	/* Only the destination is needed, of whatever protocol. */
	reason = parse(skb, &p);
	if (is_v6(&p) && p.t.daddr.b[0] == 0xff)
		return TC_ACT_SHOT;
	if (reason == DROP_INVALID_PACKET || reason == DROP_UNSUPPORTED_L3_PROTOCOL)
		return drop(skb, &p, reason);
	const struct remote *remote = identify_peer(&p, &p.t.daddr);

	if (!remote || !(remote->flags & REMOTE_TUNNEL))
		return drop(skb, &p, DROP_NO_TUNNEL_ENDPOINT);
	if (!identity_claimable(p.identity))
		p.identity = IDENTITY_REMOTE_NODE;
	if (set_tunnel_key(skb, &remote->tunnel, p.identity) < 0)
		return drop(skb, &p, DROP_NO_TUNNEL_KEY);
	count(METRIC_FORWARDED, DIRECTION_EGRESS, p.len);
	return VERDICT_NEXT;
}
