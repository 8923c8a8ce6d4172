// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* Keeps the BTF of every shared type in an object, for the Python codec. Never loaded into a kernel. */
#include "types/base.h"
#include "types/endpoint.h"
#include "types/ipcache.h"
#include "types/policy.h"
#include "types/conntrack.h"
#include "types/service.h"
#include "types/nat.h"
#include "types/event.h"

#define KEEP_STRUCT(name) struct name keep_##name
#define KEEP_ENUM(name) enum name keep_##name

KEEP_STRUCT(endpoint);
KEEP_STRUCT(local_addr);
KEEP_STRUCT(prefix_key);
KEEP_STRUCT(remote);
KEEP_STRUCT(cidr);
KEEP_STRUCT(policy_key);
KEEP_STRUCT(policy_entry);
KEEP_STRUCT(ct_key);
KEEP_STRUCT(ct_entry);
KEEP_STRUCT(frontend_key);
KEEP_STRUCT(frontend);
KEEP_STRUCT(slot_key);
KEEP_STRUCT(backend);
KEEP_STRUCT(member_key);
KEEP_STRUCT(affinity_key);
KEEP_STRUCT(affinity);
KEEP_STRUCT(source_key);
KEEP_STRUCT(exempt_key);
KEEP_STRUCT(sock_revnat_key);
KEEP_STRUCT(sock_revnat);
KEEP_STRUCT(sock_choice_key);
KEEP_STRUCT(sock_choice);
KEEP_STRUCT(nat_key);
KEEP_STRUCT(nat_entry);
KEEP_STRUCT(fragment_key);
KEEP_STRUCT(fragment);
KEEP_STRUCT(event);
KEEP_STRUCT(metric);
KEEP_STRUCT(runtime);
KEEP_ENUM(reserved_identity);
KEEP_ENUM(direction);
KEEP_ENUM(endpoint_flag);
KEEP_ENUM(remote_flag);
KEEP_ENUM(policy_verdict);
KEEP_ENUM(policy_entry_flag);
KEEP_ENUM(policy_prefix);
KEEP_ENUM(ct_scope);
KEEP_ENUM(ct_flag);
KEEP_ENUM(frontend_flag);
KEEP_ENUM(frontend_scope);
KEEP_ENUM(nat_flag);
KEEP_ENUM(drop_reason);
KEEP_ENUM(event_type);
KEEP_ENUM(trace_point);
KEEP_ENUM(ct_state);
KEEP_ENUM(metric_reason);
