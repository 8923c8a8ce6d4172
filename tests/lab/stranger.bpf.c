// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* Somebody else's program at our hooks: passes everything on. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

SEC("tc")
int stranger(struct __sk_buff *skb)
{
	return -1;
}
