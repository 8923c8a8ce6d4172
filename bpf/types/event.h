/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
#pragma once
#include "base.h"

/* Numbers are those of the Hubble flow API (flow.DropReason), so that users' tools know them. */
enum drop_reason {
	DROP_INVALID_SOURCE_MAC = 130,
	DROP_INVALID_SOURCE_IP = 132,
	DROP_POLICY_DENIED = 133,        /* default deny */
	DROP_INVALID_PACKET = 134,
	DROP_CT_INVALID_HEADER = 135,
	DROP_CT_UNKNOWN_L4_PROTOCOL = 137,
	DROP_CT_CANNOT_CREATE = 138,
	DROP_UNSUPPORTED_L3_PROTOCOL = 139,
	DROP_MISSED_TAIL_CALL = 140,
	DROP_WRITE_ERROR = 141,
	DROP_NO_TUNNEL_KEY = 147,
	DROP_STALE_OR_UNROUTABLE_IP = 151,
	DROP_NO_LOCAL_ENDPOINT = 152,
	DROP_L3_CHECKSUM = 153,
	DROP_L4_CHECKSUM = 154,
	DROP_CT_MAP_INSERTION_FAILED = 155,
	DROP_INVALID_IPV6_EXTENSION = 156,
	DROP_FRAGMENTATION_NOT_SUPPORTED = 157,
	DROP_SERVICE_NO_BACKEND = 158,
	DROP_NO_TUNNEL_ENDPOINT = 160,
	DROP_UNSUPPORTED_L2_PROTOCOL = 166,
	DROP_NAT_NO_MAPPING = 167,       /* masquerading ports exhausted */
	DROP_NAT_UNSUPPORTED_PROTOCOL = 168,
	DROP_FIB_LOOKUP_FAILED = 169,
	DROP_INVALID_IDENTITY = 171,
	DROP_FRAGMENT_NOT_FOUND = 175,
	DROP_SERVICE_SOURCE_RANGE = 177, /* the Service's source ranges don't let this client in */
	DROP_POLICY_DENY = 181,          /* an explicit deny rule */
	DROP_INVALID_VNI = 183,
	DROP_TTL_EXCEEDED = 196,         /* the sender is told */
	DROP_EP_NOT_READY = 203,
};

enum event_type {
	EVENT_DROP = 1,
	EVENT_TRACE = 2,
	EVENT_POLICY_VERDICT = 3,
};

/* Numbers are those of flow.TraceObservationPoint. */
enum trace_point {
	TRACE_TO_HOST = 2,
	TRACE_TO_STACK = 3,
	TRACE_TO_OVERLAY = 4,
	TRACE_FROM_ENDPOINT = 5,
	TRACE_FROM_HOST = 7,
	TRACE_FROM_OVERLAY = 9,
	TRACE_FROM_NETWORK = 10,
	TRACE_TO_NETWORK = 11,
	TRACE_TO_ENDPOINT = 101,
};

/* Numbers are those of flow.TraceReason. */
enum ct_state {
	CT_STATE_UNKNOWN = 0,
	CT_STATE_NEW = 1,
	CT_STATE_ESTABLISHED = 2,
	CT_STATE_REPLY = 3,
	CT_STATE_RELATED = 4,
};

/* events: ring buffer of struct event */
struct event {
	ktime_ns_t time;
	__u8 type;           /* enum event_type */
	__u8 reason;         /* EVENT_DROP: enum drop_reason; EVENT_TRACE: enum trace_point; EVENT_POLICY_VERDICT: enum policy_verdict */
	__u8 direction;      /* enum direction, relative to `endpoint` */
	__u8 ct_state;       /* enum ct_state */
	__u8 proto;
	__u8 tcp_flags;
	__u16 pad;
	__u32 packet_len;    /* bytes, from the network header on */
	__u32 endpoint;      /* id; 0: none */
	identity_t source;
	identity_t destination;
	ifindex_t ifindex;
	rule_id_t rule;
	addr_t saddr;        /* all zero: the packet could not be parsed */
	addr_t daddr;
	port_be_t sport;     /* ICMP: type */
	port_be_t dport;     /* ICMP: code */
	__u32 service;       /* translated from this service's frontend; 0: none */
};
_Static_assert(sizeof(struct event) == 80, "struct event");

/* metrics: per-CPU array; index = reason * 2 + direction. Reason 0 is forwarded, 1 is "event lost: ring full". */
#define METRIC_REASONS 256
enum metric_reason {
	METRIC_FORWARDED = 0,
	METRIC_EVENT_LOST = 1,
};

struct metric {
	__u64 packets;
	__u64 bytes;
};

/* runtime: array of one. What changes while programs stay loaded. */
struct runtime {
	/* Bumped after any change that could turn a verdict: connections are judged again at their next packet. 0: no
	 * verdict is kept. */
	__u32 policy_epoch;
	__u32 pad;
};
