/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* The overlay: VXLAN on a device in collect_md mode, the source identity in the VNI. */
#pragma once
#include "include/packet.h"
#include "lib/identity.h"

/* The overlay device; 0: native routing. */
const volatile ifindex_t cfg_overlay_ifindex = 0;

/* UDP port that nodes listen on for it, in host byte order. */
const volatile __u16 cfg_overlay_port = 8472;

#define TUNNEL_TTL 64

/* Does this packet speak the overlay's protocol? */
static __always_inline bool is_tunnel(const struct packet *p)
{
	return cfg_overlay_ifindex && p->t.proto == IPPROTO_UDP && p->t.dport == bpf_htons(cfg_overlay_port);
}

static __always_inline int set_tunnel_key(struct __sk_buff *skb, const addr_t *node, identity_t source)
{
	struct bpf_tunnel_key key = {.tunnel_id = source, .tunnel_ttl = TUNNEL_TTL};

	if (addr_is_v4(node)) {
		key.remote_ipv4 = bpf_ntohl(addr_to_v4(node));
		return bpf_skb_set_tunnel_key(skb, &key, sizeof(key), BPF_F_ZERO_CSUM_TX);
	}
	__builtin_memcpy(key.remote_ipv6, node->b, sizeof(key.remote_ipv6));
	return bpf_skb_set_tunnel_key(skb, &key, sizeof(key), BPF_F_ZERO_CSUM_TX | BPF_F_TUNINFO_IPV6);
}

/* The node that sent the packet and the identity that it claims for the source. */
static __always_inline int get_tunnel_key(struct __sk_buff *skb, addr_t *node, identity_t *source)
{
	struct bpf_tunnel_key key = {};

	if (!bpf_skb_get_tunnel_key(skb, &key, sizeof(key), 0)) {
		addr_from_v4(node, bpf_htonl(key.remote_ipv4));
	} else {
		if (bpf_skb_get_tunnel_key(skb, &key, sizeof(key), BPF_F_TUNINFO_IPV6))
			return DROP_NO_TUNNEL_KEY;
		__builtin_memcpy(node->b, key.remote_ipv6, sizeof(node->b));
	}
	*source = key.tunnel_id;
	return 0;
}

/* A peer may not claim to be this node, which may do all. It may speak for the world, as it does for clients of services
 * that it sends here: whoever could forge that could as well claim a pod's identity, and the world has no rights but those
 * that policies give to everybody outside. */
static __always_inline bool identity_claimable(identity_t identity)
{
	switch (identity) {
	case IDENTITY_WORLD:
	case IDENTITY_UNMANAGED:
	case IDENTITY_HEALTH:
	case IDENTITY_INIT:
	case IDENTITY_REMOTE_NODE:
	case IDENTITY_KUBE_APISERVER:
		return true;
	}
	return identity >= IDENTITY_MIN_ALLOCATED && identity < IDENTITY_SCOPE_CIDR;
}
