/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* The pods' gateway: ARP (RFC 826) and neighbour solicitations (RFC 4861 7.2) for it are answered from here. */
#pragma once
#include "include/config.h"
#include "include/packet.h"
#include "lib/parse.h"
#include "lib/rewrite.h"
#include "lib/trace.h"
#include "maps/endpoint.h"

/* The gateway's addresses; all zero: none in this family. */
const volatile addr_t cfg_router_addr4 = {};
const volatile addr_t cfg_router_addr6 = {};

struct arp_ipv4 {
	__be16 hardware;
	__be16 protocol;
	__u8 hardware_len;
	__u8 protocol_len;
	__be16 operation;
	mac_t sender_mac;
	__u8 sender_ip[4];
	mac_t target_mac;
	__u8 target_ip[4];
};
_Static_assert(sizeof(struct arp_ipv4) == 28, "struct arp_ipv4");

#define ARP_REQUEST 1
#define ARP_REPLY 2

static __always_inline bool mac_equal(const mac_t *a, const mac_t *b)
{
	return !__builtin_memcmp(a, b, sizeof(*a));
}

/* Our own answer goes back where the question came from. */
static __always_inline int answer(struct __sk_buff *skb, const struct endpoint *ep)
{
	struct frame_macs macs = {.dst = ep->pod_mac, .src = ep->host_mac};

	if (bpf_skb_store_bytes(skb, 0, &macs, sizeof(macs), 0) < 0)
		return TC_ACT_SHOT;
	skb->mark = MARK_ANSWER;
	return bpf_redirect(skb->ifindex, 0);
}

static __always_inline __be32 router4(void)
{
	return cfg_router_addr4.w[3];
}

__noinline int answer_arp(struct __sk_buff *skb, struct endpoint *ep)
{
	struct arp_ipv4 arp;
	__be32 wanted;

	if (!ep)
		return TC_ACT_SHOT;
	if (bpf_skb_load_bytes(skb, ETH_HLEN, &arp, sizeof(arp)) < 0)
		return TC_ACT_SHOT;
	/* The stack asks for its pods, too. */
	if (arp.operation == bpf_htons(ARP_REPLY) && !__builtin_memcmp(arp.sender_ip, &ep->addr4.b[12], 4) &&
	    mac_equal(&arp.sender_mac, &ep->pod_mac))
		return VERDICT_NEXT;
	if (arp.operation != bpf_htons(ARP_REQUEST))
		return TC_ACT_SHOT;
	__builtin_memcpy(&wanted, arp.target_ip, sizeof(wanted));
	if (!wanted || wanted != router4())
		return TC_ACT_SHOT;
	arp.operation = bpf_htons(ARP_REPLY);
	__builtin_memcpy(arp.target_ip, arp.sender_ip, sizeof(arp.target_ip));
	__builtin_memcpy(arp.sender_ip, &wanted, sizeof(wanted));
	arp.target_mac = arp.sender_mac;
	arp.sender_mac = ep->host_mac;
	if (bpf_skb_store_bytes(skb, ETH_HLEN, &arp, sizeof(arp), 0) < 0)
		return TC_ACT_SHOT;
	return answer(skb, ep);
}

#define ND_ROUTER_SOLICIT 133
#define ND_SOLICIT 135
#define ND_ADVERT 136
#define ND_REDIRECT 137
#define ND_OPTION_TARGET_MAC 2
#define ND_SOLICITED_OVERRIDE_ROUTER 0xe0
#define ND_HOP_LIMIT 255
#define MLD_QUERY 130
#define MLD2_REPORT 143

struct nd_message {
	__u8 type;
	__u8 code;
	__be16 csum;
	__u8 flags;
	__u8 reserved[3];
	addr_t target;
	__u8 option;
	__u8 option_len;
	mac_t mac;
};
_Static_assert(sizeof(struct nd_message) == 32, "struct nd_message");

struct pseudo_header {
	addr_t src;
	addr_t dst;
	__be32 len;
	__be32 next;
};

static __always_inline __u16 icmp6_csum(const addr_t *src, const addr_t *dst, void *message, __u32 len)
{
	struct pseudo_header pseudo = {
		.src = *src, .dst = *dst, .len = bpf_htonl(len), .next = bpf_htonl(IPPROTO_ICMPV6)};
	__s64 sum = bpf_csum_diff(NULL, 0, (__be32 *)&pseudo, sizeof(pseudo), 0);

	sum = bpf_csum_diff(NULL, 0, message, len, sum);
	return csum_fold(sum);
}

/* Is this neighbour discovery, or multicast management? Link-local traffic, not for policy. */
static __always_inline bool is_link_control(const struct packet *p)
{
	return p->t.proto == IPPROTO_ICMPV6 && !(p->flags & PACKET_HEADLESS) &&
	       ((p->icmp_type >= ND_ROUTER_SOLICIT && p->icmp_type <= ND_REDIRECT) ||
		(p->icmp_type >= MLD_QUERY && p->icmp_type < ND_ROUTER_SOLICIT) || p->icmp_type == MLD2_REPORT);
}

/* The node's own devices have such addresses, too, and they are in no policy. */
static __always_inline bool is_link_local(const addr_t *addr)
{
	return addr->b[0] == 0xfe && (addr->b[1] & 0xc0) == 0x80;
}

/* An advertisement of the pod's own address, asked for by the stack. Sent elsewhere it would be forwarded, and its
 * options carry anything past all policy. */
static __always_inline bool is_own_advert(struct __sk_buff *skb, const struct packet *p, const struct endpoint *ep)
{
	struct nd_message nd;

	if (!config_addr_is(&cfg_router_addr6, &p->t.daddr) && !is_link_local(&p->t.daddr))
		return false;
	return p->icmp_type == ND_ADVERT && p->ttl == ND_HOP_LIMIT && addr_equal(&p->t.saddr, &ep->addr6) &&
	       !bpf_skb_load_bytes(skb, p->l4, &nd, sizeof(nd)) && addr_equal(&nd.target, &ep->addr6) &&
	       nd.option == ND_OPTION_TARGET_MAC && mac_equal(&nd.mac, &ep->pod_mac);
}

__noinline int answer_nd(struct __sk_buff *skb, struct packet *p, struct endpoint *ep)
{
	struct ipv6hdr ip6;
	struct nd_message nd = {};
	addr_t router;

	if (!p || !ep)
		return TC_ACT_SHOT;
	if (is_own_advert(skb, p, ep))
		return VERDICT_NEXT;
	config_addr(&router, &cfg_router_addr6);
	/* Without the source's MAC as an option the question is 24 bytes long. */
	if (p->icmp_type != ND_SOLICIT || p->ttl != ND_HOP_LIMIT || addr_is_zero(&p->t.saddr) ||
	    p->l4 != L3_OFFSET + sizeof(ip6) || addr_is_zero(&router) ||
	    bpf_skb_load_bytes(skb, L3_OFFSET, &ip6, sizeof(ip6)) < 0 ||
	    bpf_skb_load_bytes(skb, L3_OFFSET + sizeof(ip6), &nd, offsetof(struct nd_message, option)) < 0 ||
	    !addr_equal(&nd.target, &router))
		return TC_ACT_SHOT;
	ip6.payload_len = bpf_htons(sizeof(nd));
	__builtin_memcpy(&ip6.daddr, &p->t.saddr, sizeof(ip6.daddr));
	__builtin_memcpy(&ip6.saddr, &router, sizeof(ip6.saddr));
	nd.type = ND_ADVERT;
	nd.code = 0;
	nd.csum = 0;
	nd.flags = ND_SOLICITED_OVERRIDE_ROUTER;
	nd.option = ND_OPTION_TARGET_MAC;
	nd.option_len = 1;
	nd.mac = ep->host_mac;
	nd.csum = icmp6_csum(&router, &p->t.saddr, &nd, sizeof(nd));
	if (bpf_skb_change_tail(skb, L3_OFFSET + sizeof(ip6) + sizeof(nd), 0) < 0 ||
	    bpf_skb_store_bytes(skb, L3_OFFSET, &ip6, sizeof(ip6), 0) < 0 ||
	    bpf_skb_store_bytes(skb, L3_OFFSET + sizeof(ip6), &nd, sizeof(nd), 0) < 0)
		return TC_ACT_SHOT;
	return answer(skb, ep);
}
