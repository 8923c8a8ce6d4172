// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* Services by socket: the address is exchanged when a socket names its peer, so that no packet needs translation.
 *
 *   connect, sendmsg       frontend -> backend, remembered in sock_revnat
 *   recvmsg, getpeername   backend -> frontend
 *   bind                   the node's processes can't have a Service's node port
 *
 * IPv6 sockets reach IPv4 frontends by IPv4-mapped addresses; as every address is stored that way, they need nothing
 * of their own. (Their sendmsg arrives at the IPv4 hook, their recvmsg at the IPv6 one.) */
#include <linux/errno.h>

#include "include/common.h"
#include "lib/service.h"
#include "maps/socket.h"

/* The cookie of the node's own network namespace: there, and only there, loopback addresses are the node's. */
const volatile __u64 cfg_host_netns = 0;
/* Translate in pods, too; otherwise theirs are translated by packet, and their sidecars see addresses as they are. */
const volatile bool cfg_socket_pods = true;

enum sock_result {
	SOCK_PASS = 1,
	SOCK_REFUSE = 0,
};

struct peer {
	addr_t addr;
	port_be_t port;
};

static __always_inline struct peer peer_read4(const struct bpf_sock_addr *ctx)
{
	struct peer peer = {.port = (port_be_t)ctx->user_port};

	addr_from_v4(&peer.addr, ctx->user_ip4);
	return peer;
}

static __always_inline struct peer peer_read6(const struct bpf_sock_addr *ctx)
{
	return (struct peer){
		.addr = {.w = {ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]}},
		.port = (port_be_t)ctx->user_port,
	};
}

static __always_inline void peer_write4(struct bpf_sock_addr *ctx, const addr_t *addr, port_be_t port)
{
	ctx->user_ip4 = addr->w[3];
	ctx->user_port = port;
}

static __always_inline void peer_write6(struct bpf_sock_addr *ctx, const addr_t *addr, port_be_t port)
{
	ctx->user_ip6[0] = addr->w[0];
	ctx->user_ip6[1] = addr->w[1];
	ctx->user_ip6[2] = addr->w[2];
	ctx->user_ip6[3] = addr->w[3];
	ctx->user_port = port;
}

static __always_inline bool sock_has_services(const struct bpf_sock_addr *ctx)
{
	__u32 proto = ctx->protocol;

	return proto == IPPROTO_TCP || proto == IPPROTO_UDP || proto == IPPROTO_SCTP;
}

/* A connecting socket takes any backend; one that names its peer with every datagram keeps the one it had. With
 * affinity the whole network namespace does. */
static __always_inline int sock_select(struct service_query *q, __u64 cookie, bool connecting)
{
	struct sock_choice_key key = {.cookie = cookie, .service = q->frontend.service};
	struct sock_choice now;
	int result;

	if (connecting || q->frontend.flags & FRONTEND_AFFINITY)
		return service_choose(q);
	struct sock_choice *kept = bpf_map_lookup_elem(&sock_choices, &key);

	if (kept) {
		q->slot = kept->slot;
		q->backend = kept->backend;
		if (service_kept(q) == SERVICE_FOUND)
			return SERVICE_FOUND;
	}
	result = service_choose(q);
	if (result == SERVICE_FOUND) {
		now.slot = q->slot;
		now.backend = q->backend;
		bpf_map_update_elem(&sock_choices, &key, &now, BPF_ANY);
	}
	return result;
}

static __always_inline struct sock_revnat_key revnat_key(__u64 cookie, const addr_t *addr, port_be_t port)
{
	return (struct sock_revnat_key){.cookie = cookie, .addr = *addr, .port = port};
}

/* Replies from `backend` shall seem to come from `to`. Steady traffic only reads. */
static __always_inline void revnat_remember(__u64 cookie, const struct end *backend, const struct peer *to,
					    __u32 service)
{
	struct sock_revnat_key key = revnat_key(cookie, &backend->addr, backend->port);
	struct sock_revnat now = {.addr = to->addr, .port = to->port, .service = service};
	const struct sock_revnat *old = bpf_map_lookup_elem(&sock_revnat, &key);

	if (!old || old->service != service || old->port != now.port || !addr_equal(&old->addr, &now.addr))
		bpf_map_update_elem(&sock_revnat, &key, &now, BPF_ANY);
}

/* The socket now talks to this address itself; it may have been a backend for it before. */
static __always_inline void revnat_forget(__u64 cookie, const struct peer *to)
{
	struct sock_revnat_key key = revnat_key(cookie, &to->addr, to->port);

	if (bpf_map_lookup_elem(&sock_revnat, &key))
		bpf_map_delete_elem(&sock_revnat, &key);
}

static __always_inline bool addr_is_loopback(const addr_t *a)
{
	if (addr_is_v4(a))
		return (addr_to_v4(a) & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return !a->w[0] && !a->w[1] && !a->w[2] && a->w[3] == bpf_htonl(1);
}

/* Connecting to the unspecified address is connecting to oneself. */
static __always_inline void loopback_if_unspecified(addr_t *a)
{
	if (!addr_is_unspecified(a))
		return;
	a->w[3] = addr_is_v4(a) ? bpf_htonl(0x7f000001) : bpf_htonl(1);
}

/* False: sockets of this network namespace mean the address itself. */
static __always_inline bool sock_may_mean_service(struct service_query *q, bool host)
{
	loopback_if_unspecified(&q->addr);
	bool loopback = addr_is_loopback(&q->addr);

	if (!host)
		return cfg_socket_pods && !loopback;
	if (loopback)
		q->owner = OWNER_THIS_NODE;
	return true;
}

/* A pod's connecting socket with a port of its own choice is left to the packet path. Two of them may call two services
 * that share a backend: to the kernel it would be one connection. TCP's second connect() would fail with EADDRNOTAVAIL for
 * no reason that the application could see, and one of two UDP sockets would get all answers. By packet, the second gets
 * another port on the way. */
static __always_inline bool sock_is_bound(const struct bpf_sock_addr *ctx, bool connecting)
{
	const struct bpf_sock *sk = ctx->sk;

	return connecting && sk && sk->src_port;
}

/* A pod's socket is left to the packet path, too, where a service is for some clients only: most have no address before
 * they connect, their packets do. */
static __always_inline bool sock_is_for_packets(const struct bpf_sock_addr *ctx, const struct service_query *q,
						bool connecting)
{
	return q->frontend.flags & FRONTEND_SOURCE_RANGES || sock_is_bound(ctx, connecting);
}

/* The node's own processes have no packet path. They are taken for the node's address, whatever a socket has for its own:
 * that may be from an earlier peer. */
static __always_inline bool sock_admits(const struct service_query *q)
{
	addr_t node;

	if (!(q->frontend.flags & FRONTEND_SOURCE_RANGES))
		return true;
	node_addr(&node, !addr_is_v4(&q->addr));
	return !addr_is_unspecified(&node) && service_admits_addr(&q->frontend, &node);
}

/* Finds the backend to talk to instead of `to`, in q->to. SERVICE_NONE: `to` is no service's, or not for this socket. */
static __always_inline int sock_forward(struct bpf_sock_addr *ctx, const struct peer *to, bool connecting,
					struct service_query *q)
{
	int result;

	if (!sock_has_services(ctx))
		return SERVICE_NONE;
	__u64 cookie = bpf_get_socket_cookie(ctx);
	__u64 space = bpf_get_netns_cookie(ctx);
	bool host = space == cfg_host_netns;

	q->client.w[0] = space;
	q->client.w[1] = space >> 32;
	q->addr = to->addr;
	q->port = to->port;
	q->proto = ctx->protocol;
	q->flags = QUERY_INSIDE | QUERY_SOCKET;
	if (!sock_may_mean_service(q, host) || service_find(q) == SERVICE_NONE || service_exempts(q) ||
	    (!host && sock_is_for_packets(ctx, q, connecting))) {
		revnat_forget(cookie, to);
		return SERVICE_NONE;
	}
	if (!sock_admits(q)) {
		bpf_set_retval(-EPERM);
		return SERVICE_SILENT;
	}
	result = sock_select(q, cookie, connecting);
	if (result == SERVICE_FOUND)
		revnat_remember(cookie, &q->to, to, q->frontend.service);
	else
		bpf_set_retval(-ECONNREFUSED);
	return result;
}

static __always_inline int forward4(struct bpf_sock_addr *ctx, bool connecting)
{
	struct peer to = peer_read4(ctx);
	struct service_query q = {};
	int result = sock_forward(ctx, &to, connecting, &q);

	if (result == SERVICE_FOUND)
		peer_write4(ctx, &q.to.addr, q.to.port);
	return result <= SERVICE_FOUND ? SOCK_PASS : SOCK_REFUSE;
}

static __always_inline int forward6(struct bpf_sock_addr *ctx, bool connecting)
{
	struct peer to = peer_read6(ctx);
	struct service_query q = {};
	int result = sock_forward(ctx, &to, connecting, &q);

	if (result == SERVICE_FOUND)
		peer_write6(ctx, &q.to.addr, q.to.port);
	return result <= SERVICE_FOUND ? SOCK_PASS : SOCK_REFUSE;
}

static __always_inline const struct sock_revnat *sock_reverse(struct bpf_sock_addr *ctx, const struct peer *from)
{
	struct sock_revnat_key key;

	if (!sock_has_services(ctx))
		return NULL;
	key = revnat_key(bpf_get_socket_cookie(ctx), &from->addr, from->port);
	return bpf_map_lookup_elem(&sock_revnat, &key);
}

static __always_inline int reverse4(struct bpf_sock_addr *ctx)
{
	struct peer from = peer_read4(ctx);
	const struct sock_revnat *frontend = sock_reverse(ctx, &from);

	if (frontend)
		peer_write4(ctx, &frontend->addr, frontend->port);
	return SOCK_PASS;
}

static __always_inline int reverse6(struct bpf_sock_addr *ctx)
{
	struct peer from = peer_read6(ctx);
	const struct sock_revnat *frontend = sock_reverse(ctx, &from);

	if (frontend)
		peer_write6(ctx, &frontend->addr, frontend->port);
	return SOCK_PASS;
}

SEC("cgroup/connect4")
int sock_connect4(struct bpf_sock_addr *ctx)
{
	return forward4(ctx, true);
}

SEC("cgroup/connect6")
int sock_connect6(struct bpf_sock_addr *ctx)
{
	return forward6(ctx, true);
}

/* An IPv6 socket connected to an IPv4-mapped peer gets here with every send(), as if it had named its peer anew. */
static __always_inline bool names_its_peer4(struct bpf_sock_addr *ctx)
{
	const struct bpf_sock *sk = ctx->sk;

	return sk && sk->dst_ip4 == ctx->user_ip4 && sk->dst_port == (port_be_t)ctx->user_port;
}

SEC("cgroup/sendmsg4")
int sock_sendmsg4(struct bpf_sock_addr *ctx)
{
	return names_its_peer4(ctx) ? SOCK_PASS : forward4(ctx, false);
}

SEC("cgroup/sendmsg6")
int sock_sendmsg6(struct bpf_sock_addr *ctx)
{
	return forward6(ctx, false);
}

SEC("cgroup/recvmsg4")
int sock_recvmsg4(struct bpf_sock_addr *ctx)
{
	return reverse4(ctx);
}

SEC("cgroup/recvmsg6")
int sock_recvmsg6(struct bpf_sock_addr *ctx)
{
	return reverse6(ctx);
}

SEC("cgroup/getpeername4")
int sock_getpeername4(struct bpf_sock_addr *ctx)
{
	return reverse4(ctx);
}

SEC("cgroup/getpeername6")
int sock_getpeername6(struct bpf_sock_addr *ctx)
{
	return reverse6(ctx);
}

/* Does a Service have this node port in the family of `any`, the unspecified address? */
static __always_inline bool is_node_port(const struct bpf_sock_addr *ctx, const addr_t *any, port_be_t port)
{
	struct frontend_key key = {.addr = *any, .port = port, .proto = ctx->protocol};

	return bpf_map_lookup_elem(&frontends, &key);
}

/* What a process of the node bound there would never be called: every way to it leads to the Service. */
static __always_inline int sock_bind(struct bpf_sock_addr *ctx, const struct peer *at)
{
	__u16 port = bpf_ntohs(at->port);
	addr_t any4 = {.w = {0, 0, bpf_htonl(0xffff), 0}}, any6 = {};
	bool all = addr_is_zero(&at->addr);

	if (port < cfg_nodeport_min || port > cfg_nodeport_max || !sock_has_services(ctx) ||
	    bpf_get_netns_cookie(ctx) != cfg_host_netns)
		return SOCK_PASS;
	/* An IPv6 socket on all addresses has those of IPv4 too. */
	if (!is_node_port(ctx, addr_is_v4(&at->addr) ? &any4 : &any6, at->port) &&
	    !(all && is_node_port(ctx, &any4, at->port)))
		return SOCK_PASS;
	if (!addr_is_unspecified(&at->addr) && !addr_is_loopback(&at->addr) &&
	    owner_of(ipcache_lookup(&at->addr)) != OWNER_THIS_NODE)
		return SOCK_PASS;
	bpf_set_retval(-EADDRINUSE);
	return SOCK_REFUSE;
}

SEC("cgroup/bind4")
int sock_bind4(struct bpf_sock_addr *ctx)
{
	struct peer at = peer_read4(ctx);

	return sock_bind(ctx, &at);
}

SEC("cgroup/bind6")
int sock_bind6(struct bpf_sock_addr *ctx)
{
	struct peer at = peer_read6(ctx);

	return sock_bind(ctx, &at);
}

char _license[] SEC("license") = "Dual BSD/GPL";
