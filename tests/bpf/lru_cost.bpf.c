// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* What a table of connections costs by kind of LRU: see lru_cost.py. */
#include "include/common.h"
#include "types/conntrack.h"

const volatile __u64 cfg_hot = 0;

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct ct_key);
	__type(value, struct ct_entry);
} common SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_COMMON_LRU);
	__type(key, struct ct_key);
	__type(value, struct ct_entry);
} apart SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

static __always_inline __u64 *counter(__u32 which)
{
	return bpf_map_lookup_elem(&counters, &which);
}

static __always_inline void key_of(struct ct_key *key, __u64 group, __u64 number)
{
	__builtin_memset(key, 0, sizeof(*key));
	__builtin_memcpy(key->local.b, &group, sizeof(group));
	__builtin_memcpy(key->remote.b, &number, sizeof(number));
}

static __always_inline int insert(void *map)
{
	struct ct_entry e = {};
	struct ct_key key;
	__u64 *next = counter(0);

	if (!next)
		return -1;
	key_of(&key, 1 + bpf_get_smp_processor_id(), (*next)++);
	return bpf_map_update_elem(map, &key, &e, BPF_ANY) ? -1 : 0;
}

/* One of the hot connections: made if it isn't there, as a packet would do. Counts how often. */
static __always_inline int touch(void *map)
{
	struct ct_entry e = {}, *found;
	struct ct_key key;
	__u64 *next = counter(1);

	if (!next || !cfg_hot)
		return -1;
	key_of(&key, 1000 + bpf_get_smp_processor_id(), (*next)++ % cfg_hot);
	found = bpf_map_lookup_elem(map, &key);
	if (found) {
		found->expires++;
		return 0;
	}
	return bpf_map_update_elem(map, &key, &e, BPF_ANY) ? -1 : 1;
}

SEC("tc") int insert_common(struct __sk_buff *skb) { return insert(&common); }
SEC("tc") int insert_apart(struct __sk_buff *skb) { return insert(&apart); }
SEC("tc") int touch_common(struct __sk_buff *skb) { return touch(&common); }
SEC("tc") int touch_apart(struct __sk_buff *skb) { return touch(&apart); }

char _license[] SEC("license") = "Dual BSD/GPL";
