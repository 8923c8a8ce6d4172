/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Frames as a device's driver hands them over, to struct packet. Only the plain ones: TCP and UDP whole in IPv4 without
 * options or IPv6 without extension headers. Everything else is left to tc, which knows how to read it. */
#pragma once
#include <linux/tcp.h>
#include <linux/udp.h>

#include "lib/parse.h"
#include "lib/rewrite.h"

#define L4_OFFSET4 (L3_OFFSET + sizeof(struct iphdr))
#define L4_OFFSET6 (L3_OFFSET + sizeof(struct ipv6hdr))

/* Is the checksum only that of addresses, protocol and length (RFC 9293 3.1, RFC 8200 8.1), the rest left to a device? So
 * come packets from another namespace or virtual machine, not from a wire. Ports are no part of such a sum. One in 65,536
 * that is summed up looks the same; no harm is done if tc has it. */
static __always_inline bool is_unsummed(const struct packet *p, __u16 check)
{
	const __be32 *s = p->t.saddr.w, *d = p->t.daddr.w;
	__u64 sum = bpf_htons(p->t.proto) + bpf_htons(p->wire_len + L3_OFFSET - p->l4);

	/* IPv4's mapped prefix counts for nothing: 0xffff is 0 in one's complement. */
	sum += (__u64)s[0] + s[1] + s[2] + s[3] + d[0] + d[1] + d[2] + d[3];
	return check == (__u16)~csum_fold(sum);
}

static __always_inline bool xdp_parse_l4(void *l4, void *end, struct packet *p)
{
	struct tcphdr *tcp = l4;
	struct udphdr *udp = l4;

	/* Both begin with the ports. */
	if ((void *)(udp + 1) > end)
		return false;
	p->t.sport = udp->source;
	p->t.dport = udp->dest;
	p->flags |= PACKET_PORTS;
	if (p->t.proto == IPPROTO_UDP)
		return !is_unsummed(p, udp->check);
	if (p->t.proto != IPPROTO_TCP || (void *)(tcp + 1) > end || tcp->doff < sizeof(*tcp) / 4)
		return false;
	p->tcp_flags = ((__u8 *)l4)[13];
	return !is_unsummed(p, tcp->check);
}

static __always_inline bool xdp_parse_ipv4(void *data, void *end, struct packet *p)
{
	struct iphdr *ip4 = data + L3_OFFSET;

	if ((void *)(ip4 + 1) > end || ip4->version != 4 || ip4->ihl != sizeof(*ip4) / 4 ||
	    ip4->frag_off & bpf_htons(IP_OFFSET_MASK | IP_MORE_FRAGMENTS))
		return false;
	addr_from_v4(&p->t.saddr, ip4->saddr);
	addr_from_v4(&p->t.daddr, ip4->daddr);
	p->t.proto = ip4->protocol;
	p->ttl = ip4->ttl;
	p->l4 = L4_OFFSET4;
	p->wire_len = bpf_ntohs(ip4->tot_len);
	return xdp_parse_l4(data + L4_OFFSET4, end, p);
}

static __always_inline bool xdp_parse_ipv6(void *data, void *end, struct packet *p)
{
	struct ipv6hdr *ip6 = data + L3_OFFSET;

	if ((void *)(ip6 + 1) > end || ip6->version != 6)
		return false;
	__builtin_memcpy(&p->t.saddr, &ip6->saddr, sizeof(addr_t));
	__builtin_memcpy(&p->t.daddr, &ip6->daddr, sizeof(addr_t));
	/* No address on the wire, and it would be taken for IPv4 everywhere else. */
	if (addr_is_v4(&p->t.saddr) || addr_is_v4(&p->t.daddr))
		return false;
	p->t.proto = ip6->nexthdr;
	p->ttl = ip6->hop_limit;
	p->flags |= PACKET_V6;
	p->l4 = L4_OFFSET6;
	p->wire_len = bpf_ntohs(ip6->payload_len) + sizeof(*ip6);
	return xdp_parse_l4(data + L4_OFFSET6, end, p);
}

/* A frame of `len` bytes. */
static __always_inline bool xdp_parse_frame(void *data, void *end, __u32 len, struct packet *p)
{
	struct ethhdr *eth = data;
	bool read = false;

	if ((void *)(eth + 1) > end)
		return false;
	if (eth->h_proto == bpf_htons(ETH_P_IP))
		read = xdp_parse_ipv4(data, end, p);
	else if (eth->h_proto == bpf_htons(ETH_P_IPV6))
		read = xdp_parse_ipv6(data, end, p);
	p->len = len - L3_OFFSET;
	/* The frame may be padded, but not cut. */
	return read && p->wire_len <= p->len;
}

/* Returns whether this is a packet that XDP deals with. */
__noinline int xdp_parse(struct xdp_md *ctx, struct packet *p)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;

	/* Not those for everybody. */
	if (!p || (void *)(eth + 1) > end || eth->h_dest[0] & 1)
		return false;
	return xdp_parse_frame(data, end, bpf_xdp_get_buff_len(ctx), p);
}
