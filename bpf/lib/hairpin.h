/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* A pod that calls a service by packet and is itself the backend. No stack takes a packet from its own address off the
 * wire, so the gateway stands for the caller. A pod may always talk to itself: policy isn't asked. */
#pragma once
#include "lib/arp_nd.h"
#include "lib/conntrack.h"
#include "lib/forward.h"
#include "lib/rewrite.h"

#define HAIRPIN_NONE -1

static __always_inline void router_addr(addr_t *to, bool v6)
{
	if (v6)
		config_addr(to, &cfg_router_addr6);
	else
		config_addr(to, &cfg_router_addr4);
}

static __always_inline bool is_router(const addr_t *addr, bool v6)
{
	return config_addr_is(v6 ? &cfg_router_addr6 : &cfg_router_addr4, addr);
}

static __always_inline bool is_for_router(const struct packet *p)
{
	return p->flags & (PACKET_PORTS | PACKET_ERROR) && is_router(&p->t.daddr, is_v6(p));
}

static __always_inline void hairpin_note(struct packet *p, struct ct_entry *e, bool reply, __u64 now)
{
	ct_note_tcp(p, e, reply);
	ct_extend(e, now + ct_lifetime(p->t.proto, e->flags));
}

/* Does the entry say who is called, and go on? */
static __always_inline bool hairpin_goes_on(const struct packet *p, const struct ct_entry *e)
{
	return !ct_starts_anew(p, e) && e->service == p->service && e->frontend_port == p->frontend.port &&
	       !(e->flags & CT_BOUND) == !(p->flags & PACKET_BOUND) && addr_equal(&e->frontend, &p->frontend.addr);
}

/* Remembers whom the pod called, for its own answers. The packet is already addressed to the backend. */
__noinline int hairpin_remember(struct packet *p, struct endpoint *ep)
{
	struct ct_key key = {.scope = CT_SCOPE_HAIRPIN};
	struct ct_entry fresh = {.flags = CT_OPENED_EGRESS | CT_SEEN_REPLY};

	if (!p || !ep)
		return DROP_CT_CANNOT_CREATE;
	__u64 now = coarse_now();

	router_addr(&key.remote, is_v6(p));
	if (addr_is_zero(&key.remote))
		return DROP_CT_CANNOT_CREATE;
	key.local = p->t.daddr;
	key.local_port = p->t.dport;
	key.remote_port = p->t.sport;
	key.proto = p->t.proto;
	struct ct_entry *e = ct_lookup(&key, ep->id, now);

	if (e && hairpin_goes_on(p, e)) {
		hairpin_note(p, e, false, now);
		return 0;
	}
	if (p->flags & PACKET_BOUND)
		fresh.flags |= CT_BOUND;
	fresh.endpoint = ep->id;
	fresh.service = p->service;
	fresh.frontend = p->frontend.addr;
	fresh.frontend_port = p->frontend.port;
	hairpin_note(p, &fresh, false, now);
	return bpf_map_update_elem(&conntrack, &key, &fresh, BPF_ANY) ? DROP_CT_MAP_INSERTION_FAILED : 0;
}

/* The call: comes from the gateway now. Returns 0 or the reason to drop. */
static __always_inline int hairpin(struct __sk_buff *skb, struct packet *p, struct endpoint *ep)
{
	struct end caller = {.port = p->t.sport};
	int reason = hairpin_remember(p, ep);

	if (reason)
		return reason;
	router_addr(&caller.addr, is_v6(p));
	count(METRIC_FORWARDED, DIRECTION_EGRESS, p->len);
	return rewrite(skb, p, &caller, END_SOURCE);
}

/* The answer, or an error about the call: from the service to the pod. Returns 0, HAIRPIN_NONE if it isn't one, or the
 * reason to drop. */
__noinline int hairpin_back(struct __sk_buff *skb, struct packet *p, struct endpoint *ep)
{
	struct ct_key key;
	struct end to = {};
	int reason = 0;

	if (!p || !ep)
		return DROP_INVALID_PACKET;
	bool error = p->flags & PACKET_ERROR;

	if (error)
		ct_key_of(&key, &p->inner, DIRECTION_INGRESS, CT_SCOPE_HAIRPIN);
	else
		ct_key_of(&key, &p->t, DIRECTION_EGRESS, CT_SCOPE_HAIRPIN);
	__u64 now = coarse_now();
	struct ct_entry *e = ct_lookup(&key, ep->id, now);

	if (!e)
		return HAIRPIN_NONE;
	if (!error)
		hairpin_note(p, e, true, now);
	p->service = e->service;
	p->frontend.addr = e->frontend;
	p->frontend.port = e->frontend_port;
	p->flags |= PACKET_UNTRANSLATE | (e->flags & CT_BOUND ? PACKET_BOUND : 0);
	to.addr = p->t.saddr;
	to.port = key.remote_port;
	count(METRIC_FORWARDED, DIRECTION_INGRESS, p->len);
	if (error)
		reason = rewrite_inner(skb, p, &to, END_SOURCE);
	if (!reason)
		reason = rewrite(skb, p, &to, END_DESTINATION);
	return reason ? reason : reply_address(skb, p);
}
