/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
#pragma once
#include "include/common.h"
#include "types/conntrack.h"

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct ct_key);
	__type(value, struct ct_entry);
} conntrack SEC(".maps");

/* The kernel doesn't compare max_entries of an inner hash with this template's. Types, not sizes: to
 * Linux 6.1 a map with type information is no equal of a template without. */
struct conntrack_table {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct ct_key);
	__type(value, struct ct_entry);
};

/* While programs of two versions run, each with a table of its own size: those tables, from the first place on. Else empty.
 * Shared by both versions. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, OTHER_TABLES);
	__type(key, __u32);
	__array(values, struct conntrack_table);
} conntrack_other SEC(".maps");
