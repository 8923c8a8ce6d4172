/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Frames out again by the device that they came from: where to, and with other ends. */
#pragma once
#include "lib/rewrite.h"
#include "lib/route.h"
#include "lib/xdp_parse.h"

/* The way on for a packet with these addresses; true: out by the device that it came from, with the MAC addresses in
 * `macs`. What needs anything else (another device, a neighbour that isn't known, a smaller packet) isn't for here. */
__noinline int xdp_next_hop(struct xdp_md *ctx, struct packet *p, addr_t *from, addr_t *to, struct frame_macs *macs)
{
	struct bpf_fib_lookup fib = {};

	if (!p || !from || !to || !macs)
		return false;
	fib.ifindex = ctx->ingress_ifindex;
	fib.l4_protocol = p->t.proto;
	fib.sport = p->t.sport;
	fib.dport = p->t.dport;
	fib.tot_len = p->wire_len;
	fib.family = is_v6(p) ? AF_INET6 : AF_INET;
	if (is_v6(p)) {
		__builtin_memcpy(fib.ipv6_src, from->b, 16);
		__builtin_memcpy(fib.ipv6_dst, to->b, 16);
	} else {
		fib.ipv4_src = addr_to_v4(from);
		fib.ipv4_dst = addr_to_v4(to);
	}
	if (bpf_fib_lookup(ctx, &fib, sizeof(fib), 0) != BPF_FIB_LKUP_RET_SUCCESS || fib.ifindex != ctx->ingress_ifindex)
		return false;
	__builtin_memcpy(&macs->dst, fib.dmac, ETH_ALEN);
	__builtin_memcpy(&macs->src, fib.smac, ETH_ALEN);
	return true;
}

/* What is different about a packet that goes on. */
struct xdp_change {
	struct frame_macs macs;
	struct end source;
	struct end destination;
};

static __always_inline void xdp_mend(__u16 *check, __u64 diff)
{
	*check = csum_fold((__u64)(__u16)~*check + diff);
}

static __always_inline bool xdp_rewrite_l4(void *l4, void *end, struct packet *p, struct xdp_change *c, __u64 diff)
{
	struct tcphdr *tcp = l4;
	struct udphdr *udp = l4;

	if ((void *)(udp + 1) > end)
		return false;
	diff += word_diff(p->t.sport, c->source.port) + word_diff(p->t.dport, c->destination.port);
	udp->source = c->source.port;
	udp->dest = c->destination.port;
	if (p->t.proto == IPPROTO_TCP) {
		if ((void *)(tcp + 1) > end)
			return false;
		xdp_mend(&tcp->check, diff);
	} else if (udp->check) {
		/* 0 would say that there is none. */
		xdp_mend(&udp->check, diff);
		if (!udp->check)
			udp->check = 0xffff;
	}
	return true;
}

static __always_inline bool xdp_rewrite_ipv4(void *data, void *end, struct packet *p, struct xdp_change *c)
{
	struct iphdr *ip4 = data + L3_OFFSET;

	if ((void *)(ip4 + 1) > end)
		return false;
	__u64 diff = (__u64)(__u32)addr_diff(false, &p->t.saddr, &c->source.addr) +
		     (__u32)addr_diff(false, &p->t.daddr, &c->destination.addr);

	ip4->saddr = addr_to_v4(&c->source.addr);
	ip4->daddr = addr_to_v4(&c->destination.addr);
	ip4->ttl = p->ttl - 1;
	xdp_mend(&ip4->check, diff + word_diff(bpf_htons(p->ttl << 8), bpf_htons((p->ttl - 1) << 8)));
	return xdp_rewrite_l4(data + L4_OFFSET4, end, p, c, diff);
}

static __always_inline bool xdp_rewrite_ipv6(void *data, void *end, struct packet *p, struct xdp_change *c)
{
	struct ipv6hdr *ip6 = data + L3_OFFSET;

	if ((void *)(ip6 + 1) > end)
		return false;
	__u64 diff = (__u64)(__u32)addr_diff(true, &p->t.saddr, &c->source.addr) +
		     (__u32)addr_diff(true, &p->t.daddr, &c->destination.addr);

	__builtin_memcpy(&ip6->saddr, &c->source.addr, sizeof(addr_t));
	__builtin_memcpy(&ip6->daddr, &c->destination.addr, sizeof(addr_t));
	ip6->hop_limit = p->ttl - 1;
	return xdp_rewrite_l4(data + L4_OFFSET6, end, p, c, diff);
}

/* Rewrites a packet of xdp_parse() and sends it. */
__noinline int xdp_send(struct xdp_md *ctx, struct packet *p, struct xdp_change *c)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;

	if (!p || !c || (void *)(eth + 1) > end)
		return XDP_ABORTED;
	__builtin_memcpy(eth, &c->macs, sizeof(c->macs));
	if (!(is_v6(p) ? xdp_rewrite_ipv6(data, end, p, c) : xdp_rewrite_ipv4(data, end, p, c)))
		return XDP_ABORTED;
	count(METRIC_FORWARDED, p->direction, p->len);
	return XDP_TX;
}
