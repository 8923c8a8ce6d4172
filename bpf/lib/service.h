/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Which backend a frontend's next connection goes to. Remembering the choice is the caller's: by conntrack for packets,
 * by the socket itself for sockets. */
#pragma once
#include "include/common.h"
#include "maps/service.h"

/* NULL: the address and port are no service's. Every byte of the key counts, so start from a zeroed one. */
static __always_inline const struct frontend *service_lookup(const struct frontend_key *key)
{
	return bpf_map_lookup_elem(&frontends, key);
}

/* NULL: the backend is gone. For connections that chose it earlier. */
static __always_inline const struct backend *service_backend(__u32 id)
{
	return bpf_map_lookup_elem(&backends, &id);
}

/* The backend in one slot, and its id; NULL: nothing there. */
static __always_inline const struct backend *service_slot(__u32 service, __u32 slot, __u32 *id)
{
	struct slot_key key = {.service = service, .slot = slot};
	const __u32 *found = bpf_map_lookup_elem(&service_slots, &key);

	if (!found)
		return NULL;
	*id = *found;
	return service_backend(*found);
}

/* The backend for a new connection, and its id; NULL: the service has none, refuse. `random` is 32 random bits, or a
 * hash of what shall stay together. */
static __always_inline const struct backend *service_select(const struct frontend *frontend, __u32 random, __u32 *id)
{
	__u32 count = frontend->count;

	return count ? service_slot(frontend->service, random % count, id) : NULL;
}
