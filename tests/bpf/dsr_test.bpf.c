// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* lib/dsr.h by itself. */
#include "include/config.h"
#include "lib/dsr.h"

const volatile addr_t cfg_frontend4 = {};
const volatile addr_t cfg_frontend6 = {};
const volatile __u16 cfg_frontend_port = 0;

enum answer {
	ANSWER_UNREAD = -10,
	ANSWER_OTHER_FRONTEND = -11,
	ANSWER_OTHER_LENGTH = -12,
};

static __always_inline void wanted(struct end *frontend, bool v6)
{
	config_addr(&frontend->addr, v6 ? &cfg_frontend6 : &cfg_frontend4);
	frontend->port = bpf_htons(cfg_frontend_port);
}

/* What `p` says after a change must be what a fresh look at the packet says. */
static __always_inline bool still_right(struct __sk_buff *skb, struct packet *p)
{
	__u32 len = p->len, l4 = p->l4, dport = p->t.dport;

	__builtin_memset(p, 0, sizeof(*p));
	return !parse(skb, p) && p->len == len && p->l4 == l4 && p->t.dport == dport;
}

SEC("tc")
int add(struct __sk_buff *skb)
{
	struct packet p = {};
	struct end frontend = {};

	if (parse(skb, &p))
		return ANSWER_UNREAD;
	wanted(&frontend, is_v6(&p));
	int reason = dsr_add(skb, &p, &frontend);

	return reason || still_right(skb, &p) ? reason : ANSWER_OTHER_LENGTH;
}

SEC("tc")
int take(struct __sk_buff *skb)
{
	struct packet p = {};
	struct end frontend = {}, expected = {};

	if (parse(skb, &p))
		return ANSWER_UNREAD;
	int found = dsr_take(skb, &p, &frontend);

	if (!still_right(skb, &p))
		return ANSWER_OTHER_LENGTH;
	wanted(&expected, is_v6(&p));
	if (found == DSR_TAKEN && (!addr_equal(&frontend.addr, &expected.addr) || frontend.port != expected.port))
		return ANSWER_OTHER_FRONTEND;
	return found;
}

char _license[] SEC("license") = "Dual BSD/GPL";
