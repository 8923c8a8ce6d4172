/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Masquerading: pods speak to the outside with the node's address. A binding is two rows of `nat`, one per direction;
 * the ingress row is what makes a port taken. */
#pragma once
#include "include/config.h"
#include "lib/conntrack.h"
#include "lib/encap.h"
#include "lib/identity.h"
#include "lib/rewrite.h"
#include "maps/nat.h"

const volatile bool cfg_masquerade4 = true;
const volatile bool cfg_masquerade6 = true;
/* The address that pods' packets leave with. */
const volatile addr_t cfg_node_addr4 = {};
const volatile addr_t cfg_node_addr6 = {};
/* Source ports for it, in host byte order. Outside the node's own ip_local_port_range. */
const volatile __u16 cfg_nat_port_min = 61000;
const volatile __u16 cfg_nat_port_max = 65535;

#define NAT_PROBES 32
/* Seconds of difference in `used` are not worth a write. */
#define NAT_USED_NS NSEC_PER_SEC

static __always_inline bool masquerade_on(const struct packet *p)
{
	return is_v6(p) ? cfg_masquerade6 : cfg_masquerade4;
}

static __always_inline void node_addr(addr_t *to, bool v6)
{
	if (v6)
		config_addr(to, &cfg_node_addr6);
	else
		config_addr(to, &cfg_node_addr4);
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

/* The key under which answers to `out` find their way back from `node`. */
static __always_inline void nat_back_key(struct nat_key *back, const struct nat_key *out, const struct end *node)
{
	back->saddr = out->daddr;
	back->daddr = node->addr;
	back->sport = out->dport;
	back->dport = node->port;
	back->proto = out->proto;
	back->direction = DIRECTION_INGRESS;
	back->pad = 0;
}

static __always_inline void nat_touch(struct nat_entry *e, __u64 now)
{
	if (now - e->used > NAT_USED_NS)
		e->used = now;
}

/* Is the way back still this source's? An LRU map may have forgotten it, and somebody else have taken the port. */
static __always_inline bool nat_back_is_ours(const struct nat_key *out, const struct nat_entry *e, __u64 now)
{
	struct nat_key back;
	struct end node = {.addr = e->addr, .port = e->port};

	nat_back_key(&back, out, &node);
	struct nat_entry *found = bpf_map_lookup_elem(&nat, &back);

	if (!found || found->port != out->sport || !addr_equal(&found->addr, &out->saddr))
		return false;
	nat_touch(found, now);
	return true;
}

/* Takes the first free port of up to NAT_PROBES. Creating the ingress row is what reserves it. */
static __always_inline bool nat_allocate(const struct nat_key *out, struct end *node, __u64 now)
{
	struct nat_entry pod = {.addr = out->saddr, .port = out->sport, .used = now};
	__u32 range = (__u32)(cfg_nat_port_max - cfg_nat_port_min) + 1;
	__u32 port = bpf_ntohs(out->sport);
	struct nat_key back;

	for (int i = 0; i < NAT_PROBES; i++) {
		/* SCTP's checksum covers its ports and can't be mended: the port stays as it is. */
		node->port = out->proto == IPPROTO_SCTP ? out->sport : bpf_htons(cfg_nat_port_min + port % range);
		nat_back_key(&back, out, node);
		if (!bpf_map_update_elem(&nat, &back, &pod, BPF_NOEXIST))
			return true;
		if (out->proto == IPPROTO_SCTP)
			return false;
		port = i ? port + 1 : bpf_get_prandom_u32();
	}
	return false;
}

/* The node's end for packets of this connection; its address is given. Returns 0 or the reason to drop. */
__noinline int nat_bind(struct packet *p, struct end *node)
{
	/* Linux 6.1 takes a map's key from this frame's stack, not from a caller's. */
	struct nat_key out;

	if (!p || !node)
		return DROP_NAT_NO_MAPPING;
	nat_key_of(&out, &p->t, DIRECTION_EGRESS);
	__u64 now = coarse_now();
	struct nat_entry *found = bpf_map_lookup_elem(&nat, &out);

	if (found && nat_back_is_ours(&out, found, now)) {
		nat_touch(found, now);
		node->addr = found->addr;
		node->port = found->port;
		return 0;
	}
	if (!nat_allocate(&out, node, now))
		return DROP_NAT_NO_MAPPING;
	struct nat_entry e = {.addr = node->addr, .port = node->port, .used = now};

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
	struct nat_entry *found = bpf_map_lookup_elem(&nat, &out);
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
	node_addr(&node.addr, is_v6(p));
	/* ICMP that no answer will come for. */
	if (!(p->flags & PACKET_PORTS) && !is_echo_request(p))
		return rewrite(skb, p, &node, END_SOURCE);
	int reason = nat_bind(p, &node);

	return reason ? reason : rewrite(skb, p, &node, END_SOURCE);
}

/* An ICMP error about a packet that left through a binding. */
static __always_inline int unmasquerade_error(struct __sk_buff *skb, struct packet *p)
{
	struct nat_key back = {
		.saddr = p->inner.daddr,
		.daddr = p->inner.saddr,
		.sport = p->inner.dport,
		.dport = p->inner.sport,
		.proto = p->inner.proto,
		.direction = DIRECTION_INGRESS,
	};
	struct nat_entry *found = bpf_map_lookup_elem(&nat, &back);
	struct end pod = {};

	if (!found)
		return 0;
	pod.addr = found->addr;
	pod.port = found->port;
	int reason = rewrite_inner(skb, p, &pod, END_SOURCE);

	return reason ? reason : rewrite(skb, p, &pod, END_DESTINATION);
}

/* Could this packet for the node's address be for a pod? Most are the node's own: let them go at once. */
static __always_inline bool unmasquerade_wanted(const struct packet *p)
{
	__u16 port = bpf_ntohs(p->t.dport);

	if (p->flags & PACKET_ERROR || p->t.proto == IPPROTO_SCTP)
		return true;
	return p->flags & (PACKET_PORTS | PACKET_ECHO) && port >= cfg_nat_port_min && port <= cfg_nat_port_max;
}

/* A packet for the node's address: is it for a pod behind it? Then it is rewritten. Returns 0 or the reason to drop. */
__noinline int unmasquerade(struct __sk_buff *skb, struct packet *p)
{
	struct nat_key back;
	struct end pod = {};

	if (!p)
		return DROP_NAT_NO_MAPPING;
	if (p->flags & PACKET_ERROR)
		return unmasquerade_error(skb, p);
	nat_key_of(&back, &p->t, DIRECTION_INGRESS);
	struct nat_entry *found = bpf_map_lookup_elem(&nat, &back);

	if (!found)
		return 0;
	nat_touch(found, coarse_now());
	pod.addr = found->addr;
	pod.port = found->port;
	return rewrite(skb, p, &pod, END_DESTINATION);
}
