// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* Services for clients outside, in the network device's driver: what would only pass through this node is sent on before the
 * kernel has made a packet of it. The same rows, connections and bindings as tc uses (lib/nodeport.h): each packet may be
 * dealt with here or there. XDP_PASS leaves it to tc, unchanged; that is the answer to everything unusual. */
#include "lib/nodeport.h"
#include "lib/xdp_parse.h"
#include "lib/xdp_send.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

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

/* Nobody outside has our own address or a local pod's, and remote pods come through the tunnel where there is one. */
static __always_inline bool is_spoofed(const struct packet *p)
{
	const struct remote *remote = ipcache_lookup(&p->t.saddr);

	if (is_local(&p->t.saddr))
		return true;
	return remote && (remote->identity == IDENTITY_HOST ||
			  (cfg_overlay_ifindex && remote->flags & REMOTE_POD && remote->flags & REMOTE_TUNNEL));
}

/* Is the backend elsewhere, and not behind the tunnel? */
static __always_inline bool backend_is_near(const struct packet *p)
{
	const struct remote *remote = ipcache_lookup(&p->backend.addr);

	if (is_local(&p->backend.addr) || (remote && remote->identity == IDENTITY_HOST))
		return false;
	return !(cfg_overlay_ifindex && remote && remote->flags & REMOTE_TUNNEL);
}

/* Is this a packet to a backend that can be sent on from here? */
__noinline int passes_through(struct packet *p)
{
	return p && !(p->flags & PACKET_BOUND) && !ttl_expires(p) && !is_spoofed(p) && backend_is_near(p);
}

/* To p->backend. Nothing is remembered before it is certain that the packet goes on from here: tc would find a connection
 * that it has not made its decisions for. */
__noinline int forward(struct xdp_md *ctx, struct packet *p, __u32 chosen)
{
	struct xdp_change c = {};
	__u32 room = 0;

	if (!p)
		return XDP_PASS;
	if (p->flags & PACKET_DIRECT) {
		p->source.addr = p->t.saddr;
		p->source.port = p->t.sport;
		room = wants_option(p) ? dsr_room(p) : 0;
		p->wire_len += room;
	} else {
		node_addr(&p->source.addr, is_v6(p));
	}
	if (addr_is_zero(&p->source.addr) || !xdp_next_hop(ctx, p, &p->source.addr, &p->backend.addr, &c.macs))
		return XDP_PASS;
	if (!(p->flags & PACKET_DIRECT) && nat_bind(p))
		return XDP_PASS;
	if (chosen && nodeport_remember(p, chosen))
		return XDP_PASS;
	c.source = p->source;
	c.destination = p->backend;
	int reason = xdp_rewrite(ctx, p, &c);

	if (!reason && room)
		reason = xdp_tell(ctx, p, &p->frontend);
	return xdp_sent(p, reason);
}

#define NOT_AWAITED -1

/* What comes back through a binding: of a service, or of a pod of this node. */
__noinline int from_server(struct xdp_md *ctx, struct packet *p)
{
	struct xdp_change c = {};
	struct nat_key back;

	if (!p)
		return XDP_PASS;
	nat_key_of(&back, &p->t, DIRECTION_INGRESS);
	struct nat_entry *found = bpf_map_lookup_elem(&nat, &back);

	if (!found)
		return NOT_AWAITED;
	if (!(found->flags & NAT_SERVICE) || ttl_expires(p))
		return XDP_PASS;
	c.source.addr = found->frontend;
	c.source.port = found->frontend_port;
	c.destination.addr = found->addr;
	c.destination.port = found->port;
	if (!xdp_next_hop(ctx, p, &c.source.addr, &c.destination.addr, &c.macs))
		return XDP_PASS;
	nat_touch(found, coarse_now());
	return xdp_sent(p, xdp_rewrite(ctx, p, &c));
}

static __always_inline int receive_frame(struct xdp_md *ctx)
{
	struct packet p = {.direction = DIRECTION_INGRESS};
	__u32 chosen = 0;

	if (!xdp_parse(ctx, &p))
		return XDP_PASS;
	bool own = for_node(&p);

	if (is_local(&p.t.daddr) || (own && is_tunnel(&p)))
		return XDP_PASS;
	if (own && unmasquerade_wanted(&p)) {
		int verdict = from_server(ctx, &p);

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
