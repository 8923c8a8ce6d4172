// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* What the far end of a veth needs in order to take frames that XDP sends. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

SEC("xdp.frags")
int pass(struct xdp_md *ctx)
{
	return XDP_PASS;
}
