/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Settings that every packet program has. Those of a single stage stand in that stage's header. All are constants to
 * the verifier, which removes what is off; the loader must set each one that an object contains. */
#pragma once
#include "include/common.h"

/* Deliver to pods with bpf_redirect_peer(); otherwise packets pass through the host stack and `to_pod` judges them. */
const volatile bool cfg_redirect_peer = true;

/* Write events to the ring buffer. Metrics are counted in any case. */
const volatile bool cfg_events = true;

/* A connection that goes on is reported again after this time. */
const volatile __u64 cfg_trace_interval_ns = 5 * NSEC_PER_SEC;

/* How long an idle established TCP connection is remembered. */
const volatile __u64 cfg_tcp_established_ns = 8 * 3600 * NSEC_PER_SEC;
