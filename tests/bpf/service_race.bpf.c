// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* Two CPUs choose for the same clients at the same moment, one client after the other. The packet says which of the two this
 * run is; what each chose stands in `chosen`. */
#include "lib/service.h"

#define ROUNDS 2000
/* How long one waits for the other, who may not run at all for a while. */
#define PATIENCE 20000
#define TOO_SHORT -1

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, ROUNDS);
	__type(key, __u32);
	__type(value, __u64);
} arrived SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2 * ROUNDS);
	__type(key, __u32);
	__type(value, __u32);
} chosen SEC(".maps");

static long is_there(__u32 turn, volatile __u64 **gate)
{
	return **gate >= 2;
}

static long one_round(__u32 round, __u32 *side)
{
	struct service_query q = {.addr = {.w = {0, 0, bpf_htonl(0xffff), bpf_htonl(0x0a600001)}},
				  .port = bpf_htons(80), .proto = IPPROTO_TCP, .flags = QUERY_INSIDE};
	__u32 at = *side * ROUNDS + round;
	volatile __u64 *gate = bpf_map_lookup_elem(&arrived, &round);
	__u32 *choice = bpf_map_lookup_elem(&chosen, &at);

	if (!gate || !choice)
		return 1;
	addr_from_v4(&q.client, round + 1);
	if (service_find(&q) != SERVICE_FOUND)
		return 1;
	__sync_fetch_and_add(gate, 1);
	bpf_loop(PATIENCE, is_there, &gate, 0);
	bool both = *gate >= 2;

	if (service_choose(&q) == SERVICE_FOUND && both)
		*choice = q.backend;
	return 0;
}

SEC("tc")
int race_test(struct __sk_buff *skb)
{
	__u8 side;

	if (bpf_skb_load_bytes(skb, 0, &side, sizeof(side)))
		return TOO_SHORT;
	__u32 which = side & 1;

	return bpf_loop(ROUNDS, one_round, &which, 0);
}

char _license[] SEC("license") = "Dual BSD/GPL";
