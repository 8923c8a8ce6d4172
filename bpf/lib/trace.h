/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Metrics and events. Every drop ends in drop(). */
#pragma once
#include "include/config.h"
#include "include/packet.h"
#include "maps/event.h"

static __always_inline void count(__u32 reason, __u32 direction, __u32 bytes)
{
	__u32 index = (reason & 0xff) * 2 + (direction & 1);
	struct metric *m = bpf_map_lookup_elem(&metrics, &index);

	if (m) {
		m->packets++;
		m->bytes += bytes;
	}
}

static __always_inline void event_ports(struct event *e, const struct packet *p)
{
	bool icmp = p->t.proto == IPPROTO_ICMP || p->t.proto == IPPROTO_ICMPV6;

	e->sport = icmp ? bpf_htons(p->icmp_type) : p->t.sport;
	e->dport = icmp ? bpf_htons(p->icmp_code) : p->t.dport;
}

/* kind: enum event_type << 8 | reason, trace point or verdict. */
__noinline int emit_event(struct packet *p, __u32 ifindex, __u32 kind)
{
	if (!p)
		return 0;
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e) {
		count(METRIC_EVENT_LOST, p->direction, 0);
		return 0;
	}
	bool egress = p->direction == DIRECTION_EGRESS;

	e->time = bpf_ktime_get_ns();
	e->type = kind >> 8;
	e->reason = kind & 0xff;
	e->direction = p->direction;
	e->ct_state = p->ct_state;
	e->proto = p->t.proto;
	e->tcp_flags = p->tcp_flags;
	e->pad = 0;
	e->packet_len = p->len;
	e->endpoint = p->endpoint;
	e->source = egress ? p->identity : p->peer;
	e->destination = egress ? p->peer : p->identity;
	e->ifindex = ifindex;
	e->rule = p->rule;
	e->saddr = p->t.saddr;
	e->daddr = p->t.daddr;
	event_ports(e, p);
	e->service = p->service;
	bpf_ringbuf_submit(e, 0);
	return 0;
}

static __always_inline void emit(struct __sk_buff *skb, struct packet *p, __u32 kind)
{
	emit_event(p, skb->ifindex, kind);
}

/* The only way to drop a packet that somebody could miss. */
static __always_inline int drop(struct __sk_buff *skb, struct packet *p, int reason)
{
	count(reason, p->direction, p->len);
	if (cfg_events)
		emit(skb, p, EVENT_DROP << 8 | (reason & 0xff));
	return TC_ACT_SHOT;
}

/* The packet is on its way to `point`. */
static __always_inline void trace(struct __sk_buff *skb, struct packet *p, __u32 point)
{
	count(METRIC_FORWARDED, p->direction, p->len);
	if (cfg_events && p->report)
		emit(skb, p, EVENT_TRACE << 8 | point);
	p->report = false;
}
