/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Bytes to struct packet. Headers are copied out with bpf_skb_load_bytes(), which checks bounds and reads non-linear
 * packets alike. */
#pragma once
#include <linux/icmpv6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>

#include "include/packet.h"
#include "maps/fragments.h"

#define IP_DONT_FRAGMENT 0x4000
#define IP_MORE_FRAGMENTS 0x2000
#define IP_OFFSET_MASK 0x1fff
#define IPV6_OFFSET_MASK 0xfff8
#define IPV6_MAX_EXTENSIONS 6

/* <linux/icmp.h> pulls in user-space headers. */
#define ICMP_ECHOREPLY 0
#define ICMP_DEST_UNREACH 3
#define ICMP_ECHO 8
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETERPROB 12
#define ICMP_CSUM_OFFSET 2
#define ICMP_ID_OFFSET 4

struct ipv6_extension {
	__u8 next;
	__u8 len;
	__be16 frag_off;
	__be32 id;
};

/* What a walk over the IPv6 extension headers ends in; `off` and `proto` are the transport header's. */
struct ipv6_walk {
	__u32 off;
	__u32 fragment_id;
	__u16 frag_off;
	__u8 proto;
	__u8 fragment;
};

static __always_inline int walk_ipv6(struct __sk_buff *skb, struct ipv6_walk *w)
{
	struct ipv6_extension ext;

	for (int i = 0; i < IPV6_MAX_EXTENSIONS; i++) {
		if (w->proto != IPPROTO_HOPOPTS && w->proto != IPPROTO_ROUTING && w->proto != IPPROTO_DSTOPTS &&
		    w->proto != IPPROTO_FRAGMENT && w->proto != IPPROTO_AH)
			return 0;
		if (bpf_skb_load_bytes(skb, w->off, &ext, sizeof(ext)) < 0)
			return DROP_INVALID_IPV6_EXTENSION;
		if (w->proto == IPPROTO_FRAGMENT) {
			w->fragment = 1;
			w->frag_off = bpf_ntohs(ext.frag_off);
			w->fragment_id = ext.id;
			w->off += sizeof(ext);
		} else if (w->proto == IPPROTO_AH) {
			w->off += (ext.len + 2) * 4;
		} else {
			w->off += (ext.len + 1) * 8;
		}
		w->proto = ext.next;
		/* What follows in a later fragment is data, not a header. */
		if (w->fragment && (w->frag_off & IPV6_OFFSET_MASK))
			return 0;
	}
	return DROP_INVALID_IPV6_EXTENSION;
}

static __always_inline bool icmp_is_error(__u8 proto, __u8 type)
{
	if (proto == IPPROTO_ICMPV6)
		return type >= ICMPV6_DEST_UNREACH && type <= ICMPV6_PARAMPROB;
	return type == ICMP_DEST_UNREACH || type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETERPROB;
}

/* 0: none, 1: request, 2: reply */
static __always_inline int icmp_echo_kind(__u8 proto, __u8 type)
{
	if (proto == IPPROTO_ICMPV6)
		return type == ICMPV6_ECHO_REQUEST ? 1 : type == ICMPV6_ECHO_REPLY ? 2 : 0;
	return type == ICMP_ECHO ? 1 : type == ICMP_ECHOREPLY ? 2 : 0;
}

static __always_inline bool has_ports(__u8 proto)
{
	return proto == IPPROTO_TCP || proto == IPPROTO_UDP || proto == IPPROTO_SCTP;
}

/* First eight bytes of a transport header. */
struct l4_start {
	union {
		struct {
			port_be_t sport;
			port_be_t dport;
		};
		struct {
			__u8 type;
			__u8 code;
			__be16 csum;
			port_be_t id;
		};
		__u8 bytes[8];
	};
};

static __always_inline void tuple_ports(struct tuple *t, const struct l4_start *l4)
{
	if (has_ports(t->proto)) {
		t->sport = l4->sport;
		t->dport = l4->dport;
		return;
	}
	int kind = icmp_echo_kind(t->proto, l4->type);

	t->sport = kind == 1 ? l4->id : 0;
	t->dport = kind == 2 ? l4->id : 0;
}

/* The packet inside an ICMP error. One that can't be read leaves the error without a connection, to be judged as ICMP. */
__noinline int parse_inner(struct __sk_buff *skb, struct packet *p)
{
	struct l4_start l4;

	if (!p)
		return DROP_INVALID_PACKET;
	__u32 off = p->l4 + 8;

	p->inner_l3 = off;
	if (p->flags & PACKET_V6) {
		struct ipv6hdr ip6;

		if (bpf_skb_load_bytes(skb, off, &ip6, sizeof(ip6)) < 0 || ip6.version != 6)
			return 0;
		struct ipv6_walk w = {.off = off + sizeof(ip6), .proto = ip6.nexthdr};

		if (walk_ipv6(skb, &w) || (w.frag_off & IPV6_OFFSET_MASK))
			return 0;
		__builtin_memcpy(&p->inner.saddr, &ip6.saddr, sizeof(addr_t));
		__builtin_memcpy(&p->inner.daddr, &ip6.daddr, sizeof(addr_t));
		p->inner.proto = w.proto;
		off = w.off;
	} else {
		struct iphdr ip4;

		if (bpf_skb_load_bytes(skb, off, &ip4, sizeof(ip4)) < 0 || ip4.version != 4 || ip4.ihl < 5 ||
		    (ip4.frag_off & bpf_htons(IP_OFFSET_MASK)))
			return 0;
		addr_from_v4(&p->inner.saddr, ip4.saddr);
		addr_from_v4(&p->inner.daddr, ip4.daddr);
		p->inner.proto = ip4.protocol;
		off += ip4.ihl * 4;
	}
	if (off > 0xffff || bpf_skb_load_bytes(skb, off, &l4, sizeof(l4)) < 0)
		return 0;
	if (!has_ports(p->inner.proto) && !icmp_echo_kind(p->inner.proto, l4.type))
		return 0;
	p->inner_l4 = off;
	tuple_ports(&p->inner, &l4);
	p->flags |= PACKET_ERROR;
	return 0;
}

static __always_inline int parse_tcp(struct __sk_buff *skb, struct packet *p, __u32 *l4_len)
{
	__u8 doff_flags[2];

	if (bpf_skb_load_bytes(skb, p->l4 + 12, doff_flags, sizeof(doff_flags)) < 0)
		return DROP_CT_INVALID_HEADER;
	*l4_len = (doff_flags[0] >> 4) * 4;
	if (*l4_len < 20)
		return DROP_CT_INVALID_HEADER;
	p->tcp_flags = doff_flags[1];
	return 0;
}

static __always_inline int parse_l4(struct __sk_buff *skb, struct packet *p)
{
	struct l4_start l4;
	__u32 l4_len = 8;
	int reason;

	if (bpf_skb_load_bytes(skb, p->l4, &l4, sizeof(l4)) < 0)
		return DROP_CT_INVALID_HEADER;
	tuple_ports(&p->t, &l4);
	if (has_ports(p->t.proto)) {
		p->flags |= PACKET_PORTS;
		if (p->t.proto == IPPROTO_TCP) {
			reason = parse_tcp(skb, p, &l4_len);
			if (reason)
				return reason;
		}
	} else {
		p->icmp_type = l4.type;
		p->icmp_code = l4.code;
		if (icmp_echo_kind(p->t.proto, l4.type))
			p->flags |= PACKET_ECHO;
		else if (icmp_is_error(p->t.proto, l4.type))
			parse_inner(skb, p);
	}
	p->wire_len = p->len;
	if (skb->gso_size)
		p->wire_len = p->l4 - L3_OFFSET + l4_len + skb->gso_size;
	return 0;
}

/* Ports of a fragment: the first one leaves them for those that follow. */
static __always_inline int fragment_ports(struct packet *p, __u32 id)
{
	struct fragment_key key = {.saddr = p->t.saddr, .daddr = p->t.daddr, .id = id, .proto = p->t.proto};

	if (!(p->flags & PACKET_HEADLESS)) {
		struct fragment ports = {.sport = p->t.sport, .dport = p->t.dport};

		bpf_map_update_elem(&fragments, &key, &ports, BPF_ANY);
		return 0;
	}
	const struct fragment *ports = bpf_map_lookup_elem(&fragments, &key);

	if (!ports)
		return DROP_FRAGMENT_NOT_FOUND;
	p->t.sport = ports->sport;
	p->t.dport = ports->dport;
	p->wire_len = p->len;
	if (has_ports(p->t.proto))
		p->flags |= PACKET_PORTS;
	else if (p->t.sport || p->t.dport)
		p->flags |= PACKET_ECHO;
	return 0;
}

static __always_inline int parse_ipv4(struct __sk_buff *skb, struct packet *p, __u32 *fragment_id)
{
	struct iphdr ip4;

	if (bpf_skb_load_bytes(skb, L3_OFFSET, &ip4, sizeof(ip4)) < 0)
		return DROP_INVALID_PACKET;
	__u32 header = ip4.ihl * 4;

	addr_from_v4(&p->t.saddr, ip4.saddr);
	addr_from_v4(&p->t.daddr, ip4.daddr);
	p->t.proto = ip4.protocol;
	p->ttl = ip4.ttl;
	p->l4 = L3_OFFSET + header;
	/* A total length of 0 is a TCP super-packet of more than 64 KB. */
	if (ip4.version != 4 || header < sizeof(ip4) ||
	    (ip4.tot_len && bpf_ntohs(ip4.tot_len) < header) || bpf_ntohs(ip4.tot_len) > p->len)
		return DROP_INVALID_PACKET;
	if (ip4.frag_off & bpf_htons(IP_OFFSET_MASK | IP_MORE_FRAGMENTS))
		p->flags |= PACKET_FRAGMENT;
	if (ip4.frag_off & bpf_htons(IP_OFFSET_MASK))
		p->flags |= PACKET_HEADLESS;
	*fragment_id = ip4.id;
	return ip4.protocol == IPPROTO_ICMPV6 ? DROP_CT_UNKNOWN_L4_PROTOCOL : 0;
}

static __always_inline int parse_ipv6(struct __sk_buff *skb, struct packet *p, __u32 *fragment_id)
{
	struct ipv6hdr ip6;

	if (bpf_skb_load_bytes(skb, L3_OFFSET, &ip6, sizeof(ip6)) < 0 || ip6.version != 6)
		return DROP_INVALID_PACKET;
	struct ipv6_walk w = {.off = L3_OFFSET + sizeof(ip6), .proto = ip6.nexthdr};

	__builtin_memcpy(&p->t.saddr, &ip6.saddr, sizeof(addr_t));
	__builtin_memcpy(&p->t.daddr, &ip6.daddr, sizeof(addr_t));
	p->ttl = ip6.hop_limit;
	p->flags |= PACKET_V6;
	/* A mapped address is no address on the wire, but it would be taken for IPv4 everywhere else. */
	if (addr_is_v4(&p->t.saddr) || addr_is_v4(&p->t.daddr))
		return DROP_INVALID_PACKET;
	int reason = walk_ipv6(skb, &w);

	p->t.proto = w.proto;
	p->l4 = w.off;
	if (reason)
		return reason;
	if (w.fragment)
		p->flags |= PACKET_FRAGMENT;
	if (w.frag_off & IPV6_OFFSET_MASK)
		p->flags |= PACKET_HEADLESS;
	*fragment_id = w.fragment_id;
	return w.proto == IPPROTO_ICMP ? DROP_CT_UNKNOWN_L4_PROTOCOL : 0;
}

/* Network and transport headers. Returns 0 or the reason to drop; what was read until then stays in `p`. */
__noinline int parse(struct __sk_buff *skb, struct packet *p)
{
	__u32 fragment_id = 0;
	int reason;

	if (!p)
		return DROP_INVALID_PACKET;
	p->len = skb->len - L3_OFFSET;
	p->wire_len = p->len;
	if (skb->protocol == bpf_htons(ETH_P_IP))
		reason = parse_ipv4(skb, p, &fragment_id);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		reason = parse_ipv6(skb, p, &fragment_id);
	else
		reason = DROP_UNSUPPORTED_L3_PROTOCOL;
	if (reason)
		return reason;
	if (!has_ports(p->t.proto) && p->t.proto != IPPROTO_ICMP && p->t.proto != IPPROTO_ICMPV6)
		return DROP_CT_UNKNOWN_L4_PROTOCOL;
	if (!(p->flags & PACKET_HEADLESS)) {
		reason = parse_l4(skb, p);
		if (reason)
			return reason;
	}
	return p->flags & PACKET_FRAGMENT ? fragment_ports(p, fragment_id) : 0;
}
