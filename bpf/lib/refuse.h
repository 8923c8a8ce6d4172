/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Who calls a service without backends is told at once: a reset for TCP (RFC 9293 3.10.7.1), port unreachable for the
 * rest (RFC 792, RFC 4443). The answer is made of the question, by the address that was called. */
#pragma once
#include <linux/tcp.h>

#include "lib/arp_nd.h"
#include "lib/rewrite.h"

#define ANSWER_TTL 64
#define ICMP_PORT_UNREACH 3
#define ICMP_FRAG_NEEDED 4
#define ICMPV6_PORT_UNREACH 4
#define QUOTED_L4 8

static __always_inline void answer_ipv4(struct iphdr *ip4, const struct packet *p, __u8 proto, __u32 payload)
{
	__builtin_memset(ip4, 0, sizeof(*ip4));
	ip4->version = 4;
	ip4->ihl = sizeof(*ip4) / 4;
	ip4->tot_len = bpf_htons(sizeof(*ip4) + payload);
	ip4->ttl = ANSWER_TTL;
	ip4->protocol = proto;
	ip4->saddr = addr_to_v4(&p->t.daddr);
	ip4->daddr = addr_to_v4(&p->t.saddr);
	ip4->check = csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)ip4, sizeof(*ip4), 0));
}

static __always_inline void answer_ipv6(struct ipv6hdr *ip6, const struct packet *p, __u8 proto, __u32 payload)
{
	__builtin_memset(ip6, 0, sizeof(*ip6));
	ip6->version = 6;
	ip6->payload_len = bpf_htons(payload);
	ip6->hop_limit = ANSWER_TTL;
	ip6->nexthdr = proto;
	__builtin_memcpy(&ip6->saddr, &p->t.daddr, sizeof(ip6->saddr));
	__builtin_memcpy(&ip6->daddr, &p->t.saddr, sizeof(ip6->daddr));
}

/* Writes the answer's network header. */
static __always_inline int store_answer_ip(struct __sk_buff *skb, const struct packet *p, __u8 proto, __u32 payload)
{
	union {
		struct iphdr ip4;
		struct ipv6hdr ip6;
	} ip;

	if (is_v6(p)) {
		answer_ipv6(&ip.ip6, p, proto, payload);
		return bpf_skb_store_bytes(skb, L3_OFFSET, &ip.ip6, sizeof(ip.ip6), 0);
	}
	answer_ipv4(&ip.ip4, p, proto, payload);
	return bpf_skb_store_bytes(skb, L3_OFFSET, &ip.ip4, sizeof(ip.ip4), 0);
}

/* Pseudo headers only matter by their sum: with mapped addresses IPv4's sums up as IPv6's but for two constant words. */
static __always_inline __s64 pseudo_sum(const struct packet *p, __u8 proto, __u32 payload)
{
	struct pseudo_header pseudo = {
		.src = p->t.daddr, .dst = p->t.saddr, .len = bpf_htonl(payload), .next = bpf_htonl(proto)};

	if (!is_v6(p)) {
		pseudo.src.w[2] = 0;
		pseudo.dst.w[2] = 0;
	}
	return bpf_csum_diff(NULL, 0, (__be32 *)&pseudo, sizeof(pseudo), 0);
}

/* What the segment takes up in sequence space. */
static __always_inline __u32 segment_len(const struct packet *p, const struct tcphdr *tcp)
{
	return p->len - (p->l4 - L3_OFFSET) - tcp->doff * 4 + tcp->syn + tcp->fin;
}

__noinline int refuse_tcp(struct __sk_buff *skb, struct packet *p)
{
	struct tcphdr in, rst = {};

	if (!p || bpf_skb_load_bytes(skb, p->l4, &in, sizeof(in)) < 0 || in.rst)
		return -1;
	rst.source = in.dest;
	rst.dest = in.source;
	rst.doff = sizeof(rst) / 4;
	rst.rst = 1;
	if (in.ack) {
		rst.seq = in.ack_seq;
	} else {
		rst.ack = 1;
		rst.ack_seq = bpf_htonl(bpf_ntohl(in.seq) + segment_len(p, &in));
	}
	__s64 sum = pseudo_sum(p, IPPROTO_TCP, sizeof(rst));

	rst.check = csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)&rst, sizeof(rst), sum));
	__u32 l4 = L3_OFFSET + (is_v6(p) ? sizeof(struct ipv6hdr) : sizeof(struct iphdr));

	if (bpf_skb_change_tail(skb, l4 + sizeof(rst), 0) < 0 ||
	    store_answer_ip(skb, p, IPPROTO_TCP, sizeof(rst)) < 0)
		return -1;
	return bpf_skb_store_bytes(skb, l4, &rst, sizeof(rst), 0);
}

struct icmp_start {
	__u8 type;
	__u8 code;
	__u16 csum;
	__be32 rest;
};

/* As much of the packet as the answer quotes: the headers, and of the last one as much as tells whose it is. Packets with
 * more before it get no answer. */
struct quote {
	struct icmp_start icmp;
	__u8 packet[72];
};

/* What an ICMP error says. */
enum complaint {
	COMPLAINT_PORT,      /* port unreachable */
	COMPLAINT_TTL,       /* time exceeded */
	COMPLAINT_TOO_BIG,
};

static __always_inline void complaint_start(struct icmp_start *icmp, bool v6, __u32 about, __u32 mtu)
{
	if (about == COMPLAINT_TTL) {
		icmp->type = v6 ? ICMPV6_TIME_EXCEED : ICMP_TIME_EXCEEDED;
		return;
	}
	icmp->type = v6 ? ICMPV6_DEST_UNREACH : ICMP_DEST_UNREACH;
	icmp->code = v6 ? ICMPV6_PORT_UNREACH : ICMP_PORT_UNREACH;
	if (about == COMPLAINT_TOO_BIG) {
		icmp->type = v6 ? ICMPV6_PKT_TOOBIG : ICMP_DEST_UNREACH;
		icmp->code = v6 ? 0 : ICMP_FRAG_NEEDED;
		/* IPv4 has it in the lower half of this word, RFC 1191 4. */
		icmp->rest = bpf_htonl(mtu);
	}
}

/* Makes the packet an ICMP error about itself, by the address that it was for. Returns 0, or -1: no answer. */
__noinline int complain(struct __sk_buff *skb, struct packet *p, __u32 about, __u32 mtu)
{
	struct quote q = {};

	if (!p)
		return -1;
	bool v6 = is_v6(p);
	__u8 proto = v6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP;
	__u32 ip_len = v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
	__u32 quoted = p->l4 - L3_OFFSET + QUOTED_L4;
	__s64 sum = v6 ? pseudo_sum(p, proto, sizeof(q.icmp) + quoted) : 0;

	if (p->flags & (PACKET_ERROR | PACKET_HEADLESS))
		return -1;
	complaint_start(&q.icmp, v6, about, mtu);
	if (quoted < sizeof(struct iphdr) + QUOTED_L4 || quoted > sizeof(q.packet) ||
	    bpf_skb_load_bytes(skb, L3_OFFSET, q.packet, quoted) < 0)
		return -1;
	/* The quote is followed by zeroes, which don't count. */
	q.icmp.csum = csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)&q, sizeof(q), sum));
	if (bpf_skb_change_tail(skb, L3_OFFSET + quoted, 0) < 0 ||
	    bpf_skb_adjust_room(skb, ip_len + sizeof(q.icmp), BPF_ADJ_ROOM_MAC, 0) < 0 ||
	    store_answer_ip(skb, p, proto, sizeof(q.icmp) + quoted) < 0)
		return -1;
	return bpf_skb_store_bytes(skb, L3_OFFSET + ip_len, &q.icmp, sizeof(q.icmp), 0);
}

/* Makes the packet, which is already dropped and counted, the answer to itself. Returns 0, or -1: no answer. */
static __always_inline int refusal(struct __sk_buff *skb, struct packet *p)
{
	if (p->flags & PACKET_FRAGMENT)
		return -1;
	return p->t.proto == IPPROTO_TCP ? refuse_tcp(skb, p) : complain(skb, p, COMPLAINT_PORT, 0);
}

/* To a pod. */
static __always_inline int refuse(struct __sk_buff *skb, struct packet *p, struct endpoint *ep)
{
	return refusal(skb, p) ? TC_ACT_SHOT : answer(skb, ep);
}

/* Our own answer goes back to where the question came from: the other device on the wire. */
static __always_inline int answer_back(struct __sk_buff *skb)
{
	struct frame_macs asked, macs;

	if (bpf_skb_load_bytes(skb, 0, &asked, sizeof(asked)) < 0)
		return TC_ACT_SHOT;
	macs.dst = asked.src;
	macs.src = asked.dst;
	if (bpf_skb_store_bytes(skb, 0, &macs, sizeof(macs), 0) < 0)
		return TC_ACT_SHOT;
	skb->mark = MARK_ANSWER;
	return bpf_redirect(skb->ifindex, 0);
}
