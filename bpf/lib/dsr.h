/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Direct return: the node that a client called tells the backend's node which frontend it called, so that the answer can
 * go straight to the client in that frontend's name. It travels in the packet: as an option of IPv4 (RFC 791 3.1) or in
 * a destination options header of IPv6 (RFC 8200 4.6), under the number for experiments (RFC 4727: 30, 0x1e).
 *
 * Both are put right after the fixed header, and looked for nowhere else: whatever else there is, of the client or of a
 * router, stays as it is. Whoever reads it must not believe it: anybody can write it. */
#pragma once
#include "lib/parse.h"
#include "lib/rewrite.h"

#define DSR_OPTION4 0x9e        /* copied to every fragment, option 30 */
#define DSR_OPTION6 0x1e        /* to be skipped by who doesn't know it, may not change on the way */
#define DSR_ADJUST (BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET)

struct dsr_option4 {
	__u8 type;
	__u8 len;            /* of the whole option */
	port_be_t port;
	__be32 addr;
};
_Static_assert(sizeof(struct dsr_option4) == 8, "a multiple of four, as IPv4's header is");

/* The padding comes first, so that the address is aligned. */
struct dsr_header6 {
	__u8 next;
	__u8 units;          /* of eight bytes, without the first */
	__u8 pad_type;       /* PadN, of no bytes */
	__u8 pad_len;
	__u8 type;
	__u8 len;            /* of what follows */
	port_be_t port;
	addr_t addr;
};
_Static_assert(sizeof(struct dsr_header6) == 24, "a multiple of eight, as every extension header is");

#define DSR_PAD6 1
#define DSR_LEN6 (sizeof(port_be_t) + sizeof(addr_t))
#define DSR_UNITS6 (sizeof(struct dsr_header6) / 8 - 1)

/* How many bytes dsr_add() will add. */
static __always_inline __u32 dsr_room(const struct packet *p)
{
	return is_v6(p) ? sizeof(struct dsr_header6) : sizeof(struct dsr_option4);
}

static __always_inline void dsr_grown(struct packet *p, __s32 by)
{
	p->l4 += by;
	p->len += by;
	p->wire_len += by;
}

/* First word of an IPv4 header, and the option behind that header. */
struct dsr_v4 {
	__u8 version_ihl;
	__u8 tos;
	__be16 tot_len;
	struct dsr_option4 option;
};

/* Makes that of an IPv4 header's first word, which is there, and the frontend. Returns the change of the header's sum. */
static __always_inline __s64 dsr_make4(struct dsr_v4 *v4, const struct end *frontend)
{
	__be32 before;

	__builtin_memcpy(&before, v4, sizeof(before));
	v4->version_ihl += sizeof(v4->option) / 4;
	v4->tot_len = bpf_htons(bpf_ntohs(v4->tot_len) + sizeof(v4->option));
	v4->option.type = DSR_OPTION4;
	v4->option.len = sizeof(v4->option);
	v4->option.port = frontend->port;
	v4->option.addr = addr_to_v4(&frontend->addr);
	return bpf_csum_diff(&before, sizeof(before), (__be32 *)v4, sizeof(*v4), 0);
}

static __always_inline void dsr_make6(struct dsr_header6 *h, __u8 next, const struct end *frontend)
{
	h->next = next;
	h->units = DSR_UNITS6;
	h->pad_type = DSR_PAD6;
	h->pad_len = 0;
	h->type = DSR_OPTION6;
	h->len = DSR_LEN6;
	h->port = frontend->port;
	h->addr = frontend->addr;
}

/* Stores the first word of the header and mends its checksum by `diff`. */
static __always_inline int dsr_store_start4(struct __sk_buff *skb, const struct dsr_v4 *v4, __s64 diff)
{
	if (diff < 0 || bpf_skb_store_bytes(skb, L3_OFFSET, v4, 4, 0) < 0)
		return DROP_WRITE_ERROR;
	return bpf_l3_csum_replace(skb, L3_OFFSET + offsetof(struct iphdr, check), 0, diff, 0) < 0 ? DROP_L3_CHECKSUM : 0;
}

static __always_inline int dsr_add4(struct __sk_buff *skb, const struct end *frontend)
{
	struct dsr_v4 v4;

	if (bpf_skb_load_bytes(skb, L3_OFFSET, &v4, 4) < 0)
		return DROP_INVALID_PACKET;
	/* No room in a header that is full of options. */
	if ((v4.version_ihl & 15) > 15 - sizeof(v4.option) / 4)
		return DROP_INVALID_PACKET;
	__s64 diff = dsr_make4(&v4, frontend);

	if (bpf_skb_adjust_room(skb, sizeof(v4.option), BPF_ADJ_ROOM_NET, DSR_ADJUST) < 0 ||
	    bpf_skb_store_bytes(skb, L3_OFFSET + sizeof(struct iphdr), &v4.option, sizeof(v4.option), 0) < 0)
		return DROP_WRITE_ERROR;
	return dsr_store_start4(skb, &v4, diff);
}

static __always_inline int dsr_add6(struct __sk_buff *skb, const struct end *frontend)
{
	struct dsr_header6 h;
	struct {
		__be16 payload_len;
		__u8 next;
	} __attribute__((packed)) ip6;
	__u32 off = L3_OFFSET + offsetof(struct ipv6hdr, payload_len);

	if (bpf_skb_load_bytes(skb, off, &ip6, sizeof(ip6)) < 0)
		return DROP_INVALID_PACKET;
	/* Hop-by-hop options must stay the first header, RFC 8200 4.1. */
	if (ip6.next == IPPROTO_HOPOPTS)
		return DROP_INVALID_IPV6_EXTENSION;
	dsr_make6(&h, ip6.next, frontend);
	ip6.next = IPPROTO_DSTOPTS;
	ip6.payload_len = bpf_htons(bpf_ntohs(ip6.payload_len) + sizeof(h));
	if (bpf_skb_adjust_room(skb, sizeof(h), BPF_ADJ_ROOM_NET, DSR_ADJUST) < 0 ||
	    bpf_skb_store_bytes(skb, L3_OFFSET + sizeof(struct ipv6hdr), &h, sizeof(h), BPF_F_RECOMPUTE_CSUM) < 0 ||
	    bpf_skb_store_bytes(skb, off, &ip6, sizeof(ip6), BPF_F_RECOMPUTE_CSUM) < 0)
		return DROP_WRITE_ERROR;
	return 0;
}

/* Adds the frontend to a packet of its family. `p` is right about it afterwards. Returns 0 or the reason to drop. */
__noinline int dsr_add(struct __sk_buff *skb, struct packet *p, struct end *frontend)
{
	if (!p || !frontend)
		return DROP_WRITE_ERROR;
	int reason = is_v6(p) ? dsr_add6(skb, frontend) : dsr_add4(skb, frontend);

	if (!reason)
		dsr_grown(p, dsr_room(p));
	return reason;
}

enum dsr_found {
	DSR_NONE = 0,
	DSR_TAKEN = -1,
};

static __always_inline int dsr_take4(struct __sk_buff *skb, struct end *frontend)
{
	struct dsr_v4 v4;
	__be32 before[3];

	if (bpf_skb_load_bytes(skb, L3_OFFSET + sizeof(struct iphdr), &v4.option, sizeof(v4.option)) < 0 ||
	    v4.option.type != DSR_OPTION4 || v4.option.len != sizeof(v4.option))
		return DSR_NONE;
	if (bpf_skb_load_bytes(skb, L3_OFFSET, &v4, 4) < 0)
		return DROP_INVALID_PACKET;
	__builtin_memcpy(before, &v4, sizeof(before));
	v4.version_ihl -= sizeof(v4.option) / 4;
	v4.tot_len = bpf_htons(bpf_ntohs(v4.tot_len) - sizeof(v4.option));
	addr_from_v4(&frontend->addr, v4.option.addr);
	frontend->port = v4.option.port;
	if (bpf_skb_adjust_room(skb, -(__s32)sizeof(v4.option), BPF_ADJ_ROOM_NET, DSR_ADJUST) < 0)
		return DROP_WRITE_ERROR;
	int reason = dsr_store_start4(skb, &v4, bpf_csum_diff(before, sizeof(before), (__be32 *)&v4, 4, 0));

	return reason ? reason : DSR_TAKEN;
}

static __always_inline int dsr_take6(struct __sk_buff *skb, struct end *frontend)
{
	struct dsr_header6 h;
	struct {
		__be16 payload_len;
		__u8 next;
	} __attribute__((packed)) ip6;
	__u32 off = L3_OFFSET + offsetof(struct ipv6hdr, payload_len);

	if (bpf_skb_load_bytes(skb, off, &ip6, sizeof(ip6)) < 0 || ip6.next != IPPROTO_DSTOPTS ||
	    bpf_skb_load_bytes(skb, L3_OFFSET + sizeof(struct ipv6hdr), &h, sizeof(h)) < 0)
		return DSR_NONE;
	if (h.units != DSR_UNITS6 || h.pad_type != DSR_PAD6 || h.pad_len || h.type != DSR_OPTION6 || h.len != DSR_LEN6)
		return DSR_NONE;
	ip6.next = h.next;
	ip6.payload_len = bpf_htons(bpf_ntohs(ip6.payload_len) - sizeof(h));
	frontend->addr = h.addr;
	frontend->port = h.port;
	if (bpf_skb_adjust_room(skb, -(__s32)sizeof(h), BPF_ADJ_ROOM_NET, DSR_ADJUST) < 0 ||
	    bpf_skb_store_bytes(skb, off, &ip6, sizeof(ip6), BPF_F_RECOMPUTE_CSUM) < 0)
		return DROP_WRITE_ERROR;
	return DSR_TAKEN;
}

/* Takes the frontend out of a packet that has been parsed, if it carries one: DSR_TAKEN, and `frontend` is what it says.
 * DSR_NONE, or the reason to drop. */
__noinline int dsr_take(struct __sk_buff *skb, struct packet *p, struct end *frontend)
{
	if (!p || !frontend)
		return DROP_WRITE_ERROR;
	bool v6 = is_v6(p);

	/* Nearly all packets: nothing between the headers. */
	if (p->l4 < L3_OFFSET + (v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr)) + dsr_room(p))
		return DSR_NONE;
	frontend->pad = 0;
	int found = v6 ? dsr_take6(skb, frontend) : dsr_take4(skb, frontend);

	if (found == DSR_TAKEN)
		dsr_grown(p, -(__s32)dsr_room(p));
	return found;
}
