/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Apart from maps/service.h, so that packet programs don't get maps that only sockets need. */
#pragma once
#include "include/common.h"
#include "types/service.h"

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct sock_revnat_key);
	__type(value, struct sock_revnat);
	__uint(max_entries, 65536);
} sock_revnat SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct sock_choice_key);
	__type(value, struct sock_choice);
	__uint(max_entries, 16384);
} sock_choices SEC(".maps");
