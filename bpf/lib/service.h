/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Which frontend a client means, and which backend its next connection goes to. For packets (tc, XDP) and sockets alike:
 * everything that counts stands in a struct service_query. Remembering the choice is the caller's: by conntrack for
 * packets, by the socket itself for sockets.
 *
 *	struct service_query q = {.client = saddr, .client_port = sport, .addr = daddr, .port = dport, .proto = proto};
 *
 *	service_find(&q)       SERVICE_NONE: not a service's, or not for this client: the address is meant as it is
 *	service_exempts(&q)    so it is for this client inside
 *	service_admits(&q)     false: not for this client, drop without an answer (DROP_SERVICE_SOURCE_RANGE)
 *	service_choose(&q)     SERVICE_FOUND: to q.to, backend q.backend of q.frontend.service
 *	                       SERVICE_REFUSE: answer with a reset or port unreachable; SERVICE_SILENT: don't answer
 *
 * A known connection goes on while service_find() gives the same q.frontend.service and its backend's row is there. Only
 * ask for TCP, UDP and SCTP. */
#pragma once
#include "include/packet.h"
#include "lib/identity.h"
#include "maps/service.h"

/* Node ports, in host byte order. Other ports of a node's address aren't even looked up. */
const volatile __u16 cfg_nodeport_min = 30000;
const volatile __u16 cfg_nodeport_max = 32767;
/* Clients outside the cluster may use cluster IPs. */
const volatile bool cfg_external_cluster_ip = false;
/* Entries of every inner array of service_tables. */
const volatile __u32 cfg_table_size = 16381;
/* The same on all nodes of a cluster, so that each sends a connection to the same backend. */
const volatile __u32 cfg_service_seed = 0;

/* How often a choice that leads nowhere is made anew: between two writes of the agent, or in a table that lags behind. */
#define SERVICE_TRIES 4

enum service_owner {
	OWNER_ASK = 0,         /* not known yet: ipcache tells, if it matters */
	OWNER_NOBODY = 1,
	OWNER_THIS_NODE = 2,
	OWNER_OTHER_NODE = 3,
	OWNER_POD = 4,         /* or anything else that isn't a node */
};

enum query_flag {
	QUERY_INSIDE = 1 << 0, /* a pod or socket of this node; otherwise `client` is outside */
	QUERY_SOCKET = 1 << 1, /* `client` is the network namespace's cookie, in its first 8 bytes */
};

enum service_result {
	SERVICE_NONE = 0,
	SERVICE_FOUND = 1,
	SERVICE_REFUSE = 2,
	SERVICE_SILENT = 3,
};

struct service_query {
	/* The question. */
	addr_t client;
	addr_t addr;           /* what it calls */
	port_be_t client_port;
	port_be_t port;
	__u8 proto;
	__u8 flags;            /* enum query_flag */
	__u8 owner;            /* enum service_owner: whose `addr` is */
	__u8 pad;
	__u32 endpoint;        /* of the client, if it is a pod of this node (not QUERY_SOCKET) */
	/* The answer. */
	__u32 backend;
	__u32 slot;            /* where the backend was found, see service_kept() */
	struct frontend frontend;
	struct end to;
};

/* NULL: the backend is gone. For connections that chose it earlier. */
static __always_inline const struct backend *service_backend(__u32 id)
{
	return bpf_map_lookup_elem(&backends, &id);
}

static __always_inline bool addr_is_unspecified(const addr_t *a)
{
	return addr_is_zero(a) || (addr_is_v4(a) && !addr_to_v4(a));
}

/* For callers that have looked the address up. */
static __always_inline __u8 owner_of(const struct remote *remote)
{
	if (!remote)
		return OWNER_NOBODY;
	if (remote->identity == IDENTITY_HOST)
		return OWNER_THIS_NODE;
	return remote->flags & REMOTE_NODE ? OWNER_OTHER_NODE : OWNER_POD;
}

static __always_inline __u8 service_owner(struct service_query *q)
{
	if (q->owner == OWNER_ASK)
		q->owner = owner_of(ipcache_lookup(&q->addr));
	return q->owner;
}

/* The row of a node port. What another node serves from its own endpoints only is left to that node. */
static __always_inline const struct frontend *service_node_port(struct service_query *q, struct frontend_key *key)
{
	__u16 port = bpf_ntohs(q->port);
	const struct frontend *row;

	if (port < cfg_nodeport_min || port > cfg_nodeport_max)
		return NULL;
	__u8 owner = service_owner(q);
	bool other = owner == OWNER_OTHER_NODE && q->flags & QUERY_INSIDE;

	if (owner != OWNER_THIS_NODE && !other)
		return NULL;
	/* :: or ::ffff:0.0.0.0, whichever it was. */
	key->addr.w[0] = 0;
	key->addr.w[1] = 0;
	key->addr.w[2] = addr_is_v4(&q->addr) ? bpf_htonl(0xffff) : 0;
	key->addr.w[3] = 0;
	row = bpf_map_lookup_elem(&frontends, key);
	return row && other && row->flags & FRONTEND_TWO_SCOPES ? NULL : row;
}

/* The row of an address that belongs to services alone: this port of it has none. */
static __always_inline const struct frontend *service_address(struct service_query *q, struct frontend_key *key)
{
	const struct frontend *row;

	if (q->owner != OWNER_ASK && q->owner != OWNER_NOBODY)
		return NULL;
	key->addr = q->addr;
	key->port = 0;
	key->proto = 0;
	row = bpf_map_lookup_elem(&frontends, key);
	return row && service_owner(q) == OWNER_NOBODY ? row : NULL;
}

/* Fills in q->frontend. Returns SERVICE_FOUND or SERVICE_NONE. */
__noinline int service_find(struct service_query *q)
{
	struct frontend_key key = {.scope = SCOPE_ALL};
	const struct frontend *row = NULL;

	if (!q)
		return SERVICE_NONE;
	key.addr = q->addr;
	key.port = q->port;
	key.proto = q->proto;
	/* Nobody's frontend: it only is the key of node ports. */
	if (!addr_is_unspecified(&q->addr))
		row = bpf_map_lookup_elem(&frontends, &key);
	if (!row)
		row = service_node_port(q, &key);
	if (row && row->flags & FRONTEND_TWO_SCOPES && q->flags & QUERY_INSIDE) {
		key.scope = SCOPE_INTERNAL;
		const struct frontend *inner = bpf_map_lookup_elem(&frontends, &key);

		row = inner ? inner : row;
		key.scope = SCOPE_ALL;
	}
	if (!row)
		row = service_address(q, &key);
	if (!row)
		return SERVICE_NONE;
	if (row->flags & FRONTEND_CLUSTER_IP && !(q->flags & QUERY_INSIDE) && !cfg_external_cluster_ip)
		return SERVICE_NONE;
	q->frontend = *row;
	return SERVICE_FOUND;
}

static __always_inline bool service_is_exempt(__u64 client, __u32 service, bool by_endpoint)
{
	struct exempt_key key = {.client = client, .service = service, .by_endpoint = by_endpoint};

	return bpf_map_lookup_elem(&service_exempt, &key);
}

/* Does the client see the address as it is? After service_find(). */
static __always_inline bool service_exempts(const struct service_query *q)
{
	__u64 cookie = (__u64)q->client.w[1] << 32 | q->client.w[0];

	if (!(q->flags & QUERY_INSIDE))
		return false;
	if (q->flags & QUERY_SOCKET && service_is_exempt(cookie, 0, false))
		return true;
	if (!(q->frontend.flags & FRONTEND_EXEMPT))
		return false;
	return service_is_exempt(q->flags & QUERY_SOCKET ? cookie : q->endpoint, q->frontend.service,
				 !(q->flags & QUERY_SOCKET));
}

/* Do the service's source ranges let this address in? A leaf: those who ask have no stack to spare for the key. */
__noinline int service_admits_addr(const struct frontend *frontend, const addr_t *client)
{
	struct source_key key = {.prefixlen = 32 + 128};

	if (!frontend || !client)
		return false;
	key.service = frontend->service;
	key.addr = *client;
	return !!bpf_map_lookup_elem(&source_ranges, &key) == !(frontend->flags & FRONTEND_SOURCE_DENY);
}

/* Is the service for this client? After service_find(); a socket's client isn't an address, see sock_admits(). */
static __always_inline bool service_admits(const struct service_query *q)
{
	return !(q->frontend.flags & FRONTEND_SOURCE_RANGES) || service_admits_addr(&q->frontend, &q->client);
}

/* 64 bits into the state: the multiplication carries upwards, the shift brings it back down. */
static __always_inline __u64 hash_word(__u64 hash, __u32 low, __u32 high)
{
	hash = (hash ^ ((__u64)high << 32 | low)) * 0x9e3779b97f4a7c15ULL;
	return hash ^ hash >> 32;
}

/* Every bit of the input decides over every bit of the output (the finaliser of MurmurHash3, which is public domain). */
static __always_inline __u32 hash_end(__u64 hash)
{
	hash ^= hash >> 33;
	hash *= 0xff51afd7ed558ccdULL;
	hash ^= hash >> 33;
	hash *= 0xc4ceb9fe1a85ec53ULL;
	return hash ^ hash >> 33;
}

/* The client alone where it shall stay with its backend, otherwise the connection. */
static __always_inline __u32 service_hash(const struct service_query *q)
{
	__u64 hash = cfg_service_seed;

	hash = hash_word(hash, q->client.w[0], q->client.w[1]);
	hash = hash_word(hash, q->client.w[2], q->client.w[3]);
	if (!(q->frontend.flags & FRONTEND_AFFINITY)) {
		hash = hash_word(hash, q->addr.w[0], q->addr.w[1]);
		hash = hash_word(hash, q->addr.w[2], q->addr.w[3]);
		hash = hash_word(hash, q->client_port | (__u32)q->port << 16, q->proto);
	}
	return hash_end(hash);
}

/* 0..count-1, evenly, without a division: the high bits decide. */
static __always_inline __u32 hash_scale(__u32 hash, __u32 count)
{
	return (__u64)hash * count >> 32;
}

/* The backend's id in one place of the service's table or slots; false: nothing there. */
static __always_inline bool service_entry(const struct service_query *q, bool table, __u32 slot, __u32 *id)
{
	struct slot_key key = {.service = q->frontend.service, .slot = slot};
	const __u32 *found;

	if (table) {
		void *inner = bpf_map_lookup_elem(&service_tables, &key.service);

		found = inner ? bpf_map_lookup_elem(inner, &key.slot) : NULL;
	} else {
		found = bpf_map_lookup_elem(&service_slots, &key);
	}
	if (!found)
		return false;
	*id = *found;
	return true;
}

static __always_inline bool service_answer(struct service_query *q, __u32 id)
{
	const struct backend *backend = service_backend(id);

	if (!backend)
		return false;
	q->backend = id;
	q->to.addr = backend->addr;
	q->to.port = backend->port;
	return true;
}

/* For who keeps q->backend and q->slot himself (an unconnected socket): is that backend still in its place? Then it is
 * the answer. After service_find(). */
__noinline int service_kept(struct service_query *q)
{
	__u32 id;

	if (!q)
		return SERVICE_NONE;
	bool table = q->frontend.flags & FRONTEND_TABLE;

	if (q->slot >= (table ? cfg_table_size : q->frontend.count))
		return SERVICE_NONE;
	if (!service_entry(q, table, q->slot, &id) || id != q->backend)
		return SERVICE_NONE;
	return service_answer(q, id) ? SERVICE_FOUND : SERVICE_NONE;
}

/* A table's entry that leads nowhere is followed by slots: those are written before any backend goes. */
static __always_inline bool service_choose_anew(struct service_query *q)
{
	bool hashed = q->frontend.flags & FRONTEND_HASH && !(q->flags & QUERY_SOCKET);
	__u32 word = hashed ? service_hash(q) : bpf_get_prandom_u32();
	bool table = q->frontend.flags & FRONTEND_TABLE;
	__u32 id;

	for (int i = 0; i < SERVICE_TRIES; i++) {
		q->slot = hash_scale(word, table ? cfg_table_size : q->frontend.count);
		if (service_entry(q, table, q->slot, &id) && service_answer(q, id))
			return true;
		table = false;
		word = hash_end(word + 1);
	}
	return false;
}

static __always_inline void affinity_key_of(struct affinity_key *key, const struct service_query *q)
{
	key->client = q->client;
	key->service = q->frontend.service;
	key->by_namespace = !!(q->flags & QUERY_SOCKET);
}

/* The backend that `kept` says, if the client may still have it. A second's difference in `used` is not worth a write. */
static __always_inline bool service_remembered(struct service_query *q, struct affinity *kept, __u32 backend, __u64 now)
{
	struct member_key member = {.service = q->frontend.service, .backend = backend};

	if (kept->used + q->frontend.affinity_seconds * NSEC_PER_SEC <= now)
		return false;
	if (!bpf_map_lookup_elem(&service_members, &member) || !service_answer(q, backend))
		return false;
	if (now > kept->used + NSEC_PER_SEC)
		kept->used = now;
	return true;
}

/* A client opens several connections at once, and each CPU that finds nothing to keep has chosen by now: the first one's
 * choice counts. False: it was another's. `kept`: what no longer holds, of `before`. */
static __always_inline bool service_remember_first(const struct affinity_key *key, struct affinity *kept, __u32 before,
						   const struct affinity *now)
{
	if (!kept)
		return !bpf_map_update_elem(&affinity, key, now, BPF_NOEXIST);
	if (__sync_val_compare_and_swap(&kept->backend, before, now->backend) != before)
		return false;
	kept->used = now->used;
	return true;
}

static __always_inline bool service_choose_affine(struct service_query *q)
{
	struct affinity now = {.used = coarse_now()};
	struct affinity_key key;

	affinity_key_of(&key, q);
	struct affinity *kept = bpf_map_lookup_elem(&affinity, &key);
	__u32 before = kept ? *(volatile __u32 *)&kept->backend : 0;

	if (kept && service_remembered(q, kept, before, now.used))
		return true;
	if (!service_choose_anew(q))
		return false;
	now.backend = q->backend;
	if (!service_remember_first(&key, kept, before, &now)) {
		kept = bpf_map_lookup_elem(&affinity, &key);
		if (kept)
			service_remembered(q, kept, *(volatile __u32 *)&kept->backend, now.used);
	}
	return true;
}

/* The backend for a new connection: fills in q->backend and q->to. After service_find(). Returns SERVICE_FOUND,
 * SERVICE_REFUSE or SERVICE_SILENT. */
__noinline int service_choose(struct service_query *q)
{
	if (!q)
		return SERVICE_REFUSE;
	if (!q->frontend.count)
		return q->frontend.flags & FRONTEND_SILENT ? SERVICE_SILENT : SERVICE_REFUSE;
	if (q->frontend.flags & FRONTEND_AFFINITY ? service_choose_affine(q) : service_choose_anew(q))
		return SERVICE_FOUND;
	return SERVICE_REFUSE;
}
