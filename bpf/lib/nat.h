/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Masquerading: pods speak to the outside with the node's address. A binding is two rows of `nat`, one per direction;
 * the ingress row is what makes a port taken. */
#pragma once
#include "include/config.h"
#include "lib/conntrack.h"
#include "lib/encap.h"
#include "lib/identity.h"
#include "lib/nat_table.h"
#include "lib/rewrite.h"
#include "lib/route.h"

const volatile bool cfg_masquerade4 = true;
const volatile bool cfg_masquerade6 = true;
/* Source ports for the node's address, in host byte order. Outside the node's own ip_local_port_range. */
const volatile __u16 cfg_nat_port_min = 61000;
const volatile __u16 cfg_nat_port_max = 65535;

#define NAT_PROBES 32
/* Seconds of difference in `used` are not worth a write. */
#define NAT_USED_NS NSEC_PER_SEC

static __always_inline bool masquerade_on(const struct packet *p)
{
	return is_v6(p) ? cfg_masquerade6 : cfg_masquerade4;
}

/* Pods and nodes know the way back to a pod, the world doesn't. A node without a tunnel to it doesn't either, unless
 * the fabric routes pods. */
static __always_inline bool masquerade_wanted(const struct packet *p)
{
	if (p->peer_flags & (REMOTE_POD | REMOTE_NO_MASQUERADE))
		return false;
	if (p->peer_flags & REMOTE_NODE)
		return cfg_overlay_ifindex && !(p->peer_flags & REMOTE_TUNNEL);
	return true;
}

static __always_inline void nat_key_of(struct nat_key *key, const struct tuple *t, __u8 direction)
{
	key->saddr = t->saddr;
	key->daddr = t->daddr;
	key->sport = t->sport;
	key->dport = t->dport;
	key->proto = t->proto;
	key->direction = direction;
	key->pad = 0;
}

/* The key under which answers from `remote` find their way back. */
static __always_inline void nat_back_key(struct nat_key *back, __u8 proto, const struct end *remote,
					 const struct end *node)
{
	back->saddr = remote->addr;
	back->daddr = node->addr;
	back->sport = remote->port;
	back->dport = node->port;
	back->proto = proto;
	back->direction = DIRECTION_INGRESS;
	back->pad = 0;
}

static __always_inline void nat_touch(struct nat_entry *e, __u64 now)
{
	if (now - e->used > NAT_USED_NS)
		e->used = now;
}

/* Is the way back still this connection's? An LRU map may have forgotten it, and somebody else have taken the port. */
static __always_inline bool nat_back_is_ours(struct nat_entry *found, const struct nat_key *out, bool service, __u64 now)
{
	if (!found || found->port != out->sport || !addr_equal(&found->addr, &out->saddr) ||
	    service != !!(found->flags & NAT_SERVICE))
		return false;
	if (service && (found->frontend_port != out->dport || !addr_equal(&found->frontend, &out->daddr)))
		return false;
	nat_touch(found, now);
	return true;
}

/* Creating the ingress row is what reserves a port. It may still be this connection's, with only the other row forgotten.
 * What another version's table says is taken is taken here as well, but for what both take within a microsecond. */
static __always_inline bool nat_take(const struct nat_key *back, const struct nat_key *out, const struct nat_entry *e)
{
	nat_adopt(back);
	return !bpf_map_update_elem(&nat, back, e, BPF_NOEXIST) ||
	       nat_back_is_ours(bpf_map_lookup_elem(&nat, back), out, e->flags & NAT_SERVICE, e->used);
}

/* Takes the first free port of up to NAT_PROBES. `back` lacks the port. A client that keeps its address needs another port
 * than its own: a connection of its own without a binding has that. */
static __always_inline bool nat_allocate(struct nat_key *back, const struct nat_key *out, const struct nat_entry *e,
					 bool other_port)
{
	__u32 range = (__u32)(cfg_nat_port_max - cfg_nat_port_min) + 1;
	__u32 port = bpf_ntohs(e->port);

	for (int i = 0; i < NAT_PROBES; i++) {
		back->dport = bpf_htons(cfg_nat_port_min + port % range);
		if (!(other_port && back->dport == e->port) && nat_take(back, out, e))
			return true;
		/* Taken ports stand in rows, as pods' own source ports do: a few in a row from each of several places. */
		port = i & 3 ? port + 1 : bpf_get_prandom_u32();
	}
	return false;
}

/* Finds or makes the binding of this connection towards p->backend. The address of p->source is given, its port comes out.
 * Keyed by what the packet carries: towards a service (p->service) that is the frontend, so that two frontends with one
 * backend are two bindings; one port serves any number of remote ends. Returns 0 or the reason to drop. */
__noinline int nat_bind(struct packet *p)
{
	/* Linux 6.1 takes a map's key from this frame's stack, not from a caller's. */
	struct nat_key out, back;
	struct nat_entry e = {};

	if (!p)
		return DROP_NAT_NO_MAPPING;
	e.used = coarse_now();
	nat_key_of(&out, &p->t, DIRECTION_EGRESS);
	/* What came by direct return is for a backend already. */
	if (p->service) {
		out.daddr = p->frontend.addr;
		out.dport = p->frontend.port;
	}
	struct nat_entry *found = nat_find(&out);

	if (found && !addr_equal(&found->addr, &p->source.addr))
		found = NULL;
	p->source.port = found ? found->port : 0;
	/* Now, or the collector takes the row that it found unused a moment ago. */
	if (found)
		nat_touch(found, e.used);
	nat_back_key(&back, out.proto, &p->backend, &p->source);
	if (found && nat_back_is_ours(nat_find(&back), &out, p->service, e.used))
		return 0;
	e.addr = out.saddr;
	e.port = out.sport;
	if (p->service) {
		e.flags = NAT_SERVICE;
		e.service = p->service;
		e.frontend = out.daddr;
		e.frontend_port = out.dport;
	}
	/* The port that it had, if only the way back was forgotten: the other side knows no other. */
	if (found && nat_take(&back, &out, &e))
		return 0;
	if (!nat_allocate(&back, &out, &e, addr_equal(&p->source.addr, &out.saddr)))
		return DROP_NAT_NO_MAPPING;
	p->source.port = back.dport;
	e.addr = p->source.addr;
	e.port = p->source.port;
	return bpf_map_update_elem(&nat, &out, &e, BPF_ANY) ? DROP_NAT_NO_MAPPING : 0;
}

/* Answers to who called the pod from outside keep the address that was called. */
static __always_inline bool opened_from_outside(struct packet *p, __u32 endpoint)
{
	struct ct_key key;

	ct_key_of(&key, &p->t, DIRECTION_EGRESS, CT_SCOPE_CONNECTION);
	struct ct_entry *e = ct_lookup(&key, endpoint, coarse_now());

	return e && !(e->flags & CT_OPENED_EGRESS);
}

/* A later fragment only has the identifier to tell by. */
static __always_inline bool is_echo_request(const struct packet *p)
{
	return p->flags & PACKET_ECHO && (p->t.sport || icmp_echo_kind(p->t.proto, p->icmp_type) == 1);
}

/* An ICMP error about a packet that came in through a binding, from the pod or from this node's stack. Its receiver
 * never heard of the pod. */
__noinline int masquerade_error(struct __sk_buff *skb, struct packet *p)
{
	if (!p)
		return DROP_NAT_NO_MAPPING;
	struct nat_key out = {
		.saddr = p->inner.daddr,
		.daddr = p->inner.saddr,
		.sport = p->inner.dport,
		.dport = p->inner.sport,
		.proto = p->inner.proto,
		.direction = DIRECTION_EGRESS,
	};
	struct nat_entry *found = nat_find(&out);
	struct end node = {};

	/* Nothing of it was translated: neither is this. */
	if (!found)
		return 0;
	node.addr = found->addr;
	node.port = found->port;
	bool from_pod = addr_equal(&p->t.saddr, &p->inner.daddr);
	int reason = rewrite_inner(skb, p, &node, END_DESTINATION);

	return reason || !from_pod ? reason : rewrite(skb, p, &node, END_SOURCE);
}

/* A pod's packet leaves the node. Returns 0 or the reason to drop. */
__noinline int masquerade(struct __sk_buff *skb, struct packet *p)
{
	struct end node = {};

	if (!p)
		return DROP_NAT_NO_MAPPING;
	identify_peer(p, &p->t.daddr);
	if (!masquerade_wanted(p))
		return 0;
	if (p->flags & PACKET_ERROR)
		return masquerade_error(skb, p);
	if (opened_from_outside(p, p->endpoint))
		return 0;
	/* ICMP that no answer will come for. */
	if (!(p->flags & PACKET_PORTS) && !is_echo_request(p)) {
		node_addr(&node.addr, is_v6(p));
		return rewrite(skb, p, &node, END_SOURCE);
	}
	p->backend.addr = p->t.daddr;
	p->backend.port = p->t.dport;
	node_addr(&p->source.addr, is_v6(p));
	int reason = nat_bind(p);

	return reason ? reason : rewrite(skb, p, &p->source, END_SOURCE);
}

/* Could this packet for our address be for somebody behind it? Most are the node's own: let them go at once. */
static __always_inline bool unmasquerade_wanted(const struct packet *p)
{
	__u16 port = bpf_ntohs(p->t.dport);

	return p->flags & PACKET_ERROR || (p->flags & (PACKET_PORTS | PACKET_ECHO) && port >= cfg_nat_port_min &&
					   port <= cfg_nat_port_max);
}

/* The binding that a packet, or the one that an ICMP error is about, came back through. */
static __always_inline struct nat_entry *nat_came_back(const struct packet *p)
{
	struct nat_key back;
	const struct tuple *t = &p->inner;

	if (!(p->flags & PACKET_ERROR)) {
		nat_key_of(&back, &p->t, DIRECTION_INGRESS);
		return nat_find(&back);
	}
	back.saddr = t->daddr;
	back.daddr = t->saddr;
	back.sport = t->dport;
	back.dport = t->sport;
	back.proto = t->proto;
	back.direction = DIRECTION_INGRESS;
	back.pad = 0;
	return nat_find(&back);
}

/* A packet for our address: is it for somebody behind it? Then it is rewritten. One that also has to get a service's
 * frontend as its source is marked PACKET_UNTRANSLATE, and `hop` is on its way out. Returns 0 or the reason to drop. */
__noinline int unmasquerade(struct __sk_buff *skb, struct packet *p, struct next_hop *hop)
{
	struct end to = {};
	int reason;

	if (!p || !hop)
		return DROP_NAT_NO_MAPPING;
	struct nat_entry *found = nat_came_back(p);

	if (!found)
		return 0;
	to.addr = found->addr;
	to.port = found->port;
	if (found->flags & NAT_SERVICE) {
		p->flags |= PACKET_UNTRANSLATE;
		p->service = found->service;
		p->frontend.addr = found->frontend;
		p->frontend.port = found->frontend_port;
		reason = ttl_expires(p) ? DROP_TTL_EXCEEDED : find_next_hop(skb, p, &p->frontend.addr, &to.addr, hop);
		if (reason)
			return reason;
	}
	if (p->flags & PACKET_ERROR) {
		reason = rewrite_inner(skb, p, &to, END_SOURCE);
		if (reason)
			return reason;
	} else {
		nat_touch(found, coarse_now());
	}
	return rewrite(skb, p, &to, END_DESTINATION);
}
