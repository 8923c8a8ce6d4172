/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* What the stages know of a packet. Lives on the stack of the entry program; stages are global functions, verified
 * once each, and get it by pointer. */
#pragma once
#include "include/common.h"
#include "types/event.h"

/* Who talks to whom. ICMP echo: the identifier is the requester's port, the other one is 0. */
struct tuple {
	addr_t saddr;
	addr_t daddr;
	port_be_t sport;
	port_be_t dport;
	__u8 proto;
	__u8 pad[3];
};

/* One end of a connection. */
struct end {
	addr_t addr;
	port_be_t port;
	__u16 pad;
};

enum packet_flag {
	PACKET_PORTS = 1 << 0,     /* TCP, UDP, SCTP: the tuple has ports */
	PACKET_ECHO = 1 << 1,      /* ICMP echo request or reply */
	PACKET_ERROR = 1 << 2,     /* ICMP error: `inner` is the packet that it is about, as its sender sent it */
	PACKET_FRAGMENT = 1 << 3,  /* part of a datagram */
	PACKET_HEADLESS = 1 << 4,  /* a fragment without the transport header; ports come from the first one */
	PACKET_V6 = 1 << 5,
	PACKET_UNTRANSLATE = 1 << 6, /* comes from the backend of `service`: the source becomes `frontend` */
	PACKET_OUTSIDE = 1 << 7,   /* a client outside addressed `frontend`: the backend's side puts it back */
	PACKET_BOUND = 1 << 8,     /* the client's port is another one towards the backend: a binding of `nat` */
	PACKET_DIRECT = 1 << 9,    /* the backend's node is to answer the client itself */
	PACKET_SILENT = 1 << 10,   /* nobody there, and the client isn't told */
	/* Belongs, or could belong, to a connection that conntrack knows. */
	PACKET_TRACKED = PACKET_PORTS | PACKET_ECHO | PACKET_ERROR,
};

struct packet {
	struct tuple t;
	union {
		struct tuple inner;
		struct {       /* of a packet that isn't an error, while it is translated */
			struct end backend;
			struct end source;     /* who calls the backend */
		};
	};
	struct end frontend;   /* with service != 0: what the client addressed */
	__u32 service;
	__u32 len;             /* from the network header on */
	__u32 wire_len;        /* the same of the largest segment, if the device still has to cut it */
	__u32 endpoint;        /* whose policy is asked: id and identity */
	identity_t identity;
	identity_t peer;       /* the other side */
	__u32 peer_flags;      /* enum remote_flag */
	rule_id_t rule;
	__u32 epoch;           /* of the policy, read before any row that decides */
	__u16 l4;              /* offsets from the start of the frame */
	__u16 inner_l3;
	__u16 inner_l4;
	__u16 flags;           /* enum packet_flag */
	__u8 direction;        /* enum direction, relative to the endpoint */
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 ttl;
	__u8 ct_state;         /* enum ct_state */
	__u8 report;           /* a trace event is due */
};

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

#ifndef IPPROTO_SCTP
#define IPPROTO_SCTP 132
#endif

/* skb->mark of packets that we hand to the stack or to a device whose program must know. */
enum mark_kind {
	MARK_MASK = 0xff,
	MARK_IDENTITY = 0xf1,    /* mark >> 8 is the source identity */
	MARK_TUNNEL_KEY = 0xf2,  /* on its way to the overlay device, tunnel key set */
	MARK_ANSWER = 0xf4,      /* ours and finished (ARP, ND, refusals, what a service translated): not looked at again */
	MARK_REPLY = 0xf5,       /* a pod's to a service's client outside, by the stack; mark >> 8 is the source identity */
};

static __always_inline __u32 mark_identity(identity_t identity)
{
	return identity << 8 | MARK_IDENTITY;
}

#define L3_OFFSET ETH_HLEN

struct frame_macs {
	mac_t dst;
	mac_t src;
};

static __always_inline bool is_v6(const struct packet *p)
{
	return p->flags & PACKET_V6;
}
