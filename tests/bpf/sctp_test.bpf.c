// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* lib/sctp.h by itself: both ports are set, one after the other. */
#include "include/config.h"
#include "lib/rewrite.h"

const volatile __u16 cfg_sport = 0;
const volatile __u16 cfg_dport = 0;

SEC("tc")
int set_ports(struct __sk_buff *skb)
{
	struct packet p = {};
	int reason = parse(skb, &p);

	if (reason)
		return reason;
	struct end source = {.addr = p.t.saddr, .port = bpf_htons(cfg_sport)};
	struct end destination = {.addr = p.t.daddr, .port = bpf_htons(cfg_dport)};

	reason = rewrite(skb, &p, &source, END_SOURCE);
	return reason ? reason : rewrite(skb, &p, &destination, END_DESTINATION);
}

char _license[] SEC("license") = "Dual BSD/GPL";
