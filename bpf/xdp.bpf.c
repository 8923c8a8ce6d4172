// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* Services for clients outside, in the network device's driver: what would only pass through this node is sent on before the
 * kernel has made a packet of it. The same rows, connections and bindings as tc uses (lib/nodeport.h): each packet may be
 * dealt with here or there. XDP_PASS leaves it to tc, unchanged; that is the answer to everything unusual. */
#include "lib/nodeport.h"
#include "lib/outside.h"
#include "lib/xdp_parse.h"
#include "lib/xdp_send.h"
#include "lib/xdp_tunnel.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Is this a packet to a backend that can be sent on from here? */
__noinline int passes_through(struct packet *p)
{
	if (!p || p->flags & PACKET_BOUND || ttl_expires(p))
		return false;
	addr_t backend = p->backend.addr;

	identify_peer(p, &p->t.saddr);
	return !is_spoofed(p) && place_of(&backend) == PLACE_ELSEWHERE;
}

/* Is there a way through the tunnel, if the backend is behind it? Then `outer` knows all but the MAC addresses. */
static __always_inline bool tunnel_leads(struct packet *p, struct xdp_outer *outer)
{
	const struct remote *tunnel = tunnel_to(&p->backend.addr);

	if (!tunnel)
		return true;
	outer->destination = tunnel->tunnel;
	node_addr(&outer->source, !addr_is_v4(&outer->destination));
	if (p->wire_len > cfg_pod_mtu || addr_is_zero(&outer->source))
		return false;
	/* The Ethernet header in the tunnel for the one before it. */
	p->wire_len += tunnel_room(&outer->destination);
	return true;
}

/* Who calls the backend, and how many bytes are to tell its node of the frontend. */
static __always_inline __u32 set_source(struct packet *p, bool tunnel)
{
	if (p->flags & PACKET_DIRECT) {
		p->source.addr = p->t.saddr;
		p->source.port = p->t.sport;
		return wants_option(p) ? dsr_room(p) : 0;
	}
	if (tunnel)
		router_addr(&p->source.addr, is_v6(p));
	else
		node_addr(&p->source.addr, is_v6(p));
	return 0;
}

/* To p->backend. Nothing is remembered before it is certain that the packet goes on from here: tc would find a connection
 * that it has not made its decisions for. */
__noinline int forward(struct xdp_md *ctx, struct packet *p, __u32 chosen)
{
	struct xdp_outer outer = {};

	if (!p)
		return XDP_PASS;
	bool tunnel = tunnel_to(&p->backend.addr);
	__u32 room = set_source(p, tunnel);

	p->wire_len += room;
	if (addr_is_zero(&p->source.addr) || !tunnel_leads(p, &outer))
		return XDP_PASS;
	if (!xdp_next_hop(ctx, p, tunnel ? &outer.source : &p->source.addr, tunnel ? &outer.destination : &p->backend.addr,
			  &outer.macs))
		return XDP_PASS;
	if (!(p->flags & PACKET_DIRECT) && nat_bind(p))
		return XDP_PASS;
	if (chosen && nodeport_remember(p, chosen))
		return XDP_PASS;
	int reason = xdp_rewrite(ctx, p, &outer.macs);

	if (!reason && room) {
		reason = xdp_tell(ctx, p, &p->frontend);
		p->len += room;
	}
	if (!reason && tunnel)
		reason = xdp_encapsulate(ctx, p, &outer);
	return xdp_end(ctx, p, reason, tunnel ? TRACE_TO_OVERLAY : TRACE_TO_NETWORK);
}

#define NOT_AWAITED -1

/* What comes back through a binding: of a service, or of a pod of this node. The first `outer` bytes are a tunnel's. */
__noinline int from_server(struct xdp_md *ctx, struct packet *p, __u32 outer)
{
	struct frame_macs macs;
	struct nat_key back;

	if (!p)
		return XDP_PASS;
	nat_key_of(&back, &p->t, DIRECTION_INGRESS);
	struct nat_entry *found = nat_find(&back);

	if (!found)
		return NOT_AWAITED;
	if (!(found->flags & NAT_SERVICE) || ttl_expires(p))
		return XDP_PASS;
	p->source.addr = found->frontend;
	p->source.port = found->frontend_port;
	p->backend.addr = found->addr;
	p->backend.port = found->port;
	if (!xdp_next_hop(ctx, p, &p->source.addr, &p->backend.addr, &macs))
		return XDP_PASS;
	if (outer && bpf_xdp_adjust_head(ctx, outer))
		return XDP_PASS;
	nat_touch(found, coarse_now());
	return xdp_end(ctx, p, xdp_rewrite(ctx, p, &macs), TRACE_TO_NETWORK);
}

static __always_inline int from_tunnel(struct xdp_md *ctx, struct packet *p)
{
	__u32 outer = xdp_look_inside(ctx, p);

	if (!outer || !is_router(&p->t.daddr, is_v6(p)) || !unmasquerade_wanted(p))
		return XDP_PASS;
	int verdict = from_server(ctx, p, outer);

	return verdict == NOT_AWAITED ? XDP_PASS : verdict;
}

static __always_inline int receive_frame(struct xdp_md *ctx)
{
	struct packet p = {.direction = DIRECTION_INGRESS};
	__u32 chosen = 0;

	if (!xdp_parse(ctx, &p))
		return XDP_PASS;
	bool own = for_node(&p);

	if (own && is_tunnel(&p))
		return from_tunnel(ctx, &p);
	if (is_local(&p.t.daddr))
		return XDP_PASS;
	if (own && unmasquerade_wanted(&p)) {
		int verdict = from_server(ctx, &p, 0);

		if (verdict != NOT_AWAITED)
			return verdict;
	}
	if (nodeport_choose(&p, own ? OWNER_THIS_NODE : OWNER_ASK, &chosen) || !p.service || !passes_through(&p))
		return XDP_PASS;
	return forward(ctx, &p, chosen);
}

/* In the driver, frames of any size. */
SEC("xdp.frags")
int from_device(struct xdp_md *ctx)
{
	return receive_frame(ctx);
}

/* After the driver. Linux copies what another holder shares in another way for programs that know of frames in pieces, and
 * forgets the length of the Ethernet header with it (seen in 6.18): what tc then gets begins at the wrong byte. */
SEC("xdp")
int from_device_skb(struct xdp_md *ctx)
{
	return receive_frame(ctx);
}
