/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Frames out again by the device that they came from: where to, and with other ends. */
#pragma once
#include "lib/dsr.h"
#include "lib/rewrite.h"
#include "lib/route.h"
#include "lib/xdp_parse.h"

/* The way on for a packet with these addresses (or those around it) and p->wire_len; true: out by the device that it came from, with the MAC addresses in
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
	if (addr_is_v4(to)) {
		fib.family = AF_INET;
		fib.ipv4_src = addr_to_v4(from);
		fib.ipv4_dst = addr_to_v4(to);
	} else {
		fib.family = AF_INET6;
		__builtin_memcpy(fib.ipv6_src, from->b, 16);
		__builtin_memcpy(fib.ipv6_dst, to->b, 16);
	}
	if (bpf_fib_lookup(ctx, &fib, sizeof(fib), 0) != BPF_FIB_LKUP_RET_SUCCESS || fib.ifindex != ctx->ingress_ifindex)
		return false;
	__builtin_memcpy(&macs->dst, fib.dmac, ETH_ALEN);
	__builtin_memcpy(&macs->src, fib.smac, ETH_ALEN);
	return true;
}

static __always_inline void xdp_mend(__u16 *check, __u64 diff)
{
	*check = csum_fold((__u64)(__u16)~*check + diff);
}

static __always_inline bool xdp_rewrite_l4(void *l4, void *end, struct packet *p, __u64 diff)
{
	struct tcphdr *tcp = l4;
	struct udphdr *udp = l4;

	if ((void *)(udp + 1) > end)
		return false;
	diff += word_diff(p->t.sport, p->source.port) + word_diff(p->t.dport, p->backend.port);
	udp->source = p->source.port;
	udp->dest = p->backend.port;
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

static __always_inline bool xdp_rewrite_ipv4(void *data, void *end, struct packet *p)
{
	struct iphdr *ip4 = data + L3_OFFSET;

	if ((void *)(ip4 + 1) > end)
		return false;
	__u64 diff = (__u64)(__u32)addr_diff(false, &p->t.saddr, &p->source.addr) +
		     (__u32)addr_diff(false, &p->t.daddr, &p->backend.addr);

	ip4->saddr = addr_to_v4(&p->source.addr);
	ip4->daddr = addr_to_v4(&p->backend.addr);
	ip4->ttl = p->ttl - 1;
	xdp_mend(&ip4->check, diff + word_diff(bpf_htons(p->ttl << 8), bpf_htons((p->ttl - 1) << 8)));
	return xdp_rewrite_l4(data + L4_OFFSET4, end, p, diff);
}

static __always_inline bool xdp_rewrite_ipv6(void *data, void *end, struct packet *p)
{
	struct ipv6hdr *ip6 = data + L3_OFFSET;

	if ((void *)(ip6 + 1) > end)
		return false;
	__u64 diff = (__u64)(__u32)addr_diff(true, &p->t.saddr, &p->source.addr) +
		     (__u32)addr_diff(true, &p->t.daddr, &p->backend.addr);

	__builtin_memcpy(&ip6->saddr, &p->source.addr, sizeof(addr_t));
	__builtin_memcpy(&ip6->daddr, &p->backend.addr, sizeof(addr_t));
	ip6->hop_limit = p->ttl - 1;
	return xdp_rewrite_l4(data + L4_OFFSET6, end, p, diff);
}

/* Gives a packet of xdp_parse() the ends p->source and p->backend. Returns 0 or the reason to drop. */
__noinline int xdp_rewrite(struct xdp_md *ctx, struct packet *p, struct frame_macs *macs)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;

	if (!p || !macs || (void *)(eth + 1) > end)
		return DROP_WRITE_ERROR;
	__builtin_memcpy(eth, macs, sizeof(*macs));
	if (!(is_v6(p) ? xdp_rewrite_ipv6(data, end, p) : xdp_rewrite_ipv4(data, end, p)))
		return DROP_WRITE_ERROR;
	p->t.saddr = p->source.addr;
	p->t.sport = p->source.port;
	p->t.daddr = p->backend.addr;
	p->t.dport = p->backend.port;
	return 0;
}

struct frame4 {
	struct ethhdr eth;
	struct iphdr ip4;
} __attribute__((packed));

struct frame6 {
	struct ethhdr eth;
	struct ipv6hdr ip6;
} __attribute__((packed));

__noinline int xdp_tell4(struct xdp_md *ctx, struct end *frontend)
{
	struct frame4 *frame = (void *)(long)ctx->data, headers;
	struct dsr_v4 v4;

	if (!frontend || (void *)(frame + 1) > (void *)(long)ctx->data_end)
		return DROP_WRITE_ERROR;
	__builtin_memcpy(&headers, frame, sizeof(headers));
	if (bpf_xdp_adjust_head(ctx, -(int)sizeof(v4.option)))
		return DROP_WRITE_ERROR;
	__builtin_memcpy(&v4, &headers.ip4, 4);
	xdp_mend(&headers.ip4.check, (__u32)dsr_make4(&v4, frontend));
	__builtin_memcpy(&headers.ip4, &v4, 4);
	frame = (void *)(long)ctx->data;
	struct dsr_option4 *option = (void *)(frame + 1);

	if ((void *)(option + 1) > (void *)(long)ctx->data_end)
		return DROP_WRITE_ERROR;
	__builtin_memcpy(frame, &headers, sizeof(headers));
	*option = v4.option;
	return 0;
}

__noinline int xdp_tell6(struct xdp_md *ctx, struct end *frontend)
{
	struct frame6 *frame = (void *)(long)ctx->data, headers;

	if (!frontend || (void *)(frame + 1) > (void *)(long)ctx->data_end)
		return DROP_WRITE_ERROR;
	__builtin_memcpy(&headers, frame, sizeof(headers));
	if (bpf_xdp_adjust_head(ctx, -(int)sizeof(struct dsr_header6)))
		return DROP_WRITE_ERROR;
	frame = (void *)(long)ctx->data;
	struct dsr_header6 *option = (void *)(frame + 1);

	if ((void *)(option + 1) > (void *)(long)ctx->data_end)
		return DROP_WRITE_ERROR;
	dsr_make6(option, headers.ip6.nexthdr, frontend);
	headers.ip6.nexthdr = IPPROTO_DSTOPTS;
	headers.ip6.payload_len = bpf_htons(bpf_ntohs(headers.ip6.payload_len) + sizeof(*option));
	__builtin_memcpy(frame, &headers, sizeof(headers));
	return 0;
}

/* What dsr_add() does, to a packet of xdp_parse(). Returns 0 or the reason to drop. */
static __always_inline int xdp_tell(struct xdp_md *ctx, const struct packet *p, struct end *frontend)
{
	return is_v6(p) ? xdp_tell6(ctx, frontend) : xdp_tell4(ctx, frontend);
}

/* The end of every packet that isn't left to tc: on its way to `point`, or dropped. */
static __always_inline int xdp_end(struct xdp_md *ctx, struct packet *p, int reason, __u32 point)
{
	count(reason ? reason : METRIC_FORWARDED, p->direction, p->len);
	if (cfg_events && reason)
		emit_event(p, ctx->ingress_ifindex, EVENT_DROP << 8 | (reason & 0xff));
	else if (cfg_events && p->report)
		emit_event(p, ctx->ingress_ifindex, EVENT_TRACE << 8 | point);
	return reason ? XDP_DROP : XDP_TX;
}
