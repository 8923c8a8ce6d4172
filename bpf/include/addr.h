/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
#pragma once
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "types/base.h"

static __always_inline addr_t addr_from4(__be32 address)
{
	addr_t out = {.w = {0, 0, bpf_htonl(0xffff), address}};

	return out;
}

static __always_inline bool addr_is4(const addr_t *addr)
{
	return addr->w[0] == 0 && addr->w[1] == 0 && addr->w[2] == bpf_htonl(0xffff);
}

/* Meaningful only if addr_is4(). */
static __always_inline __be32 addr_to4(const addr_t *addr)
{
	return addr->w[3];
}

static __always_inline bool addr_eq(const addr_t *a, const addr_t *b)
{
	return a->w[0] == b->w[0] && a->w[1] == b->w[1] && a->w[2] == b->w[2] && a->w[3] == b->w[3];
}
