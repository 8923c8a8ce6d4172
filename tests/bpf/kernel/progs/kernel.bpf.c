// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
// Small programs and maps of every kind that the tests of fimbria.kernel use.
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#define MAP(name, kind, entries, K, V, extra)                                                                          \
	struct {                                                                                                       \
		__uint(type, kind);                                                                                    \
		__uint(max_entries, entries);                                                                          \
		__uint(map_flags, extra);                                                                              \
		__type(key, K);                                                                                        \
		__type(value, V);                                                                                      \
	} name SEC(".maps")

MAP(m_hash, BPF_MAP_TYPE_HASH, 8192, __u64, __u64, 0);
MAP(m_array, BPF_MAP_TYPE_ARRAY, 4, __u32, __u64, 0);
MAP(m_percpu, BPF_MAP_TYPE_PERCPU_ARRAY, 4, __u32, __u64, 0);

struct inner {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16);
	__type(key, __u32);
	__type(value, __u32);
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH_OF_MAPS);
	__uint(max_entries, 8);
	__type(key, __u32);
	__array(values, struct inner);
} m_outer SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 65536);
} m_ring SEC(".maps");

typedef __u16 port_be_t;
typedef struct { __u8 b[6]; } mac_t;
enum colour { RED = 3, BLUE = -1 };

struct sample {
	__u64 wide;
	__s16 small;
	port_be_t port;
	_Bool flag;
	__u8 pad[3];
	char name[8];
	mac_t mac;
	__u16 list[3];
	enum colour colour;
};

// What a C compiler makes of the values that the codec's test expects.
const struct sample sample = {
	.wide = 0x1122334455667788ULL, .small = -2, .port = __builtin_bswap16(8080), .flag = 1, .name = "eth0",
	.mac = {{2, 0, 0, 0, 0, 9}}, .list = {7, 8, 9}, .colour = BLUE,
};

const volatile __u32 mark;
const volatile __s16 delta;
const volatile _Bool enabled;
const volatile __u8 mac[6];
const int table[2] = {3, 4}; // not configuration: its value is in the file

static __always_inline void count(__u32 slot)
{
	__u64 *n = bpf_map_lookup_elem(&m_array, &slot);
	__u64 *mine = bpf_map_lookup_elem(&m_percpu, &slot);

	if (n)
		__sync_fetch_and_add(n, 1);
	if (mine)
		++*mine;
}

static __always_inline int count_ipv4(struct __sk_buff *skb, __u32 slot)
{
	if (skb->protocol == __builtin_bswap16(0x0800))
		count(slot);
	return -1;
}

SEC("tc") int cls_first(struct __sk_buff *skb)
{
	return count_ipv4(skb, 0);
}

SEC("tc") int cls_second(struct __sk_buff *skb)
{
	return count_ipv4(skb, 1);
}

SEC("tc") int cls_constants(struct __sk_buff *skb)
{
	skb->mark = mark;
	return enabled ? delta + mac[5] + table[skb->len & 1] + sample.list[0] : -1;
}

SEC("tc") int cls_inner(struct __sk_buff *skb)
{
	__u32 key = 7;
	void *inner = bpf_map_lookup_elem(&m_outer, &key);
	__u32 *value = inner ? bpf_map_lookup_elem(inner, &key) : 0;

	return value ? (int)*value : -1;
}

SEC("tc") int cls_emit(struct __sk_buff *skb)
{
	__u64 *slot = bpf_ringbuf_reserve(&m_ring, 8, 0);

	if (!slot)
		return -1;
	*slot = skb->len;
	bpf_ringbuf_submit(slot, 0);
	return 0;
}

SEC("cgroup/connect4") int sock_connect4(struct bpf_sock_addr *ctx)
{
	count(2);
	return ctx->user_port != __builtin_bswap16(9); // refuses the discard port
}

SEC("xdp") int xdp_count(struct xdp_md *ctx)
{
	count(3);
	return XDP_PASS;
}

SEC("sk_lookup") int lookup_refuse(struct bpf_sk_lookup *ctx)
{
	return ctx->local_port == 7777 ? SK_DROP : SK_PASS;
}

char _license[] SEC("license") = "GPL";
