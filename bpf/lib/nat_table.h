/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Rows of `nat`, also those that only another version's table has. */
#pragma once
#include "include/common.h"
#include "maps/nat.h"

/* As ct_adopt(): a row that only another table has becomes one of our own. Returns whether there is one now. */
static __noinline bool nat_adopt(const struct nat_key *key)
{
	for (__u32 i = 0; i < OTHER_TABLES; i++) {
		__u32 place = i;
		void *table = bpf_map_lookup_elem(&nat_other, &place);

		if (!table)
			return false;
		const struct nat_entry *e = bpf_map_lookup_elem(table, key);

		if (e) {
			/* Another CPU may be first. */
			bpf_map_update_elem(&nat, key, e, BPF_NOEXIST);
			return true;
		}
	}
	return false;
}

static __always_inline struct nat_entry *nat_find(const struct nat_key *key)
{
	struct nat_entry *e = bpf_map_lookup_elem(&nat, key);

	if (!e && nat_adopt(key))
		e = bpf_map_lookup_elem(&nat, key);
	return e;
}
