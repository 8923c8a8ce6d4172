/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
#pragma once
#include "include/common.h"

/* Until when this node itself may have to answer a client of a service outside, CT_SCOPE_NODE. Most nodes never do, and
 * none of their packets need be looked up then. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, ktime_ns_t);
} node_serves SEC(".maps");

/* ICMP errors that this CPU has sent to the outside in the second that began at `since`. */
struct errors_sent {
	ktime_ns_t since;
	__u64 count;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct errors_sent);
} errors_sent SEC(".maps");
