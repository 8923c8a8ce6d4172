// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
// A program that the verifier refuses: it reads the packet without checking its end.
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

SEC("tc") int unchecked(struct __sk_buff *skb)
{
	return *(__u8 *)(long)skb->data;
}

char _license[] SEC("license") = "GPL";
