/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Another port in an SCTP packet. Its checksum is a CRC32c over the whole packet (RFC 9260 6.8, appendix A), ports included,
 * yet the payload needn't be read: a CRC is linear. When the first word changes by d (exclusive or), the CRC of a packet of n
 * bytes changes by what a packet of d followed by zeros would have, begun from zero: d * x^(8n) modulo the polynomial. */
#pragma once
#include "include/packet.h"
#include "lib/parse.h"

/* Polynomial and remainders have their bits reflected, as the checksum has: the highest bit is the power 0. */
#define CRC32C_POLY 0x82f63b78

/* [k][j] is x^(8 * j * 16^k): the power for each digit of a length. Each entry of a row is the one before it times the
 * second of the row; that one is x^8, and in each further row the last entry of the row before it times its second. */
static const __u32 crc32c_powers[4][16] = {
	{
		0x80000000, 0x00800000, 0x00008000, 0x00000080, 0x82f63b78, 0xfbc3faf9, 0x8b277743, 0x52a0c93f,
		0x6ea2d55c, 0x1c08b7d6, 0xf56e0ef4, 0x34019664, 0xa66805eb, 0x7a1f6b24, 0xe75d06aa, 0xc94ec098,
	},
	{
		0x80000000, 0x18b8ea18, 0x510ac59a, 0xb2dea967, 0xb82be955, 0x36c41f1c, 0x19b29a35, 0xc9e90b9e,
		0xb8fdb1e7, 0xe55ef1f3, 0x1fe0b5c3, 0xe0553f1e, 0x18e4a304, 0x2b830011, 0x56993a31, 0x0246e2e6,
	},
	{
		0x80000000, 0x88e56f72, 0x74c360a4, 0x631bb273, 0xe4172b16, 0x71892b1b, 0x835305c9, 0x196b1eae,
		0x0d65762a, 0xafc81338, 0xb5a50ab7, 0xf373c3ac, 0x5f60970f, 0xd46d3063, 0x3a5275ea, 0x02331c01,
	},
	{
		0x80000000, 0x35d73a62, 0x28461564, 0x43eefc9f, 0xbf455269, 0x5edcdeb9, 0x65059450, 0x4e6f41a4,
		0xe2ea32dc, 0xf5b95b32, 0x695a4c87, 0xf204502c, 0x9a4f01b6, 0x941a0916, 0x4303cb97, 0x4c3d3d65,
	},
};

/* Product of two remainders. Without branches, or the verifier would follow each way through it. */
static __always_inline __u32 crc32c_multiply(__u32 a, __u32 b)
{
	__u32 product = 0;

	for (int i = 0; i < 32; i++) {
		product ^= b & -(a >> 31);
		a <<= 1;
		b = b >> 1 ^ (CRC32C_POLY & -(b & 1));
	}
	return product;
}

/* How the CRC of `len` bytes changes with their first word. */
static __always_inline __u32 crc32c_change(__u32 word, __u16 len)
{
	for (int k = 0; k < 4; k++)
		word = crc32c_multiply(word, crc32c_powers[k][len >> 4 * k & 15]);
	return word;
}

/* Bytes of the SCTP packet by the network header: the frame may be padded. 0: they can't be known. */
static __always_inline __u16 sctp_len(struct __sk_buff *skb, const struct packet *p)
{
	bool v6 = is_v6(p);
	__be16 len;

	/* The checksum is the whole datagram's. */
	if (p->flags & PACKET_FRAGMENT ||
	    bpf_skb_load_bytes(skb, L3_OFFSET + (v6 ? offsetof(struct ipv6hdr, payload_len) :
						      offsetof(struct iphdr, tot_len)), &len, sizeof(len)) < 0)
		return 0;
	__u32 end = L3_OFFSET + bpf_ntohs(len) + (v6 ? sizeof(struct ipv6hdr) : 0);

	return end > p->l4 ? end - p->l4 : 0;
}

struct sctp_start {
	__u32 ports;
	__be32 tag;
	__u32 crc;           /* the one little-endian field there is */
};

/* Changes the ports by `change` (exclusive or), both in one word as they lie in the packet. Returns 0 or the reason to
 * drop. */
__noinline int sctp_change_ports(struct __sk_buff *skb, struct packet *p, __u32 change)
{
	struct sctp_start sctp;

	if (!p)
		return DROP_WRITE_ERROR;
	__u16 len = sctp_len(skb, p);

	if (!len)
		return DROP_NAT_UNSUPPORTED_PROTOCOL;
	if (bpf_skb_load_bytes(skb, p->l4, &sctp, sizeof(sctp)) < 0)
		return DROP_CT_INVALID_HEADER;
	sctp.ports ^= change;
	/* 0: the device has yet to sum it up (or nobody ever will, RFC 9653). */
	if (sctp.crc)
		sctp.crc ^= crc32c_change(change, len);
	return bpf_skb_store_bytes(skb, p->l4, &sctp, sizeof(sctp), BPF_F_RECOMPUTE_CSUM) < 0 ? DROP_WRITE_ERROR : 0;
}
