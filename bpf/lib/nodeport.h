/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Services for clients outside the node: to a backend here, on this node itself or elsewhere, and the way back. The table
 * is in docs/design/service.md, "From outside". */
#pragma once
#include "lib/conntrack.h"
#include "lib/encap.h"
#include "lib/forward.h"
#include "lib/hairpin.h"
#include "lib/nat.h"
#include "lib/refuse.h"
#include "lib/route.h"
#include "lib/service.h"

/* The client has closed its side: what it still acknowledges keeps the entry. */
#define CT_HALF_CLOSED_NS (60 * NSEC_PER_SEC)

static __always_inline bool is_attempt(const struct packet *p)
{
	return p->tcp_flags & TCP_SYN && !(p->tcp_flags & TCP_ACK);
}

static __always_inline void note_client_end(const struct packet *p, struct ct_entry *e, __u64 now)
{
	__u64 lifetime = CT_TCP_SYN_NS;

	if (p->tcp_flags & TCP_RST)
		e->flags |= CT_RST;
	else if (p->tcp_flags & TCP_FIN)
		e->flags |= CT_FIN_FORWARD;
	/* Replies aren't seen here: whatever isn't the first packet counts as an answer to one. */
	if (!is_attempt(p))
		lifetime = e->flags & CT_FIN_FORWARD ? CT_HALF_CLOSED_NS : ct_lifetime(p->t.proto, e->flags | CT_SEEN_REPLY);
	ct_extend(e, now + lifetime);
}

/* A connection goes on with its backend while the frontend is still the same service's; a new attempt after its end
 * chooses anew. */
static __always_inline bool nodeport_known(struct packet *p)
{
	struct ct_key key;
	__u64 now = coarse_now();

	ct_key_of(&key, &p->t, DIRECTION_EGRESS, CT_SCOPE_SERVICE);
	struct ct_entry *e = ct_lookup(&key, 0, now);

	if (!e || e->service != p->service || (is_attempt(p) && e->flags & (CT_RST | CT_FIN_FORWARD)))
		return false;
	const struct backend *backend = service_backend(e->backend);

	if (!backend)
		return false;
	p->backend.addr = backend->addr;
	p->backend.port = backend->port;
	if (e->flags & CT_BOUND)
		p->flags |= PACKET_BOUND;
	note_client_end(p, e, now);
	return true;
}

/* Would the backend, here or this node itself, take this for a connection that the same client port already has with it,
 * directly or through another frontend? */
static __always_inline bool nodeport_collides(const struct packet *p, struct ct_key *key, __u64 now)
{
	ifindex_t ifindex;
	const struct endpoint *ep = local_endpoint(&p->backend.addr, &ifindex);

	key->local = p->backend.addr;
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
	e.expires = now + (p->t.proto == IPPROTO_UDP ? CT_BOTH_WAYS_NS : CT_TCP_SYN_NS);
	e.service = p->service;
	e.frontend = p->t.daddr;
	e.frontend_port = p->t.dport;
	ct_key_of(&key, &p->t, DIRECTION_EGRESS, CT_SCOPE_SERVICE);
	return bpf_map_update_elem(&conntrack, &key, &e, BPF_ANY) ? DROP_CT_MAP_INSERTION_FAILED : 0;
}

/* Which service a packet is for (p->service; 0: none) and which backend of it. `owner`: of the address. `chosen`: the
 * backend's number, if it wasn't known before. Returns 0 or the reason to drop. */
__noinline int nodeport_choose(struct packet *p, __u32 owner, __u32 *chosen)
{
	struct service_query q = {};
	int result;

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
	if (q.frontend.flags & FRONTEND_DIRECT_RETURN)
		p->flags |= PACKET_DIRECT;
	if (q.frontend.flags & FRONTEND_SILENT)
		p->flags |= PACKET_SILENT;
	if (!service_admits(&q))
		return DROP_SERVICE_SOURCE_RANGE;
	if (nodeport_known(p))
		return 0;
	result = service_choose(&q);
	if (result != SERVICE_FOUND)
		return DROP_SERVICE_NO_BACKEND;
	p->backend = q.to;
	*chosen = q.backend;
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
	    !(is_attempt(p) && e->flags)) {
		note_client_end(p, e, now);
		return 0;
	}
	fresh.flags = p->flags & PACKET_BOUND ? CT_BOUND : 0;
	fresh.service = p->service;
	fresh.frontend = p->frontend.addr;
	fresh.frontend_port = p->frontend.port;
	note_client_end(p, &fresh, now);
	return bpf_map_update_elem(&conntrack, &key, &fresh, BPF_ANY) ? DROP_CT_MAP_INSERTION_FAILED : 0;
}

/* May routers cut this packet? */
static __always_inline bool may_fragment(struct __sk_buff *skb, const struct packet *p)
{
	__be16 frag_off;

	return !is_v6(p) && bpf_skb_load_bytes(skb, L3_OFFSET + offsetof(struct iphdr, frag_off), &frag_off, 2) >= 0 &&
	       !(frag_off & bpf_htons(IP_DONT_FRAGMENT));
}

/* To a backend behind the tunnel, as this node's router address: what answers goes back there. The backend's node judges
 * it as the world. Whatever may be cut is cut outside the tunnel. */
static __always_inline int nodeport_tunnel(struct __sk_buff *skb, struct packet *p, const struct remote *remote,
					   struct next_hop *hop)
{
	int reason;

	if (p->wire_len > cfg_pod_mtu && !may_fragment(skb, p)) {
		hop->mtu = cfg_pod_mtu;
		return DROP_FRAGMENTATION_NOT_SUPPORTED;
	}
	router_addr(&p->source.addr, is_v6(p));
	if (addr_is_zero(&p->source.addr))
		return DROP_NAT_NO_MAPPING;
	reason = nat_bind(p);
	if (!reason)
		reason = nodeport_rewrite(skb, p, true);
	if (!reason && decrement_ttl(skb, p) < 0)
		reason = DROP_WRITE_ERROR;
	if (!reason && set_tunnel_key(skb, &remote->tunnel, IDENTITY_WORLD) < 0)
		reason = DROP_NO_TUNNEL_KEY;
	return reason;
}

static __always_inline int nodeport_native(struct __sk_buff *skb, struct packet *p, struct next_hop *hop)
{
	int reason;

	node_addr(&p->source.addr, is_v6(p));
	if (addr_is_zero(&p->source.addr))
		return DROP_NAT_NO_MAPPING;
	reason = find_next_hop(skb, p, &p->source.addr, &p->backend.addr, hop);
	if (!reason)
		reason = nat_bind(p);
	return reason ? reason : nodeport_rewrite(skb, p, true);
}

/* To a backend elsewhere, which must answer through this node: this node calls it. Returns 0, and `hop` is on its way (its
 * ifindex is 0 through the tunnel), or the reason to drop. */
__noinline int nodeport_forward(struct __sk_buff *skb, struct packet *p, struct next_hop *hop)
{
	if (!p || !hop)
		return DROP_INVALID_PACKET;
	const struct remote *remote = ipcache_lookup(&p->backend.addr);

	if (ttl_expires(p))
		return DROP_TTL_EXCEEDED;
	if (cfg_overlay_ifindex && remote && remote->flags & REMOTE_TUNNEL)
		return nodeport_tunnel(skb, p, remote, hop);
	return nodeport_native(skb, p, hop);
}

/* A packet that can't go on is dropped and its sender told, where the protocols want that. */
static __always_inline int nodeport_drop(struct __sk_buff *skb, struct packet *p, int reason, __u32 mtu)
{
	int answered = -1;

	drop(skb, p, reason);
	if (reason == DROP_SERVICE_NO_BACKEND && !(p->flags & PACKET_SILENT))
		answered = refusal(skb, p);
	else if (reason == DROP_TTL_EXCEEDED)
		answered = complain(skb, p, COMPLAINT_TTL, 0);
	else if (reason == DROP_FRAGMENTATION_NOT_SUPPORTED && !may_fragment(skb, p))
		answered = complain(skb, p, COMPLAINT_TOO_BIG, mtu);
	return answered ? TC_ACT_SHOT : answer_back(skb);
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
