/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Connections, each as one endpoint sees it, with the verdict that was reached on it. */
#pragma once
#include "include/config.h"
#include "include/packet.h"
#include "lib/parse.h"
#include "lib/policy.h"
#include "lib/trace.h"
#include "maps/conntrack.h"

#define CT_TCP_SYN_NS (60 * NSEC_PER_SEC)
#define CT_CLOSING_NS (10 * NSEC_PER_SEC)
#define CT_ONE_WAY_NS (60 * NSEC_PER_SEC)
#define CT_BOTH_WAYS_NS (180 * NSEC_PER_SEC)
#define CT_ICMP_NS (30 * NSEC_PER_SEC)

static __always_inline void ct_key_of(struct ct_key *key, const struct tuple *t, __u32 direction, __u8 scope)
{
	bool egress = direction == DIRECTION_EGRESS;

	key->local = egress ? t->saddr : t->daddr;
	key->remote = egress ? t->daddr : t->saddr;
	key->local_port = egress ? t->sport : t->dport;
	key->remote_port = egress ? t->dport : t->sport;
	key->proto = t->proto;
	key->scope = scope;
	key->pad = 0;
}

/* Programs of another version may run at other devices, with another table: what those know of a living connection becomes
 * an entry of our own, from where on each version goes by its own. Returns whether there is one now. */
static __noinline bool ct_adopt(const struct ct_key *key, __u32 endpoint)
{
	for (__u32 i = 0; i < OTHER_TABLES; i++) {
		__u32 place = i;
		void *table = bpf_map_lookup_elem(&conntrack_other, &place);

		if (!table)
			return false;
		const struct ct_entry *e = bpf_map_lookup_elem(table, key);

		if (e && e->endpoint == endpoint && e->expires > coarse_now()) {
			/* Another CPU may be first. */
			bpf_map_update_elem(&conntrack, key, e, BPF_NOEXIST);
			return true;
		}
	}
	return false;
}

/* Expired entries and those of a former owner of the address are misses. */
static __always_inline struct ct_entry *ct_lookup(const struct ct_key *key, __u32 endpoint, __u64 now)
{
	struct ct_entry *e = bpf_map_lookup_elem(&conntrack, key);

	if (!e && ct_adopt(key, endpoint))
		e = bpf_map_lookup_elem(&conntrack, key);
	return e && e->endpoint == endpoint && e->expires > now ? e : NULL;
}

struct ct_judged {
	__u32 epoch;
	identity_t peer;
};

/* Whether the cached verdict was reached under this epoch on this peer. One load, as `ct_set_judged` is one store: two
 * CPUs may judge packets of one connection at once, from different peers when an address changes hands. */
static __always_inline bool ct_is_judged(const struct ct_entry *e, __u32 epoch, identity_t peer, bool any_peer)
{
	union {
		__u64 word;
		struct ct_judged is;
	} has = {.word = *(const volatile __u64 *)&e->epoch};

	return has.is.epoch == epoch && epoch && (any_peer || has.is.peer == peer);
}

static __always_inline void ct_set_judged(struct ct_entry *e, __u32 epoch, identity_t peer)
{
	union {
		struct ct_judged is;
		__u64 word;
	} now = {.is = {.epoch = epoch, .peer = peer}};

	*(volatile __u64 *)&e->epoch = now.word;
}

static __always_inline __u64 ct_lifetime(__u8 proto, __u32 flags)
{
	if (proto == IPPROTO_TCP || proto == IPPROTO_SCTP) {
		if (flags & CT_RST || (flags & CT_FIN_FORWARD && flags & CT_FIN_REPLY))
			return CT_CLOSING_NS;
		return flags & CT_SEEN_REPLY ? cfg_tcp_established_ns : CT_TCP_SYN_NS;
	}
	if (proto == IPPROTO_UDP)
		return flags & CT_SEEN_REPLY ? CT_BOTH_WAYS_NS : CT_ONE_WAY_NS;
	return CT_ICMP_NS;
}

/* A cache line that every CPU writes for every packet is dear: a second's difference doesn't matter. */
static __always_inline void ct_extend(struct ct_entry *e, __u64 expires)
{
	if (expires > e->expires + NSEC_PER_SEC || expires + NSEC_PER_SEC < e->expires)
		e->expires = expires;
}

/* A connection attempt can't belong to a connection that is over, nor be the reply to one. */
static __always_inline bool ct_starts_anew(const struct packet *p, const struct ct_entry *e)
{
	__u32 opener = e->flags & CT_OPENED_EGRESS ? DIRECTION_EGRESS : DIRECTION_INGRESS;

	if (p->flags & PACKET_ERROR || !(p->tcp_flags & TCP_SYN) || p->tcp_flags & TCP_ACK)
		return false;
	if (p->direction != opener || e->flags & (CT_RST | CT_FIN_FORWARD | CT_FIN_REPLY))
		return true;
	/* The same ports once through a service and once directly. */
	return p->direction == DIRECTION_EGRESS && e->service != p->service;
}

static __always_inline port_be_t policy_port_of_icmp(__u8 type)
{
	return bpf_htons(type << 8);
}

/* The question as it was when the connection was opened. */
static __always_inline void query_of_entry(struct policy_query *q, const struct ct_key *key, const struct ct_entry *e)
{
	bool egress = e->flags & CT_OPENED_EGRESS;

	q->addr = key->remote;
	q->direction = egress ? DIRECTION_EGRESS : DIRECTION_INGRESS;
	q->proto = key->proto;
	q->port = egress ? key->remote_port : key->local_port;
	if (key->proto == IPPROTO_ICMP)
		q->port = policy_port_of_icmp(ICMP_ECHO);
	else if (key->proto == IPPROTO_ICMPV6)
		q->port = policy_port_of_icmp(ICMPV6_ECHO_REQUEST);
}

static __always_inline void ct_note_tcp(struct packet *p, struct ct_entry *e, bool reply)
{
	__u32 seen = 0;
	__u16 news = p->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST);

	if (p->tcp_flags & TCP_RST)
		seen = CT_RST;
	else if (p->tcp_flags & TCP_FIN)
		seen = reply ? CT_FIN_REPLY : CT_FIN_FORWARD;
	if (seen & ~e->flags)
		e->flags |= seen;
	news = (reply ? news << 8 : news) & ~e->tcp_flags;
	if (news) {
		e->tcp_flags |= news;
		p->report = true;
	}
}

/* What the answers to this packet, of whoever opens connections, seem to come from. */
static __always_inline __u32 ct_service_of(const struct packet *p)
{
	return p->direction == DIRECTION_EGRESS || p->flags & PACKET_OUTSIDE ? p->service : 0;
}

/* Datagrams by one port, first through a service and now directly (its socket was closed, and another got the port): the
 * last one says where answers come from. Attempts of TCP open a new entry, and who uses two frontends at once has a
 * port for each. */
static __always_inline void ct_follow(const struct packet *p, struct ct_entry *e)
{
	__u32 service = ct_service_of(p);
	__u32 bound = service && p->flags & PACKET_BOUND ? CT_BOUND : 0;

	if (p->t.proto != IPPROTO_UDP || p->flags & PACKET_FRAGMENT)
		return;
	if (e->service == service && (!service || (e->flags & CT_BOUND) == bound))
		return;
	e->frontend = p->frontend.addr;
	e->frontend_port = p->frontend.port;
	e->service = service;
	/* A port that a binding took may be one that the pod used itself, and the other way round. */
	e->flags = (e->flags & ~CT_BOUND) | bound;
}

/* Who is on the other side? A node that calls a pod for a client outside says so by the tunnel; the answer only has its
 * address. */
static __always_inline identity_t ct_peer(const struct packet *p, const struct ct_entry *e, bool reply)
{
	bool for_world = reply && p->direction == DIRECTION_EGRESS && p->peer_flags & REMOTE_NODE &&
			 *(const volatile identity_t *)&e->peer == IDENTITY_WORLD;

	return for_world ? IDENTITY_WORLD : p->peer;
}

/* A packet of a connection that was allowed: still allowed? Then the entry learns from it. */
static __always_inline int ct_known(struct packet *p, struct endpoint *ep, const struct ct_key *key,
				    struct ct_entry *e, __u64 now)
{
	bool error = p->flags & PACKET_ERROR;
	bool reply = !error && (p->direction == DIRECTION_EGRESS) != !!(e->flags & CT_OPENED_EGRESS);

	p->peer = ct_peer(p, e, reply);
	p->ct_state = error ? CT_STATE_RELATED : reply ? CT_STATE_REPLY : CT_STATE_ESTABLISHED;
	p->rule = e->rule;
	if (!ct_is_judged(e, p->epoch, p->peer, error)) {
		struct policy_query q = {};

		query_of_entry(&q, key, e);
		q.peer = p->peer;
		if (error) {
			/* The peer of the packet may be any router on the way. */
			const struct remote *remote = ipcache_lookup(&key->remote);

			q.peer = remote ? remote->identity : IDENTITY_WORLD;
		}
		int reason = policy(ep, &q);

		p->rule = q.rule;
		/* The entry stays, and is asked about again: without it a packet of the other side that was already on
		 * its way would open the connection anew, in its own direction, which may well be allowed. */
		if (reason)
			return reason;
		e->rule = q.rule;
		ct_set_judged(e, p->epoch, q.peer);
	}
	/* To who opened it, or an error about what he sent. */
	if (e->service && (p->direction == DIRECTION_EGRESS) != !!(e->flags & CT_OPENED_EGRESS)) {
		p->flags |= PACKET_UNTRANSLATE | (e->flags & CT_BOUND ? PACKET_BOUND : 0);
		p->service = e->service;
		p->frontend.addr = e->frontend;
		p->frontend.port = e->frontend_port;
	}
	if (error) {
		p->report = true;
		return 0;
	}
	if (!reply)
		ct_follow(p, e);
	else if (!(e->flags & CT_SEEN_REPLY))
		e->flags |= CT_SEEN_REPLY;
	ct_note_tcp(p, e, reply);
	ct_extend(e, now + ct_lifetime(key->proto, e->flags));
	if (now - e->reported > cfg_trace_interval_ns)
		p->report = true;
	if (p->report)
		e->reported = now;
	return 0;
}

/* A packet without a connection: policy decides, and what it allows is remembered. */
static __always_inline int ct_new(struct __sk_buff *skb, struct packet *p, struct endpoint *ep,
				  const struct ct_key *key, __u64 now)
{
	struct policy_query q = {
		.peer = p->peer,
		.direction = p->direction,
		.proto = p->t.proto,
		.port = p->t.dport,
	};
	bool egress = p->direction == DIRECTION_EGRESS;

	p->ct_state = CT_STATE_NEW;
	q.addr = egress ? p->t.daddr : p->t.saddr;
	if (!(p->flags & PACKET_PORTS))
		q.port = policy_port_of_icmp(p->icmp_type);
	int reason = policy(ep, &q);

	p->rule = q.rule;
	if (reason)
		return reason;
	p->report = true;
	if (cfg_events && ep->flags & (egress ? ENDPOINT_ENFORCE_EGRESS : ENDPOINT_ENFORCE_INGRESS))
		emit(skb, p, EVENT_POLICY_VERDICT << 8 | POLICY_VERDICT_ALLOW);
	/* Errors, echo replies and resets open nothing. */
	if (!(p->flags & (PACKET_PORTS | PACKET_ECHO)) || p->tcp_flags & TCP_RST ||
	    (p->flags & PACKET_ECHO && icmp_echo_kind(p->t.proto, p->icmp_type) == 2))
		return 0;
	struct ct_entry e = {
		.expires = now + ct_lifetime(key->proto, 0),
		.reported = now,
		.endpoint = ep->id,
		.epoch = p->epoch,
		.peer = p->peer,
		.rule = q.rule,
		.flags = (egress ? CT_OPENED_EGRESS : 0) | (p->tcp_flags & TCP_FIN ? CT_FIN_FORWARD : 0),
		.tcp_flags = p->tcp_flags & (TCP_SYN | TCP_FIN),
	};

	if (p->flags & PACKET_BOUND)
		e.flags |= CT_BOUND;
	e.service = ct_service_of(p);
	if (e.service) {
		e.frontend = p->frontend.addr;
		e.frontend_port = p->frontend.port;
	}
	return bpf_map_update_elem(&conntrack, key, &e, BPF_ANY) ? DROP_CT_MAP_INSERTION_FAILED : 0;
}

/* Call before the first look-up of an endpoint: were the epoch read after it, a verdict by the row from before a change
 * could be kept under the epoch from after it, and would never be reached anew. A CPU may still load the two the other way
 * round; against that the agent bumps the epoch a second time, when no program is left that began before the change. */
static __always_inline void note_epoch(struct packet *p)
{
	__u32 zero = 0;
	const struct runtime *run = bpf_map_lookup_elem(&runtime, &zero);

	if (run)
		p->epoch = *(const volatile __u32 *)&run->policy_epoch;
}

/* Conntrack and policy of one endpoint for a packet in p->direction whose other side is p->peer. Returns 0 or the
 * reason to drop. */
__noinline int judge(struct __sk_buff *skb, struct packet *p, struct endpoint *ep)
{
	if (!p || !ep)
		return DROP_EP_NOT_READY;
	struct ct_key key;
	struct ct_entry *e = NULL;
	__u64 now = coarse_now();

	p->endpoint = ep->id;
	p->identity = ep->identity;
	/* The embedded packet went the other way. */
	if (p->flags & PACKET_ERROR)
		ct_key_of(&key, &p->inner, !p->direction, CT_SCOPE_CONNECTION);
	else
		ct_key_of(&key, &p->t, p->direction, CT_SCOPE_CONNECTION);
	if (p->flags & PACKET_TRACKED)
		e = ct_lookup(&key, ep->id, now);
	if (e && !ct_starts_anew(p, e))
		return ct_known(p, ep, &key, e, now);
	return ct_new(skb, p, ep, &key, now);
}
