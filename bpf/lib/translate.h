/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Services by packet, for what no socket program has translated. */
#pragma once
#include "lib/conntrack.h"
#include "lib/hairpin.h"
#include "lib/nat.h"
#include "lib/rewrite.h"
#include "lib/service.h"

/* What the pod asks for, by a packet whose peer is known. */
static __always_inline void service_query_of(struct service_query *q, const struct packet *p, const struct endpoint *ep)
{
	__builtin_memset(q, 0, sizeof(*q));
	q->client = p->t.saddr;
	q->client_port = p->t.sport;
	q->addr = p->t.daddr;
	q->port = p->t.dport;
	q->proto = p->t.proto;
	q->flags = QUERY_INSIDE;
	q->endpoint = ep->id;
	if (p->peer_flags & REMOTE_NODE || p->peer == IDENTITY_HOST)
		q->owner = p->peer == IDENTITY_HOST ? OWNER_THIS_NODE : OWNER_OTHER_NODE;
	else
		q->owner = p->peer == IDENTITY_WORLD ? OWNER_NOBODY : OWNER_POD;
}

static __always_inline bool tcp_attempt(const struct packet *p)
{
	return p->tcp_flags & TCP_SYN && !(p->tcp_flags & TCP_ACK);
}

/* A frontend may come to stand for another choice of endpoints, when a policy changes: that decides about new connections.
 * What is established stays where it is known. */
static __always_inline bool service_keeps_established(const struct packet *p)
{
	return p->t.proto == IPPROTO_TCP && !tcp_attempt(p);
}

/* How the pod's own connection with the backend is known, unless it has another port there. */
static __always_inline void service_backend_key(struct ct_key *key, const struct packet *p, const struct end *to)
{
	key->local = p->t.saddr;
	key->remote = to->addr;
	key->local_port = p->t.sport;
	key->remote_port = to->port;
	key->proto = p->t.proto;
	key->scope = CT_SCOPE_CONNECTION;
	key->pad = 0;
	if (addr_equal(&key->local, &key->remote)) {
		key->scope = CT_SCOPE_HAIRPIN;
		key->local_port = to->port;
		key->remote_port = p->t.sport;
		router_addr(&key->remote, is_v6(p));
	}
}

/* Has the backend closed its side? `key` is the caller's to spare. */
static __always_inline bool service_has_answered_end(const struct packet *p, const struct service_query *q,
						     struct ct_key *key, __u64 now)
{
	if (p->flags & PACKET_BOUND)
		return false;
	service_backend_key(key, p, &q->to);
	const struct ct_entry *e = ct_lookup(key, q->endpoint, now);

	return e && e->flags & (CT_FIN_REPLY | CT_RST);
}

/* The backend of a connection that addressed a service earlier, in q->to. A fresh attempt after its end chooses anew. */
static __always_inline bool service_goes_on(struct packet *p, struct ct_entry *e, struct service_query *q,
					    struct ct_key *key, __u64 now)
{
	bool attempt = tcp_attempt(p);

	if (attempt && e->flags & (CT_RST | CT_FIN_FORWARD))
		return false;
	if (e->service != q->frontend.service && !service_keeps_established(p))
		return false;
	if (!service_answer(q, e->backend))
		return false;
	if (e->flags & CT_BOUND)
		p->flags |= PACKET_BOUND;
	if (p->tcp_flags & TCP_RST)
		e->flags |= CT_RST;
	else if (p->tcp_flags & TCP_FIN)
		e->flags |= CT_FIN_FORWARD;
	/* Only the connection's own entry sees replies: this one may outlive it, but not the reverse. */
	if (e->flags & CT_FIN_FORWARD && !(e->flags & CT_FIN_REPLY) && service_has_answered_end(p, q, key, now))
		e->flags |= CT_FIN_REPLY;
	ct_extend(e, now + (attempt ? CT_TCP_SYN_NS : ct_lifetime(p->t.proto, e->flags | CT_SEEN_REPLY)));
	return true;
}

/* Would the chosen backend take this for a connection that the pod already has with it by the same port, directly or
 * through another frontend? Then it gets another port on the way. */
__noinline int service_collides(struct packet *p, struct service_query *q)
{
	struct ct_key key;

	if (!p || !q)
		return false;
	service_backend_key(&key, p, &q->to);
	const struct ct_entry *e = ct_lookup(&key, q->endpoint, coarse_now());

	if (!e || e->flags & CT_RST || (e->flags & CT_FIN_FORWARD && e->flags & CT_FIN_REPLY))
		return false;
	return e->frontend_port != p->t.dport || !addr_equal(&e->frontend, &p->t.daddr);
}

/* Remembers the backend in `q`. Returns 0 or the reason to drop. */
__noinline int service_remember(struct packet *p, struct service_query *q)
{
	struct ct_entry e = {.flags = CT_OPENED_EGRESS};
	struct ct_key key;

	if (!p || !q)
		return DROP_INVALID_PACKET;
	e.expires = coarse_now() + (p->t.proto == IPPROTO_UDP ? CT_BOTH_WAYS_NS : CT_TCP_SYN_NS);
	e.endpoint = q->endpoint;
	if (p->flags & PACKET_BOUND)
		e.flags |= CT_BOUND;
	e.service = q->frontend.service;
	e.backend = q->backend;
	e.frontend = p->t.daddr;
	e.frontend_port = p->t.dport;
	ct_key_of(&key, &p->t, DIRECTION_EGRESS, CT_SCOPE_SERVICE);
	return bpf_map_update_elem(&conntrack, &key, &e, BPF_ANY) ? DROP_CT_MAP_INSERTION_FAILED : 0;
}

enum known {
	KNOWN_NOT,
	KNOWN_BACKEND,   /* in q->to */
	KNOWN_LOST,      /* it had a backend that is gone */
};

/* Does the packet belong to a connection that addressed a service? `found`: there is a frontend, in q->frontend. */
__noinline int service_known(struct packet *p, struct service_query *q, bool found)
{
	struct ct_key key;

	if (!p || !q)
		return KNOWN_NOT;
	__u64 now = coarse_now();

	ct_key_of(&key, &p->t, DIRECTION_EGRESS, CT_SCOPE_SERVICE);
	struct ct_entry *e = ct_lookup(&key, q->endpoint, now);

	if (!e)
		return KNOWN_NOT;
	return found && service_goes_on(p, e, q, &key, now) ? KNOWN_BACKEND : KNOWN_LOST;
}

/* Finds the backend for a packet: p->backend; p->service is 0 if it is for no service. Returns 0 or the reason to drop. */
__noinline int service_of_packet(struct packet *p, struct endpoint *ep)
{
	struct service_query q;
	int known;

	if (!p || !ep)
		return DROP_INVALID_PACKET;
	service_query_of(&q, p, ep);
	bool found = service_find(&q) == SERVICE_FOUND;

	if (found && service_exempts(&q))
		return 0;
	if (found && !service_admits(&q)) {
		p->service = q.frontend.service;
		return DROP_SERVICE_SOURCE_RANGE;
	}
	known = service_known(p, &q, found);
	/* What was connected to a service that is gone is told so. */
	if (!found)
		return known == KNOWN_NOT ? 0 : DROP_SERVICE_NO_BACKEND;
	p->service = q.frontend.service;
	if (known != KNOWN_BACKEND) {
		/* No other backend knows of a connection that has lost its own. (Of SCTP's, it tells so itself.) */
		if (known == KNOWN_LOST && p->t.proto == IPPROTO_TCP && !tcp_attempt(p))
			return DROP_SERVICE_NO_BACKEND;
		int result = service_choose(&q);

		if (result == SERVICE_SILENT)
			p->flags |= PACKET_SILENT;
		if (result != SERVICE_FOUND)
			return DROP_SERVICE_NO_BACKEND;
		if (service_collides(p, &q))
			p->flags |= PACKET_BOUND;
		int reason = service_remember(p, &q);

		if (reason)
			return reason;
	}
	p->frontend.addr = p->t.daddr;
	p->frontend.port = p->t.dport;
	p->backend = q.to;
	return 0;
}

/* The pod's port towards the backend of a connection that `inner` belongs to. */
static __always_inline bool bound_port(const struct tuple *inner, struct end *client)
{
	struct nat_key out = {.direction = DIRECTION_EGRESS};

	out.saddr = inner->daddr;
	out.daddr = inner->saddr;
	out.sport = inner->dport;
	out.dport = inner->sport;
	out.proto = inner->proto;
	const struct nat_entry *e = nat_find(&out);

	if (!e)
		return false;
	client->addr = e->addr;
	client->port = e->port;
	return true;
}

/* The pod answers what it got from a frontend with an error: its cause is a packet of the backend. Returns 0 or the reason
 * to drop. */
__noinline int service_translate_error(struct __sk_buff *skb, struct packet *p, struct endpoint *ep)
{
	struct ct_key key;
	struct end to = {};
	int reason;

	if (!p || !ep)
		return DROP_INVALID_PACKET;
	ct_key_of(&key, &p->inner, DIRECTION_INGRESS, CT_SCOPE_SERVICE);
	const struct ct_entry *e = ct_lookup(&key, ep->id, coarse_now());
	const struct backend *backend = e ? service_backend(e->backend) : NULL;

	if (!backend)
		return 0;
	p->service = e->service;
	if (e->flags & CT_BOUND && bound_port(&p->inner, &to)) {
		reason = rewrite_inner(skb, p, &to, END_DESTINATION);
		if (reason)
			return reason;
	}
	to.addr = backend->addr;
	to.port = backend->port;
	bool from_frontend = addr_equal(&p->t.daddr, &p->inner.saddr);

	reason = rewrite_inner(skb, p, &to, END_SOURCE);
	return reason || !from_frontend ? reason : rewrite(skb, p, &to, END_DESTINATION);
}

/* Replaces a service's address and port by a backend's. Returns 0 or the reason to drop. */
static __always_inline int service_translate(struct __sk_buff *skb, struct packet *p, struct endpoint *ep)
{
	int reason = 0;

	if (p->flags & PACKET_ERROR)
		return service_translate_error(skb, p, ep);
	if (!(p->flags & PACKET_PORTS))
		return 0;
	reason = service_of_packet(p, ep);
	if (reason || !p->service)
		return reason;
	if (p->flags & PACKET_BOUND) {
		p->source.addr = p->t.saddr;
		reason = nat_bind(p);
		if (!reason)
			reason = rewrite(skb, p, &p->source, END_SOURCE);
	}
	return reason ? reason : rewrite(skb, p, &p->backend, END_DESTINATION);
}
