/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
#pragma once
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/pkt_cls.h>
#include <stddef.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "types/base.h"

/* Verdict for "the next program, or the stack": the same number for tcx (TCX_NEXT) and for clsact filters. */
#define VERDICT_NEXT TC_ACT_UNSPEC

/* Places in conntrack_other and nat_other: two former versions, one of which never got to run everywhere, and today's. */
#define OTHER_TABLES 3

#define NSEC_PER_SEC 1000000000ULL

/* Good to a tick, which is all that time-outs need, at a fraction of the price. */
static __always_inline __u64 coarse_now(void)
{
	return bpf_ktime_get_coarse_ns();
}

static __always_inline bool addr_equal(const addr_t *a, const addr_t *b)
{
	return a->w[0] == b->w[0] && a->w[1] == b->w[1] && a->w[2] == b->w[2] && a->w[3] == b->w[3];
}

static __always_inline bool addr_is_zero(const addr_t *a)
{
	return !(a->w[0] | a->w[1] | a->w[2] | a->w[3]);
}

static __always_inline bool addr_is_v4(const addr_t *a)
{
	return !(a->w[0] | a->w[1]) && a->w[2] == bpf_htonl(0xffff);
}

/* Meaningful only if addr_is_v4(). */
static __always_inline __be32 addr_to_v4(const addr_t *a)
{
	return a->w[3];
}

static __always_inline void addr_from_v4(addr_t *a, __be32 v4)
{
	a->w[0] = 0;
	a->w[1] = 0;
	a->w[2] = bpf_htonl(0xffff);
	a->w[3] = v4;
}

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
