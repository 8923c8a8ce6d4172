/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Changing addresses and ports in a packet, with every checksum that covers them. */
#pragma once
#include <linux/tcp.h>
#include <linux/udp.h>

#include "include/packet.h"
#include "lib/parse.h"
#include "lib/sctp.h"

enum which_end {
	END_SOURCE,
	END_DESTINATION,
};

static __always_inline __u32 addr_offset(bool v6, __u32 l3, __u32 which)
{
	if (v6)
		return l3 + (which == END_SOURCE ? offsetof(struct ipv6hdr, saddr) : offsetof(struct ipv6hdr, daddr));
	return l3 + (which == END_SOURCE ? offsetof(struct iphdr, saddr) : offsetof(struct iphdr, daddr));
}

/* Offset of the checksum in a transport header; -1: there is none that the addresses or ports are part of. */
static __always_inline int l4_csum_offset(__u8 proto)
{
	switch (proto) {
	case IPPROTO_TCP:
		return offsetof(struct tcphdr, check);
	case IPPROTO_UDP:
		return offsetof(struct udphdr, check);
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return ICMP_CSUM_OFFSET;
	}
	return -1;
}

static __always_inline __u32 port_offset(__u8 proto, __u32 which)
{
	if (!has_ports(proto))
		return ICMP_ID_OFFSET;
	return which == END_SOURCE ? 0 : 2;
}

static __always_inline __s64 addr_diff(bool v6, const addr_t *from, const addr_t *to)
{
	if (v6)
		return bpf_csum_diff((__be32 *)from->w, 16, (__be32 *)to->w, 16, 0);
	return bpf_csum_diff((__be32 *)&from->w[3], 4, (__be32 *)&to->w[3], 4, 0);
}

static __always_inline int store_addr(struct __sk_buff *skb, bool v6, __u32 off, const addr_t *addr)
{
	if (v6)
		return bpf_skb_store_bytes(skb, off, addr->b, 16, 0);
	return bpf_skb_store_bytes(skb, off, &addr->b[12], 4, 0);
}

static __always_inline int rewrite_l4(struct __sk_buff *skb, struct packet *p, __u32 which, port_be_t from,
				      port_be_t to, __s64 diff)
{
	bool v6 = is_v6(p);
	int csum = l4_csum_offset(p->t.proto);
	__u64 flags = p->t.proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;

	if (csum >= 0 && p->t.proto != IPPROTO_ICMP &&
	    bpf_l4_csum_replace(skb, p->l4 + csum, 0, diff, flags | BPF_F_PSEUDO_HDR) < 0)
		return DROP_L4_CHECKSUM;
	/* The helper takes the change of addresses to be balanced by a network header checksum, which IPv6 hasn't. Only
	 * matters, and only succeeds, where a device has summed up the packet. */
	if (v6)
		bpf_csum_update(skb, diff);
	if (from == to)
		return 0;
	if (p->t.proto == IPPROTO_SCTP)
		return sctp_change_ports(skb, p, which == END_SOURCE ? from ^ to : (__u32)(from ^ to) << 16);
	if (bpf_l4_csum_replace(skb, p->l4 + csum, from, to, flags | sizeof(to)) < 0)
		return DROP_L4_CHECKSUM;
	if (bpf_skb_store_bytes(skb, p->l4 + port_offset(p->t.proto, which), &to, sizeof(to), 0) < 0)
		return DROP_WRITE_ERROR;
	return 0;
}

/* Gives one end of the packet another address and port (echo: identifier); an ICMP error only gets the address.
 * Returns 0 or the reason to drop. */
__noinline int rewrite(struct __sk_buff *skb, struct packet *p, struct end *to, __u32 which)
{
	if (!p || !to)
		return DROP_WRITE_ERROR;
	bool v6 = is_v6(p);
	bool source = which == END_SOURCE;
	/* An echo's identifier is one field, whichever side's port it counts as. */
	port_be_t port = source ? p->t.sport : p->t.dport;
	__s64 diff = addr_diff(v6, source ? &p->t.saddr : &p->t.daddr, &to->addr);
	int reason = 0;

	if (!v6 && bpf_l3_csum_replace(skb, L3_OFFSET + offsetof(struct iphdr, check), 0, diff, 0) < 0)
		return DROP_L3_CHECKSUM;
	if (store_addr(skb, v6, addr_offset(v6, L3_OFFSET, which), &to->addr) < 0)
		return DROP_WRITE_ERROR;
	if (p->flags & PACKET_HEADLESS)
		goto done;
	reason = rewrite_l4(skb, p, which, port, p->flags & (PACKET_PORTS | PACKET_ECHO) ? to->port : port, diff);
done:
	if (source)
		p->t.saddr = to->addr;
	else
		p->t.daddr = to->addr;
	if (p->flags & (PACKET_PORTS | PACKET_ECHO)) {
		if (source)
			p->t.sport = to->port;
		else
			p->t.dport = to->port;
	}
	return reason;
}

/* One's complement sum of replacing a 16 bit word, both as they lie in the packet. */
static __always_inline __u32 word_diff(__u16 from, __u16 to)
{
	return (__u32)(__u16)~from + to;
}

static __always_inline __u16 csum_fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~(__u16)sum;
}

/* Replaces the checksum at `off` so that it fits a change of `diff` in what it covers. Returns how the sum of the
 * packet's bytes changed by that. */
static __always_inline __u32 patch_csum(struct __sk_buff *skb, __u32 off, __u64 diff)
{
	__u16 old, new;

	if (bpf_skb_load_bytes(skb, off, &old, sizeof(old)) < 0)
		return 0;
	/* The sum of an address and a port may have a 33rd bit, that counts. */
	new = csum_fold((__u64)(__u16)~old + diff);
	if (bpf_skb_store_bytes(skb, off, &new, sizeof(new), 0) < 0)
		return 0;
	return word_diff(old, new);
}

static __always_inline __u32 patch_inner_l4(struct __sk_buff *skb, struct packet *p, __u64 addresses, __u64 ports)
{
	int csum = l4_csum_offset(p->inner.proto);
	__u16 old = 0;

	if (csum < 0)
		return 0;
	/* Often cut off, for the error need only carry eight bytes; and UDP's 0 says that there is none. */
	if (bpf_skb_load_bytes(skb, p->inner_l4 + csum, &old, sizeof(old)) < 0 ||
	    (!old && p->inner.proto == IPPROTO_UDP))
		return 0;
	return patch_csum(skb, p->inner_l4 + csum, (p->inner.proto == IPPROTO_ICMP ? 0 : addresses) + ports);
}

/* The same for the packet that an ICMP error is about. */
__noinline int rewrite_inner(struct __sk_buff *skb, struct packet *p, struct end *to, __u32 which)
{
	if (!p || !to)
		return DROP_WRITE_ERROR;
	bool v6 = is_v6(p);
	bool source = which == END_SOURCE;
	addr_t old = source ? p->inner.saddr : p->inner.daddr;
	port_be_t port = source ? p->inner.sport : p->inner.dport;
	__u64 addresses = (__u32)addr_diff(v6, &old, &to->addr);
	__u64 ports = word_diff(port, to->port);
	/* Everything that changes is part of what the error's own checksum covers. */
	__u64 all = addresses + ports;

	if (store_addr(skb, v6, addr_offset(v6, p->inner_l3, which), &to->addr) < 0 ||
	    bpf_skb_store_bytes(skb, p->inner_l4 + port_offset(p->inner.proto, which), &to->port, 2, 0) < 0)
		return DROP_WRITE_ERROR;
	if (!v6)
		all += patch_csum(skb, p->inner_l3 + offsetof(struct iphdr, check), addresses);
	all += patch_inner_l4(skb, p, addresses, ports);
	all = (all & 0xffffffff) + (all >> 32);
	all = (all & 0xffffffff) + (all >> 32);
	if (bpf_l4_csum_replace(skb, p->l4 + ICMP_CSUM_OFFSET, 0, all, 0) < 0)
		return DROP_L4_CHECKSUM;
	if (source) {
		p->inner.saddr = to->addr;
		p->inner.sport = to->port;
	} else {
		p->inner.daddr = to->addr;
		p->inner.dport = to->port;
	}
	return 0;
}
