// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* lib/service.h by itself: a packet is a struct service_query, and comes back with the answer in it. */
#include "lib/service.h"

#define TOO_SHORT -1
#define DENIED 4

static __always_inline int select_backend(struct service_query *q)
{
	if (service_find(q) == SERVICE_NONE || service_exempts(q))
		return SERVICE_NONE;
	return service_admits(q) ? service_choose(q) : DENIED;
}

/* Returns enum service_result, or DENIED. */
SEC("tc")
int select_test(struct __sk_buff *skb)
{
	struct service_query q;
	int result;

	if (bpf_skb_load_bytes(skb, 0, &q, sizeof(q)))
		return TOO_SHORT;
	result = select_backend(&q);
	return bpf_skb_store_bytes(skb, 0, &q, sizeof(q), 0) ? TOO_SHORT : result;
}

/* The same for who remembers the backend and its slot. */
SEC("tc")
int kept_test(struct __sk_buff *skb)
{
	struct service_query q;
	int result;

	if (bpf_skb_load_bytes(skb, 0, &q, sizeof(q)))
		return TOO_SHORT;
	result = service_find(&q) == SERVICE_FOUND ? service_kept(&q) : SERVICE_NONE;
	return bpf_skb_store_bytes(skb, 0, &q, sizeof(q), 0) ? TOO_SHORT : result;
}

char _license[] SEC("license") = "Dual BSD/GPL";
