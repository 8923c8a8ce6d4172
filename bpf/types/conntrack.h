/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
#pragma once
#include "base.h"

enum ct_scope {
	CT_SCOPE_CONNECTION = 0, /* endpoint and peer, as the endpoint's backend side sees them */
	CT_SCOPE_SERVICE = 1,    /* client and a service frontend it addressed by packet; endpoint 0: a client outside */
	CT_SCOPE_HAIRPIN = 2,    /* endpoint as its own backend; the router stands for the caller as `remote` */
	CT_SCOPE_NODE = 3,       /* this node itself as the backend (`local`) of a client outside; endpoint 0 */
};

/* conntrack: struct ct_key -> struct ct_entry, LRU. One entry a connection and endpoint; both directions find it with
 * one look-up, since the key is relative to the endpoint and not to the packet. */
struct ct_key {
	addr_t local;        /* the endpoint */
	addr_t remote;
	port_be_t local_port;
	port_be_t remote_port; /* ICMP echo: the identifier is local_port for egress-opened, remote_port is 0 */
	__u8 proto;
	__u8 scope;          /* enum ct_scope */
	__u16 pad;
};
_Static_assert(sizeof(struct ct_key) == 40, "struct ct_key");

enum ct_flag {
	CT_OPENED_EGRESS = 1 << 0,   /* the endpoint opened it; otherwise the peer did */
	CT_SEEN_REPLY = 1 << 1,
	CT_FIN_FORWARD = 1 << 2,
	CT_FIN_REPLY = 1 << 3,
	CT_RST = 1 << 4,
	CT_BOUND = 1 << 5,           /* a client outside has another port towards the backend: see `nat` */
	CT_DIRECT = 1 << 6,          /* CT_SCOPE_SERVICE, endpoint 0: the backend's node answers the client itself */
};

struct ct_entry {
	ktime_ns_t expires;
	ktime_ns_t reported;     /* last trace event */
	__u32 endpoint;          /* struct endpoint.id; another id means a former owner of the address */
	rule_id_t rule;          /* the rule that allowed it */
	/* These two are one word: what the verdict holds for is never half one packet's and half another's. */
	__u32 epoch;             /* struct runtime.policy_epoch under which the verdict was reached; 0: never */
	identity_t peer;         /* identity of the remote side at that time */
	__u32 service;           /* CT_SCOPE_SERVICE: the service; CT_SCOPE_CONNECTION: reply source is translated back to it; 0: none */
	__u32 backend;           /* CT_SCOPE_SERVICE: key in backends */
	__u32 flags;             /* enum ct_flag */
	__u16 tcp_flags;         /* union of the flags reported so far; the opener's in the low byte, replies' in the high */
	port_be_t frontend_port; /* with service != 0: what the client addressed */
	addr_t frontend;
};
_Static_assert(__builtin_offsetof(struct ct_entry, epoch) % 8 == 0, "epoch and peer are one word");
