/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Services for clients outside the node: to a backend here, on this node itself or elsewhere, and the way back. The table
 * is in docs/design/service.md, "From outside". */
#pragma once
#include "lib/conntrack.h"
#include "lib/dsr.h"
#include "lib/encap.h"
#include "lib/forward.h"
#include "lib/hairpin.h"
#include "lib/nat.h"
#include "lib/nodeport_reply.h"
#include "lib/refuse.h"
#include "lib/route.h"
#include "lib/service.h"
#include "lib/translate.h"

/* The client has closed its side: what it still acknowledges keeps the entry. */
#define CT_HALF_CLOSED_NS (60 * NSEC_PER_SEC)

static __always_inline void note_client_end(const struct packet *p, struct ct_entry *e, __u64 now)
{
	__u64 lifetime = CT_TCP_SYN_NS;

	if (p->tcp_flags & TCP_RST)
		e->flags |= CT_RST;
	else if (p->tcp_flags & TCP_FIN)
		e->flags |= CT_FIN_FORWARD;
	/* Replies aren't seen here: whatever isn't the first packet counts as an answer to one. */
	if (!tcp_attempt(p))
		lifetime = e->flags & CT_FIN_FORWARD ? CT_HALF_CLOSED_NS : ct_lifetime(p->t.proto, e->flags | CT_SEEN_REPLY);
	ct_extend(e, now + lifetime);
}

/* A connection goes on with its backend while there is the frontend; a new attempt after its end chooses anew. No other
 * backend knows a connection that has lost its own: TCP is told so. */
static __always_inline enum known nodeport_known(struct packet *p)
{
	struct ct_key key;
	__u64 now = coarse_now();

	ct_key_of(&key, &p->t, DIRECTION_EGRESS, CT_SCOPE_SERVICE);
	struct ct_entry *e = ct_lookup(&key, 0, now);

	if (!e || (tcp_attempt(p) && e->flags & (CT_RST | CT_FIN_FORWARD)))
		return KNOWN_NOT;
	bool stays = e->service == p->service || service_keeps_established(p);
	const struct backend *backend = stays ? service_backend(e->backend) : NULL;

	if (!backend)
		return p->t.proto != IPPROTO_TCP || tcp_attempt(p) ? KNOWN_NOT : KNOWN_LOST;
	p->backend.addr = backend->addr;
	p->backend.port = backend->port;
	/* As it began, whatever is set today: its backend knows the client by that. */
	p->flags |= (e->flags & CT_BOUND ? PACKET_BOUND : 0) | (e->flags & CT_DIRECT ? PACKET_DIRECT : 0);
	note_client_end(p, e, now);
	return KNOWN_BACKEND;
}

/* Would the backend, here or this node itself, take this for a connection that the same client port already has with it,
 * directly or through another frontend? */
static __always_inline bool nodeport_collides(const struct packet *p, struct ct_key *key, __u64 now)
{
	ifindex_t ifindex;

	/* Linux 6.1 takes a map's key from this frame's stack, not from a caller's. */
	key->local = p->backend.addr;
	const struct endpoint *ep = local_endpoint(&key->local, &ifindex);

	key->local_port = p->backend.port;
	key->remote = p->t.saddr;
	key->remote_port = p->t.sport;
	key->proto = p->t.proto;
	key->scope = ep ? CT_SCOPE_CONNECTION : CT_SCOPE_NODE;
	key->pad = 0;
	const struct ct_entry *e = ct_lookup(key, ep ? ep->id : 0, now);

	if (!e || e->flags & CT_RST || (e->flags & CT_FIN_FORWARD && e->flags & CT_FIN_REPLY))
		return false;
	return e->frontend_port != p->frontend.port || !addr_equal(&e->frontend, &p->frontend.addr);
}

/* Remembers the chosen backend. Returns 0 or the reason to drop. */
__noinline int nodeport_remember(struct packet *p, __u32 backend)
{
	struct ct_entry e = {.flags = CT_OPENED_EGRESS, .backend = backend};
	struct ct_key key;

	if (!p)
		return DROP_CT_CANNOT_CREATE;
	__u64 now = coarse_now();

	p->report = true;
	if (nodeport_collides(p, &key, now)) {
		p->flags |= PACKET_BOUND;
		e.flags |= CT_BOUND;
	}
	if (p->flags & PACKET_DIRECT)
		e.flags |= CT_DIRECT;
	e.expires = now + (p->t.proto == IPPROTO_UDP ? CT_BOTH_WAYS_NS : CT_TCP_SYN_NS);
	e.service = p->service;
	e.frontend = p->t.daddr;
	e.frontend_port = p->t.dport;
	ct_key_of(&key, &p->t, DIRECTION_EGRESS, CT_SCOPE_SERVICE);
	return bpf_map_update_elem(&conntrack, &key, &e, BPF_ANY) ? DROP_CT_MAP_INSERTION_FAILED : 0;
}

static __always_inline bool backend_is_pod(const struct packet *p)
{
	const struct remote *remote = ipcache_lookup(&p->backend.addr);

	return remote && remote->flags & REMOTE_POD;
}

/* May the backend's node answer the client itself? Nodes themselves, and who is no part of the cluster, don't know what the
 * option tells; and a client that is a node may be the backend's own, which takes nothing from outside that has its address. */
static __always_inline bool may_return_directly(const struct packet *p)
{
	const struct remote *client;

	if (!backend_is_pod(p))
		return false;
	client = ipcache_lookup(&p->t.saddr);
	return !client || !(client->flags & REMOTE_NODE);
}

/* Would the client speak to the overlay of a node? From our address other nodes would believe what it says about identities.
 * See from_pod: pods may serve that port. */
static __always_inline bool backend_is_tunnel(const struct packet *p)
{
	return cfg_overlay_ifindex && p->t.proto == IPPROTO_UDP && p->backend.port == bpf_htons(cfg_overlay_port) &&
	       !backend_is_pod(p);
}

/* Which service a packet is for (p->service; 0: none) and which backend of it. `owner`: of the address. `chosen`: the
 * backend's number, if it wasn't known before. Returns 0 or the reason to drop. */
__noinline int nodeport_choose(struct packet *p, __u32 owner, __u32 *chosen)
{
	struct service_query q = {};

	if (!p || !chosen)
		return DROP_INVALID_PACKET;
	q.client = p->t.saddr;
	q.client_port = p->t.sport;
	q.addr = p->t.daddr;
	q.port = p->t.dport;
	q.proto = p->t.proto;
	q.owner = owner;
	if (service_find(&q) == SERVICE_NONE)
		return 0;
	p->service = q.frontend.service;
	p->frontend.addr = p->t.daddr;
	p->frontend.port = p->t.dport;
	if (q.frontend.flags & FRONTEND_SILENT)
		p->flags |= PACKET_SILENT;
	if (!service_admits(&q))
		return DROP_SERVICE_SOURCE_RANGE;
	enum known known = nodeport_known(p);

	if (known != KNOWN_BACKEND) {
		if (known == KNOWN_LOST || service_choose(&q) != SERVICE_FOUND)
			return DROP_SERVICE_NO_BACKEND;
		p->backend = q.to;
		*chosen = q.backend;
		if (backend_is_tunnel(p))
			return DROP_INVALID_IDENTITY;
		if (q.frontend.flags & FRONTEND_DIRECT_RETURN && may_return_directly(p))
			p->flags |= PACKET_DIRECT;
	}
	return 0;
}

/* Towards p->backend, from p->source if that is another. */
static __always_inline int nodeport_rewrite(struct __sk_buff *skb, struct packet *p, bool source)
{
	int reason = source ? rewrite(skb, p, &p->source, END_SOURCE) : 0;

	return reason ? reason : rewrite(skb, p, &p->backend, END_DESTINATION);
}

/* The same client, with a port of its own where it needs one: for a backend that answers through this node. */
__noinline int nodeport_address(struct __sk_buff *skb, struct packet *p)
{
	int reason = 0;

	if (!p)
		return DROP_INVALID_PACKET;
	if (p->flags & PACKET_BOUND) {
		p->source.addr = p->t.saddr;
		reason = nat_bind(p);
	}
	p->flags |= PACKET_OUTSIDE;
	return reason ? reason : nodeport_rewrite(skb, p, p->flags & PACKET_BOUND);
}

/* Remembers, or goes on to, that this node's own answers get the frontend as their source. The packet is already addressed
 * to the backend. Returns 0 or the reason to drop. */
__noinline int nodeport_track_node(struct packet *p)
{
	struct ct_key key;
	struct ct_entry fresh = {};

	if (!p)
		return DROP_CT_CANNOT_CREATE;
	__u64 now = coarse_now();

	ct_key_of(&key, &p->t, DIRECTION_INGRESS, CT_SCOPE_NODE);
	struct ct_entry *e = ct_lookup(&key, 0, now);

	if (e && e->frontend_port == p->frontend.port && addr_equal(&e->frontend, &p->frontend.addr) &&
	    !(tcp_attempt(p) && e->flags)) {
		note_client_end(p, e, now);
		note_serving(e->expires);
		return 0;
	}
	fresh.flags = p->flags & PACKET_BOUND ? CT_BOUND : 0;
	fresh.service = p->service;
	fresh.frontend = p->frontend.addr;
	fresh.frontend_port = p->frontend.port;
	note_client_end(p, &fresh, now);
	note_serving(fresh.expires);
	return bpf_map_update_elem(&conntrack, &key, &fresh, BPF_ANY) ? DROP_CT_MAP_INSERTION_FAILED : 0;
}

/* May routers cut this packet? */
static __always_inline bool may_fragment(struct __sk_buff *skb, const struct packet *p)
{
	__be16 frag_off;

	return !is_v6(p) && bpf_skb_load_bytes(skb, L3_OFFSET + offsetof(struct iphdr, frag_off), &frag_off, 2) >= 0 &&
	       !(frag_off & bpf_htons(IP_DONT_FRAGMENT));
}

/* Through the tunnel, where the backend's node judges it as the world. What may be cut is cut outside the tunnel. */
static __always_inline int tunnel_fits(struct __sk_buff *skb, const struct packet *p, __u32 room, struct next_hop *hop)
{
	if (p->wire_len + room <= cfg_pod_mtu || may_fragment(skb, p))
		return 0;
	hop->mtu = cfg_pod_mtu - room;
	return DROP_FRAGMENTATION_NOT_SUPPORTED;
}

static __always_inline int tunnel_set(struct __sk_buff *skb, struct packet *p, const struct remote *remote)
{
	if (decrement_ttl(skb, p) < 0)
		return DROP_WRITE_ERROR;
	return set_tunnel_key(skb, &remote->tunnel, IDENTITY_WORLD) < 0 ? DROP_NO_TUNNEL_KEY : 0;
}

/* The tunnel's other end if `addr` is behind one. */
static __always_inline const struct remote *tunnel_to(const addr_t *addr)
{
	const struct remote *remote = cfg_overlay_ifindex ? ipcache_lookup(addr) : NULL;

	return remote && remote->flags & REMOTE_TUNNEL ? remote : NULL;
}

/* To a backend elsewhere, which must answer through this node: this node calls it, through the tunnel by its router
 * address. Returns 0, and `hop` is on its way (without a device: through the tunnel), or the reason to drop. */
__noinline int nodeport_forward(struct __sk_buff *skb, struct packet *p, struct next_hop *hop)
{
	int reason;

	if (!p || !hop)
		return DROP_INVALID_PACKET;
	const struct remote *tunnel = tunnel_to(&p->backend.addr);

	if (ttl_expires(p))
		return DROP_TTL_EXCEEDED;
	if (tunnel)
		router_addr(&p->source.addr, is_v6(p));
	else
		node_addr(&p->source.addr, is_v6(p));
	if (addr_is_zero(&p->source.addr))
		return DROP_NAT_NO_MAPPING;
	reason = tunnel ? tunnel_fits(skb, p, 0, hop)
			: find_next_hop(skb, p, &p->source.addr, &p->backend.addr, hop);
	if (!reason)
		reason = nat_bind(p);
	if (!reason)
		reason = nodeport_rewrite(skb, p, true);
	return reason || !tunnel ? reason : tunnel_set(skb, p, tunnel);
}

/* The backend's node learns of a connection by its first packet, and of a datagram by each. */
static __always_inline bool wants_option(const struct packet *p)
{
	return !(p->flags & PACKET_HEADLESS) && (p->t.proto != IPPROTO_TCP || tcp_attempt(p));
}

/* To a backend elsewhere, whose node answers the client itself. Returns as nodeport_forward(); without room for the frontend
 * DROP_FRAGMENTATION_NOT_SUPPORTED, the packet as it was. The first of IPv4's fragments may have none, and its sender not
 * care to be told: hence none of them goes this way. */
__noinline int nodeport_direct(struct __sk_buff *skb, struct packet *p, struct next_hop *hop)
{
	int reason;

	if (!p || !hop)
		return DROP_INVALID_PACKET;
	const struct remote *tunnel = tunnel_to(&p->backend.addr);
	__u32 room = wants_option(p) ? dsr_room(p) : 0;

	if (ttl_expires(p))
		return DROP_TTL_EXCEEDED;
	if (!tunnel && !is_v6(p) && p->flags & PACKET_FRAGMENT)
		return DROP_FRAGMENTATION_NOT_SUPPORTED;
	p->wire_len += room;
	reason = tunnel ? tunnel_fits(skb, p, 0, hop) : find_next_hop(skb, p, &p->t.saddr, &p->backend.addr, hop);
	p->wire_len -= room;
	hop->mtu -= room;
	if (!reason)
		reason = nodeport_rewrite(skb, p, false);
	if (!reason && room)
		reason = dsr_add(skb, p, &p->frontend);
	return reason || !tunnel ? reason : tunnel_set(skb, p, tunnel);
}

/* The backend of the connection that an error is about. */
__noinline int service_of_error(struct packet *p, struct end *to)
{
	struct ct_key key;

	if (!p || !to)
		return false;
	ct_key_of(&key, &p->inner, DIRECTION_INGRESS, CT_SCOPE_SERVICE);
	const struct ct_entry *e = ct_lookup(&key, 0, coarse_now());
	const struct backend *backend = e ? service_backend(e->backend) : NULL;

	if (!backend)
		return false;
	to->addr = backend->addr;
	to->port = backend->port;
	p->service = e->service;
	p->flags |= PACKET_OUTSIDE | (e->flags & CT_BOUND ? PACKET_BOUND : 0);
	return true;
}

/* An error about what a service answered, from wherever it stopped: now it is about what the backend sent. Returns 0 or the
 * reason to drop; without p->service it is none of ours. */
__noinline int nodeport_error(struct __sk_buff *skb, struct packet *p)
{
	struct nat_key out = {.direction = DIRECTION_EGRESS};
	struct end backend = {}, client = {};
	int reason = 0;

	if (!p || !service_of_error(p, &backend))
		return 0;
	out.saddr = p->inner.daddr;
	out.daddr = p->inner.saddr;
	out.sport = p->inner.dport;
	out.dport = p->inner.sport;
	out.proto = p->inner.proto;
	const struct nat_entry *e = nat_find(&out);

	if (e && (p->flags & PACKET_BOUND || !addr_equal(&e->addr, &out.saddr))) {
		client.addr = e->addr;
		client.port = e->port;
		reason = rewrite_inner(skb, p, &client, END_DESTINATION);
	}
	if (!reason)
		reason = rewrite_inner(skb, p, &backend, END_SOURCE);
	return reason ? reason : rewrite(skb, p, &backend, END_DESTINATION);
}

/* An error that is right about a backend elsewhere follows its packets. Returns as nodeport_forward(). */
__noinline int nodeport_forward_error(struct __sk_buff *skb, struct packet *p, struct next_hop *hop)
{
	if (!p || !hop)
		return DROP_INVALID_PACKET;
	const struct remote *tunnel = tunnel_to(&p->t.daddr);

	if (ttl_expires(p))
		return DROP_TTL_EXCEEDED;
	return tunnel ? tunnel_set(skb, p, tunnel) : find_next_hop(skb, p, &p->t.saddr, &p->t.daddr, hop);
}

enum backend_place {
	PLACE_POD,           /* of this node */
	PLACE_NODE,          /* this node itself */
	PLACE_ELSEWHERE,
};

static __always_inline enum backend_place place_of(const addr_t *addr)
{
	if (bpf_map_lookup_elem(&local_addrs, addr))
		return PLACE_POD;
	return owner_of(ipcache_lookup(addr)) == OWNER_THIS_NODE ? PLACE_NODE : PLACE_ELSEWHERE;
}

/* Makes a packet right for its backend. Returns 0 or the reason to drop. */
static __always_inline int nodeport_send(struct __sk_buff *skb, struct packet *p, enum backend_place place,
					 struct next_hop *hop)
{
	int reason;

	if (p->flags & PACKET_ERROR)
		return place == PLACE_ELSEWHERE ? nodeport_forward_error(skb, p, hop) : 0;
	if (place == PLACE_ELSEWHERE) {
		if (p->flags & PACKET_DIRECT) {
			reason = nodeport_direct(skb, p, hop);
			/* What may be cut on its way isn't answered about that. */
			if (reason != DROP_FRAGMENTATION_NOT_SUPPORTED || !may_fragment(skb, p))
				return reason;
		}
		return nodeport_forward(skb, p, hop);
	}
	if (place == PLACE_POD && ttl_expires(p))
		return DROP_TTL_EXCEEDED;
	reason = nodeport_address(skb, p);
	return reason || place == PLACE_POD ? reason : nodeport_track_node(p);
}

/* What came by direct return tells which frontend the client addressed. Anybody could say so, hence it has to be one. */
__noinline int nodeport_told(struct __sk_buff *skb, struct packet *p)
{
	struct service_query q = {};

	if (!p)
		return DROP_INVALID_PACKET;
	int found = dsr_take(skb, p, &p->frontend);

	if (found != DSR_TAKEN)
		return found;
	q.client = p->t.saddr;
	q.addr = p->frontend.addr;
	q.port = p->frontend.port;
	q.proto = p->t.proto;
	/* Another node's port is served there, and here is the backend. */
	if (service_owner(&q) == OWNER_OTHER_NODE)
		q.owner = OWNER_THIS_NODE;
	if (service_find(&q) == SERVICE_NONE || q.frontend.flags & FRONTEND_ADDRESS)
		return DROP_INVALID_PACKET;
	p->service = q.frontend.service;
	p->flags |= PACKET_OUTSIDE;
	return 0;
}

/* The same client port by two frontends, the first still in use. Of a datagram each says which frontend it is for; of TCP
 * only the first packet does. Returns 0 or the reason to drop. */
__noinline int nodeport_told_apart(struct packet *p)
{
	struct ct_key key;

	if (!p)
		return DROP_INVALID_PACKET;
	p->backend.addr = p->t.daddr;
	p->backend.port = p->t.dport;
	if (nodeport_collides(p, &key, coarse_now()))
		p->flags |= PACKET_BOUND;
	return p->flags & PACKET_BOUND && p->t.proto != IPPROTO_UDP ? DROP_NAT_NO_MAPPING : 0;
}

/* A packet for a pod of this node: does it come from another node that leaves the answer to this one? Returns 0 or the
 * reason to drop. */
static __always_inline int nodeport_arrived(struct __sk_buff *skb, struct packet *p)
{
	int reason;

	/* Nearly all packets: nothing between the headers. */
	if (p->l4 == L3_OFFSET + (is_v6(p) ? sizeof(struct ipv6hdr) : sizeof(struct iphdr)))
		return 0;
	reason = nodeport_told(skb, p);
	if (reason || !(p->flags & PACKET_OUTSIDE))
		return reason;
	reason = nodeport_told_apart(p);
	return reason || !(p->flags & PACKET_BOUND) ? reason : nodeport_address(skb, p);
}

/* RFC 4443 2.4 (f) and RFC 1812 4.3.2.8 want a limit: addresses can be forged, and errors be sent to who never asked. */
#define ERRORS_PER_SECOND 1000

static __always_inline bool may_complain(void)
{
	__u32 zero = 0;
	struct errors_sent *sent = bpf_map_lookup_elem(&errors_sent, &zero);
	__u64 now = coarse_now();

	if (!sent)
		return false;
	if (now - sent->since >= NSEC_PER_SEC) {
		sent->since = now;
		sent->count = 0;
	}
	return sent->count++ < ERRORS_PER_SECOND;
}

/* Makes a packet that is dropped the answer to itself, where the protocols want one. Returns 0, or -1: no answer. */
__noinline int nodeport_answer(struct __sk_buff *skb, struct packet *p, int reason, __u32 mtu)
{
	if (!p)
		return -1;
	bool refused = reason == DROP_SERVICE_NO_BACKEND && !(p->flags & PACKET_SILENT);
	bool too_big = reason == DROP_FRAGMENTATION_NOT_SUPPORTED && !may_fragment(skb, p);

	if (refused && p->t.proto == IPPROTO_TCP)
		return refusal(skb, p);
	if (!(refused || too_big || reason == DROP_TTL_EXCEEDED) || !may_complain())
		return -1;
	if (refused)
		return refusal(skb, p);
	return complain(skb, p, too_big ? COMPLAINT_TOO_BIG : COMPLAINT_TTL, mtu);
}

/* A packet that can't go on. */
static __always_inline int nodeport_drop(struct __sk_buff *skb, struct packet *p, int reason, __u32 mtu)
{
	drop(skb, p, reason);
	return nodeport_answer(skb, p, reason, mtu) ? TC_ACT_SHOT : answer_back(skb);
}

/* This packet leaves the node once its addresses are right. */
static __always_inline int nodeport_leave(struct __sk_buff *skb, struct packet *p, struct next_hop *hop)
{
	if (hop->ifindex)
		return leave(skb, p, hop, MARK_ANSWER);
	trace(skb, p, TRACE_TO_OVERLAY);
	skb->mark = MARK_TUNNEL_KEY;
	return bpf_redirect(cfg_overlay_ifindex, 0);
}
