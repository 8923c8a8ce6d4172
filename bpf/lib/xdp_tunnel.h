/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Into the overlay without its device: VXLAN (RFC 7348) by hand, as the kernel writes it for lib/encap.h. */
#pragma once
#include "lib/encap.h"
#include "lib/service.h"
#include "lib/xdp_send.h"

#define VXLAN_HAS_VNI 0x08000000
#define TUNNEL_SPORT_MIN 49152
#define TUNNEL_SPORTS 16384

struct vxlan {
	__be32 flags;
	__be32 vni;          /* in the upper 24 bits */
};

/* What comes before the frame; what it consists of is a multiple of two bytes, hence no packing inside. */
struct outer4 {
	struct ethhdr eth;
	struct iphdr ip4;
	struct udphdr udp;
	struct vxlan vxlan;
} __attribute__((packed));

struct outer6 {
	struct ethhdr eth;
	struct ipv6hdr ip6;
	struct udphdr udp;
	struct vxlan vxlan;
} __attribute__((packed));

/* Both ends of the tunnel, and where the frame goes next. */
struct xdp_outer {
	struct frame_macs macs;
	addr_t source;
	addr_t destination;
};

/* Bytes that a frame grows by. */
static __always_inline __u32 tunnel_room(const addr_t *node)
{
	return addr_is_v4(node) ? sizeof(struct outer4) : sizeof(struct outer6);
}

/* The same for all packets of a connection, as far as routers that spread by it are concerned. */
static __always_inline __be16 tunnel_sport(const struct tuple *t)
{
	__u64 hash = hash_word(t->proto, t->saddr.w[2] ^ t->daddr.w[2], t->saddr.w[3] ^ t->daddr.w[3]);

	return bpf_htons(TUNNEL_SPORT_MIN + hash_end(hash_word(hash, t->sport, t->dport)) % TUNNEL_SPORTS);
}

/* The outer header's congestion notification, RFC 6040 4.1 (normal mode, which Linux has for tunnels but for CE). */
static __always_inline __u8 outer_ecn(void *frame, const struct packet *p)
{
	struct iphdr *ip4 = frame + L3_OFFSET;
	__u8 *ip6 = frame + L3_OFFSET;
	__u8 ecn = (is_v6(p) ? ip6[1] >> 4 : ip4->tos) & 3;

	return ecn == 3 ? 2 : ecn;
}

static __always_inline void write_vxlan(struct udphdr *udp, struct vxlan *vxlan, __be16 sport, __u32 len)
{
	udp->source = sport;
	udp->dest = bpf_htons(cfg_overlay_port);
	udp->len = bpf_htons(sizeof(*udp) + sizeof(*vxlan) + len);
	udp->check = 0;
	vxlan->flags = bpf_htonl(VXLAN_HAS_VNI);
	vxlan->vni = bpf_htonl(IDENTITY_WORLD << 8);
}

static __always_inline void write_outer4(struct outer4 *outer, const struct xdp_outer *o, __be16 sport, __u32 len,
					 __u8 ecn)
{
	struct iphdr ip4 = {
		.version = 4,
		.ihl = sizeof(ip4) / 4,
		.tos = ecn,
		.tot_len = bpf_htons(sizeof(*outer) - sizeof(outer->eth) + len),
		.id = bpf_get_prandom_u32(),
		.ttl = TUNNEL_TTL,
		.protocol = IPPROTO_UDP,
		.saddr = addr_to_v4(&o->source),
		.daddr = addr_to_v4(&o->destination),
	};

	ip4.check = csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)&ip4, sizeof(ip4), 0));
	outer->eth.h_proto = bpf_htons(ETH_P_IP);
	outer->ip4 = ip4;
	write_vxlan(&outer->udp, &outer->vxlan, sport, len);
}

static __always_inline void write_outer6(struct outer6 *outer, const struct xdp_outer *o, __be16 sport, __u32 len,
					 __u8 ecn)
{
	outer->eth.h_proto = bpf_htons(ETH_P_IPV6);
	*(__be32 *)&outer->ip6 = bpf_htonl(6 << 28 | (__u32)ecn << 20);
	outer->ip6.payload_len = bpf_htons(sizeof(outer->udp) + sizeof(outer->vxlan) + len);
	outer->ip6.nexthdr = IPPROTO_UDP;
	outer->ip6.hop_limit = TUNNEL_TTL;
	__builtin_memcpy(&outer->ip6.saddr, &o->source, sizeof(addr_t));
	__builtin_memcpy(&outer->ip6.daddr, &o->destination, sizeof(addr_t));
	write_vxlan(&outer->udp, &outer->vxlan, sport, len);
}

/* Puts a client's frame into the tunnel. Returns 0 or the reason to drop. */
__noinline int xdp_encapsulate(struct xdp_md *ctx, struct packet *p, struct xdp_outer *o)
{
	if (!p || !o)
		return DROP_WRITE_ERROR;
	bool v4 = addr_is_v4(&o->destination);
	__u32 len = bpf_xdp_get_buff_len(ctx);
	void *frame = (void *)(long)ctx->data;

	if (frame + L3_OFFSET + sizeof(struct iphdr) > (void *)(long)ctx->data_end)
		return DROP_WRITE_ERROR;
	__be16 sport = tunnel_sport(&p->t);
	__u8 ecn = outer_ecn(frame, p);

	if (bpf_xdp_adjust_head(ctx, -(int)(v4 ? sizeof(struct outer4) : sizeof(struct outer6))))
		return DROP_WRITE_ERROR;
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;

	if (data + sizeof(struct outer4) > end)
		return DROP_WRITE_ERROR;
	__builtin_memcpy(data, &o->macs, sizeof(o->macs));
	if (v4) {
		write_outer4(data, o, sport, len, ecn);
		return 0;
	}
	if (data + sizeof(struct outer6) > end)
		return DROP_WRITE_ERROR;
	write_outer6(data, o, sport, len, ecn);
	return 0;
}

/* Would the kernel take the frame out of this packet, and lib/encap.h believe its sender? What the tunnel's way has to say
 * about congestion, and sums over the whole packet, are for the kernel to deal with. */
static __always_inline bool tunnel_is_plain(const struct udphdr *udp, const struct vxlan *vxlan, __u8 ecn,
					    const struct packet *p)
{
	const struct remote *node = ipcache_lookup(&p->t.saddr);

	if (!node || !(node->flags & REMOTE_NODE) || node->identity == IDENTITY_HOST)
		return false;
	return ecn != 3 && !udp->check && vxlan->flags == bpf_htonl(VXLAN_HAS_VNI) &&
	       identity_claimable(bpf_ntohl(vxlan->vni) >> 8);
}

static __always_inline bool open_outer4(struct outer4 *outer, void *end, const struct packet *p)
{
	return (void *)(outer + 1) <= end && tunnel_is_plain(&outer->udp, &outer->vxlan, outer->ip4.tos & 3, p);
}

static __always_inline bool open_outer6(struct outer6 *outer, void *end, const struct packet *p)
{
	return (void *)(outer + 1) <= end &&
	       tunnel_is_plain(&outer->udp, &outer->vxlan, ((__u8 *)&outer->ip6)[1] >> 4 & 3, p);
}

/* Reads the frame in a packet of the tunnel, whose own headers are in `p`; then it is what `p` is about. Returns how many
 * bytes come before it, 0 if it isn't one for XDP. */
__noinline int xdp_look_inside(struct xdp_md *ctx, struct packet *p)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u32 len = bpf_xdp_get_buff_len(ctx);
	bool v6, read;

	if (!p)
		return 0;
	v6 = is_v6(p);
	if (!(v6 ? open_outer6(data, end, p) : open_outer4(data, end, p)))
		return 0;
	__builtin_memset(p, 0, sizeof(*p));
	p->direction = DIRECTION_INGRESS;
	if (v6)
		read = xdp_parse_frame(data + sizeof(struct outer6), end, len - sizeof(struct outer6), p);
	else
		read = xdp_parse_frame(data + sizeof(struct outer4), end, len - sizeof(struct outer4), p);
	return !read ? 0 : v6 ? sizeof(struct outer6) : sizeof(struct outer4);
}
