// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* lib/service.h by itself: selects by the packet, whose bytes are a frontend key and a random number. */
#include "lib/service.h"

struct question {
	struct frontend_key key;
	__u32 random;
};

enum answer {
	ANSWER_NO_FRONTEND = -1,
	ANSWER_NO_BACKEND = -2,
	ANSWER_SHORT = -3,
};

/* Returns the backend's id, and puts its row where the key was. */
SEC("tc")
int service_test(struct __sk_buff *skb)
{
	struct question q;
	__u32 id = 0;

	if (bpf_skb_load_bytes(skb, 0, &q, sizeof(q)))
		return ANSWER_SHORT;

	const struct frontend *frontend = service_lookup(&q.key);

	if (!frontend)
		return ANSWER_NO_FRONTEND;

	const struct backend *backend = service_select(frontend, q.random, &id);

	if (!backend)
		return ANSWER_NO_BACKEND;
	return bpf_skb_store_bytes(skb, 0, backend, sizeof(*backend), 0) ? ANSWER_SHORT : (int)id;
}

char _license[] SEC("license") = "Dual BSD/GPL";
