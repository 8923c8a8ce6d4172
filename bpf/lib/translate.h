/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Services by packet, for what no socket program has translated. */
#pragma once
#include "lib/conntrack.h"
#include "lib/rewrite.h"
#include "lib/service.h"

/* The backend of a connection that addressed a service earlier; a fresh attempt after its end chooses anew. */
static __always_inline const struct backend *service_chosen(struct packet *p, struct ct_entry *e, __u64 now)
{
	bool attempt = p->tcp_flags & TCP_SYN && !(p->tcp_flags & TCP_ACK);

	if (attempt && e->flags & (CT_RST | CT_FIN_FORWARD))
		return NULL;
	if (p->tcp_flags & TCP_RST)
		e->flags |= CT_RST;
	else if (p->tcp_flags & TCP_FIN)
		e->flags |= CT_FIN_FORWARD;
	/* Only the connection's own entry sees replies: this one may outlive it, but not the reverse. */
	ct_extend(e, now + (attempt ? CT_TCP_SYN_NS : ct_lifetime(p->t.proto, e->flags | CT_SEEN_REPLY)));
	p->service = e->service;
	return service_backend(e->backend);
}

/* Chooses a backend for a new connection, if it is for a service: p->service is 0 if not. Returns 0 or the reason to
 * drop. */
__noinline int service_choose(struct packet *p, struct endpoint *ep, struct end *to)
{
	struct frontend_key wanted = {};
	struct ct_key key;
	struct ct_entry e = {};

	if (!p || !ep || !to)
		return DROP_INVALID_PACKET;
	__u64 now = coarse_now();

	p->service = 0;
	wanted.addr = p->t.daddr;
	wanted.port = p->t.dport;
	wanted.proto = p->t.proto;
	const struct frontend *frontend = service_lookup(&wanted);

	if (!frontend)
		return 0;
	p->service = frontend->service;
	const struct backend *backend = service_select(frontend, bpf_get_prandom_u32(), &e.backend);

	if (!backend)
		return DROP_SERVICE_NO_BACKEND;
	to->addr = backend->addr;
	to->port = backend->port;
	e.expires = now + (p->t.proto == IPPROTO_UDP ? CT_BOTH_WAYS_NS : CT_TCP_SYN_NS);
	e.endpoint = ep->id;
	e.service = frontend->service;
	e.flags = CT_OPENED_EGRESS;
	e.frontend = p->t.daddr;
	e.frontend_port = p->t.dport;
	ct_key_of(&key, &p->t, DIRECTION_EGRESS, CT_SCOPE_SERVICE);
	return bpf_map_update_elem(&conntrack, &key, &e, BPF_ANY) ? DROP_CT_MAP_INSERTION_FAILED : 0;
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
	const struct backend *backend = NULL;
	struct ct_key key;
	struct end to = {};
	int reason;

	if (!p || !ep)
		return DROP_INVALID_PACKET;
	__u64 now = coarse_now();

	if (p->flags & PACKET_ERROR)
		return service_translate_error(skb, p, ep, &key, now);
	if (!(p->flags & PACKET_PORTS))
		return 0;
	ct_key_of(&key, &p->t, DIRECTION_EGRESS, CT_SCOPE_SERVICE);
	struct ct_entry *e = ct_lookup(&key, ep->id, now);

	if (e)
		backend = service_chosen(p, e, now);
	if (backend) {
		to.addr = backend->addr;
		to.port = backend->port;
	} else {
		reason = service_choose(p, ep, &to);
		if (reason || !p->service)
			return reason;
	}
	p->frontend.addr = p->t.daddr;
	p->frontend.port = p->t.dport;
	return rewrite(skb, p, &to, END_DESTINATION);
}
