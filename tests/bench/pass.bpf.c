/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Lets everything pass: a veth device takes what XDP sends from its peer only if it has an XDP program itself. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

SEC("xdp") int pass(struct xdp_md *ctx)
{
	return XDP_PASS;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
