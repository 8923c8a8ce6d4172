/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* May this peer talk to this endpoint? See struct policy_key for how rules are looked up. */
#pragma once
#include "include/packet.h"
#include "lib/identity.h"
#include "maps/endpoint.h"
#include "maps/policy.h"

struct policy_query {
	addr_t addr;         /* of the peer */
	identity_t peer;
	port_be_t port;      /* of the side that didn't open the connection; ICMP: the type, in the high byte */
	__u8 direction;      /* in which it was opened */
	__u8 proto;
	rule_id_t rule;      /* out: the rule that decided */
};

enum policy_vote {
	VOTE_NONE,
	VOTE_ALLOW,
	VOTE_DENY,
};

static __always_inline enum policy_vote policy_ask(void *set, struct policy_query *q, identity_t peer, bool cidr)
{
	struct policy_key key = {
		.prefixlen = POLICY_PREFIX_FULL,
		.peer = peer,
		.direction = q->direction,
		.proto = q->proto,
		.port = q->port,
	};
	const struct policy_entry *e = bpf_map_lookup_elem(set, &key);

	if (!e)
		return VOTE_NONE;
	q->rule = e->rule;
	if (cidr && q->peer != IDENTITY_WORLD)
		return e->flags & POLICY_ENTRY_CIDR_ANY_PEER ? VOTE_ALLOW : VOTE_NONE;
	return e->verdict == POLICY_VERDICT_ALLOW ? VOTE_ALLOW : VOTE_DENY;
}

static __always_inline enum policy_vote policy_ask_cidr(void *set, struct policy_query *q)
{
	struct prefix_key key = {.prefixlen = sizeof(addr_t) * 8, .addr = q->addr};
	const struct cidr *cidr = bpf_map_lookup_elem(&cidrs, &key);

	return cidr ? policy_ask(set, q, cidr->identity, true) : VOTE_NONE;
}

/* Reserved identities are compiled into every set from the start; only allocated ones come and go. */
static __always_inline bool identity_compiled(identity_t peer)
{
	if (peer < IDENTITY_MIN_ALLOCATED || peer >= IDENTITY_SCOPE_CIDR)
		return true;
	return bpf_map_lookup_elem(&identities, &peer) != NULL;
}

/* Returns 0 or the reason to drop. */
__noinline int policy(struct endpoint *ep, struct policy_query *q)
{
	if (!ep || !q)
		return DROP_POLICY_DENIED;
	bool egress = q->direction == DIRECTION_EGRESS;
	__u32 enforced = egress ? ENDPOINT_ENFORCE_EGRESS : ENDPOINT_ENFORCE_INGRESS;
	__u32 has_cidrs = egress ? ENDPOINT_CIDR_EGRESS : ENDPOINT_CIDR_INGRESS;
	__u32 number = ep->policy_set;
	rule_id_t allowed_by = 0;
	enum policy_vote vote, allow = VOTE_NONE;

	q->rule = 0;
	/* The node must reach its pods: probes, and all that the kubelet does. */
	if (!(ep->flags & enforced) || (!egress && q->peer == IDENTITY_HOST))
		return 0;
	if (!identity_compiled(q->peer))
		return DROP_INVALID_IDENTITY;
	void *set = bpf_map_lookup_elem(&policy_sets, &number);

	if (!set)
		return DROP_POLICY_DENIED;
	vote = policy_ask(set, q, q->peer, false);
	if (vote == VOTE_DENY)
		return DROP_POLICY_DENY;
	if (vote == VOTE_ALLOW) {
		allow = vote;
		allowed_by = q->rule;
	}
	if (ep->flags & has_cidrs) {
		vote = policy_ask_cidr(set, q);
		if (vote == VOTE_DENY)
			return DROP_POLICY_DENY;
		if (vote == VOTE_ALLOW && !allow) {
			allow = vote;
			allowed_by = q->rule;
		}
	}
	vote = policy_ask(set, q, 0, false);
	if (vote == VOTE_DENY)
		return DROP_POLICY_DENY;
	if (vote == VOTE_ALLOW && !allow) {
		allow = vote;
		allowed_by = q->rule;
	}
	q->rule = allowed_by;
	return allow ? 0 : DROP_POLICY_DENIED;
}
