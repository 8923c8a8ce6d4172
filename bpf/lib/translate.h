/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Services by packet, for what no socket program has translated. */
#pragma once
#include "lib/conntrack.h"
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

/* The backend of a connection that addressed a service earlier, in q->to. A fresh attempt after its end chooses anew. */
static __always_inline bool service_goes_on(struct packet *p, struct ct_entry *e, struct service_query *q, __u64 now)
{
	bool attempt = tcp_attempt(p);

	if (e->service != q->frontend.service || (attempt && e->flags & (CT_RST | CT_FIN_FORWARD)))
		return false;
	if (!service_answer(q, e->backend))
		return false;
	if (p->tcp_flags & TCP_RST)
		e->flags |= CT_RST;
	else if (p->tcp_flags & TCP_FIN)
		e->flags |= CT_FIN_FORWARD;
	/* Only the connection's own entry sees replies: this one may outlive it, but not the reverse. */
	ct_extend(e, now + (attempt ? CT_TCP_SYN_NS : ct_lifetime(p->t.proto, e->flags | CT_SEEN_REPLY)));
	return true;
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
	return found && service_goes_on(p, e, q, now) ? KNOWN_BACKEND : KNOWN_LOST;
}

/* Finds the backend for a packet, in q->to; p->service is 0 if it is for no service. Returns 0 or the reason to drop. */
static __always_inline int service_of_packet(struct packet *p, struct service_query *q)
{
	bool found = service_find(q) == SERVICE_FOUND;
	int known;

	p->service = 0;
	if (found && service_exempts(q))
		return 0;
	known = service_known(p, q, found);
	/* What was connected to a service that is gone is told so. */
	if (!found)
		return known == KNOWN_NOT ? 0 : DROP_SERVICE_NO_BACKEND;
	p->service = q->frontend.service;
	if (known == KNOWN_BACKEND)
		return 0;
	/* No other backend knows of a connection that has lost its own. */
	if (known == KNOWN_LOST && p->t.proto != IPPROTO_UDP && !tcp_attempt(p))
		return DROP_SERVICE_NO_BACKEND;
	return service_choose(q) == SERVICE_FOUND ? service_remember(p, q) : DROP_SERVICE_NO_BACKEND;
}

/* The pod answers what it got from a frontend with an error: its cause is a packet of the backend. */
static __always_inline int service_translate_error(struct __sk_buff *skb, struct packet *p, struct endpoint *ep,
						   struct ct_key *key, __u64 now)
{
	struct end to = {};

	ct_key_of(key, &p->inner, DIRECTION_INGRESS, CT_SCOPE_SERVICE);
	struct ct_entry *e = ct_lookup(key, ep->id, now);
	const struct backend *backend = e ? service_backend(e->backend) : NULL;

	if (!backend)
		return 0;
	to.addr = backend->addr;
	to.port = backend->port;
	p->service = e->service;
	bool from_frontend = addr_equal(&p->t.daddr, &p->inner.saddr);
	int reason = rewrite_inner(skb, p, &to, END_SOURCE);

	return reason || !from_frontend ? reason : rewrite(skb, p, &to, END_DESTINATION);
}

/* Replaces a service's address and port by a backend's. Returns 0 or the reason to drop. */
__noinline int service_translate(struct __sk_buff *skb, struct packet *p, struct endpoint *ep)
{
	struct service_query q;
	struct ct_key key;
	int reason;

	if (!p || !ep)
		return DROP_INVALID_PACKET;
	if (p->flags & PACKET_ERROR)
		return service_translate_error(skb, p, ep, &key, coarse_now());
	if (!(p->flags & PACKET_PORTS))
		return 0;
	service_query_of(&q, p, ep);
	reason = service_of_packet(p, &q);
	if (reason || !p->service)
		return reason;
	p->frontend.addr = p->t.daddr;
	p->frontend.port = p->t.dport;
	return rewrite(skb, p, &q.to, END_DESTINATION);
}
