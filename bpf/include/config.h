/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Settings that every packet program has. Those of a single stage stand in that stage's header. All are constants to
 * the verifier, which removes what is off; the loader must set each one that an object contains. */
#pragma once
#include "include/common.h"

/* Deliver to pods with bpf_redirect_peer(); otherwise packets pass through the host stack and `to_pod` judges them. */
const volatile bool cfg_redirect_peer = true;

/* Write events to the ring buffer. Metrics are counted in any case. */
const volatile bool cfg_events = true;

/* A connection that goes on is reported again after this time. */
const volatile __u64 cfg_trace_interval_ns = 5 * NSEC_PER_SEC;

/* How long an idle established TCP connection is remembered. */
const volatile __u64 cfg_tcp_established_ns = 8 * 3600 * NSEC_PER_SEC;

/* Word by word: a plain copy would lose `volatile`, and the compiler take the value for the zero in the source. */
static __always_inline void config_addr(addr_t *to, const volatile addr_t *from)
{
	to->w[0] = from->w[0];
	to->w[1] = from->w[1];
	to->w[2] = from->w[2];
	to->w[3] = from->w[3];
}

static __always_inline bool config_addr_is(const volatile addr_t *setting, const addr_t *a)
{
	return setting->w[3] == a->w[3] && setting->w[2] == a->w[2] && setting->w[1] == a->w[1] &&
	       setting->w[0] == a->w[0];
}
