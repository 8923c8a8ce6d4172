// SPDX-License-Identifier: Apache-2.0
// C side of fimbria.kernel._libbpf. It exists for three reasons only: option structs of libbpf that grow between
// releases stay out of the cffi declarations, loops over thousands of map entries run without Python in between,
// and libbpf's messages are kept for the error instead of being printed.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <bpf/bpf.h>
#include <bpf/btf.h>
#include <bpf/libbpf.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <unistd.h>

// Kernel-internal errno that map types without batch operations answer with; no libc header names it.
#define FIM_ENOTSUPP 524

// ---------------------------------------------------------------- messages

enum { LOG_CAP = 256 * 1024 };
static __thread char *log_buf;
static __thread size_t log_len;

// Keeps the tail: the verifier states its reason last.
static void log_append(const char *text, size_t n)
{
	if (!log_buf && !(log_buf = malloc(LOG_CAP)))
		return;
	if (n > LOG_CAP) {
		text += n - LOG_CAP;
		n = LOG_CAP;
	}
	if (log_len + n > LOG_CAP) {
		size_t drop = log_len + n - LOG_CAP;

		memmove(log_buf, log_buf + drop, log_len - drop);
		log_len -= drop;
	}
	memcpy(log_buf + log_len, text, n);
	log_len += n;
}

static int log_print(enum libbpf_print_level level, const char *format, va_list args)
{
	char *text = NULL;
	int n;

	if (level == LIBBPF_DEBUG)
		return 0;
	n = vasprintf(&text, format, args);
	if (n > 0)
		log_append(text, (size_t)n);
	if (n >= 0)
		free(text);
	return n;
}

void fim_init(void)
{
	libbpf_set_print(log_print);
}

void fim_log_reset(void)
{
	log_len = 0;
}

const char *fim_log(size_t *len)
{
	*len = log_len;
	return log_buf;
}

// ---------------------------------------------------------------- archives meant for executables

// Debian compiles its static archives for executables. Two places of them can't go into a shared object; defining
// their symbols here keeps the linker from needing those relocations, and the rest links as it is.
// 1. libbpf.a takes the address of stderr for its default print function, which fim_init() replaces before any use.
FILE *stderr __attribute__((visibility("hidden")));

// 2. libelf.a keeps its error number in a thread-local variable of the executable's kind.
static __thread int elf_last;

void __libelf_seterrno(int value)
{
	elf_last = value;
}

int elf_errno(void)
{
	int value = elf_last;

	elf_last = 0;
	return value;
}

const char *elf_errmsg(int error)
{
	static __thread char text[32];

	snprintf(text, sizeof(text), "libelf error %d", error > 0 ? error : elf_last);
	return text;
}

// ---------------------------------------------------------------- objects

struct bpf_object *fim_open(const char *data, size_t len, const char *name)
{
	LIBBPF_OPTS(bpf_object_open_opts, opts, .object_name = name);

	return bpf_object__open_mem(data, len, &opts);
}

struct fim_var {
	const char *section;
	const char *name;
	uint32_t offset;
	uint32_t size;
	uint32_t kind;
	int is_signed;
	int is_volatile;
};

// Follows modifiers and typedefs down to the type that has a size; notes a volatile anywhere on the way.
static const struct btf_type *strip(const struct btf *btf, uint32_t id, int *is_volatile)
{
	const struct btf_type *t = btf__type_by_id(btf, id);

	while (t && (btf_is_mod(t) || btf_is_typedef(t))) {
		if (btf_is_volatile(t))
			*is_volatile = 1;
		t = btf__type_by_id(btf, t->type);
	}
	return t;
}

static int fill_var(const struct btf *btf, const char *section, const struct btf_var_secinfo *si, struct fim_var *v)
{
	const struct btf_type *var = btf__type_by_id(btf, si->type), *t, *e;

	if (!var || !btf_is_var(var))
		return -EINVAL;
	memset(v, 0, sizeof(*v));
	t = strip(btf, var->type, &v->is_volatile);
	if (!t)
		return -EINVAL;
	for (e = t; e && btf_is_array(e);)
		e = strip(btf, btf_array(e)->type, &v->is_volatile);
	v->section = section;
	v->name = btf__name_by_offset(btf, var->name_off);
	v->offset = si->offset;
	v->size = si->size;
	v->kind = btf_kind(t);
	if (btf_is_int(t))
		v->is_signed = !!(btf_int_encoding(t) & BTF_INT_SIGNED);
	else if (btf_is_any_enum(t))
		v->is_signed = btf_kflag(t);
	return 0;
}

// Lists the variables of all data sections; returns how many there are, filling at most `cap`.
int fim_vars(struct bpf_object *obj, struct fim_var *out, int cap)
{
	const struct btf *btf = bpf_object__btf(obj);
	int n = 0, err;

	if (!btf)
		return 0;
	for (uint32_t id = 1; id < btf__type_cnt(btf); id++) {
		const struct btf_type *t = btf__type_by_id(btf, id);
		const char *section = btf__name_by_offset(btf, t->name_off);

		if (!btf_is_datasec(t) || section[0] != '.' || !strcmp(section, ".maps"))
			continue;
		for (uint32_t i = 0; i < btf_vlen(t); i++, n++) {
			if (n >= cap)
				continue;
			err = fill_var(btf, section, btf_var_secinfos(t) + i, out + n);
			if (err)
				return err;
		}
	}
	return n;
}

const char *fim_raw_btf(struct bpf_object *obj, uint32_t *len)
{
	const struct btf *btf = bpf_object__btf(obj);

	*len = 0;
	return btf ? btf__raw_data(btf, len) : NULL;
}

// ---------------------------------------------------------------- maps

int fim_map_create(uint32_t type, const char *name, uint32_t key_size, uint32_t value_size, uint32_t max_entries,
		   uint32_t flags, int inner_fd, uint64_t map_extra, int btf_fd, uint32_t btf_key, uint32_t btf_value)
{
	LIBBPF_OPTS(bpf_map_create_opts, opts, .map_flags = flags, .map_extra = map_extra);

	if (inner_fd >= 0)
		opts.inner_map_fd = (uint32_t)inner_fd;
	if (btf_fd >= 0) {
		opts.btf_fd = (uint32_t)btf_fd;
		opts.btf_key_type_id = btf_key;
		opts.btf_value_type_id = btf_value;
	}
	return bpf_map_create((enum bpf_map_type)type, name, key_size, value_size, max_entries, &opts);
}

struct fim_map_info {
	uint32_t type, id, key_size, value_size, max_entries, flags, btf_id, btf_key, btf_value;
	uint64_t extra;
	char name[16];
};

int fim_map_info(int fd, struct fim_map_info *out)
{
	struct bpf_map_info info = {};
	uint32_t len = sizeof(info);
	int err = bpf_map_get_info_by_fd(fd, &info, &len);

	if (err)
		return err;
	*out = (struct fim_map_info){
		.type = info.type, .id = info.id, .key_size = info.key_size, .value_size = info.value_size,
		.max_entries = info.max_entries, .flags = info.map_flags, .btf_id = info.btf_id,
		.btf_key = info.btf_key_type_id, .btf_value = info.btf_value_type_id, .extra = info.map_extra,
	};
	memcpy(out->name, info.name, sizeof(out->name));
	return 0;
}

int fim_map_lookup(int fd, const char *key, char *value, uint64_t flags)
{
	return bpf_map_lookup_elem_flags(fd, key, value, flags);
}

int fim_map_update(int fd, const char *key, const char *value, uint64_t flags)
{
	return bpf_map_update_elem(fd, key, value, flags);
}

int fim_map_delete(int fd, const char *key)
{
	return bpf_map_delete_elem(fd, key);
}

// *done tells how many entries are in, also on error, so that the caller can name the entry that failed.
int fim_map_update_batch(int fd, const char *keys, const char *values, uint32_t key_size, uint32_t value_size,
			 uint32_t n, uint64_t flags, uint32_t *done)
{
	LIBBPF_OPTS(bpf_map_batch_opts, opts, .elem_flags = flags);
	uint32_t count = n;
	int err = bpf_map_update_batch(fd, keys, values, &count, &opts);

	*done = err ? count : n;
	if (err != -FIM_ENOTSUPP)
		return err;
	for (*done = 0; *done < n; ++*done) {
		err = bpf_map_update_elem(fd, keys + (size_t)*done * key_size, values + (size_t)*done * value_size, flags);
		if (err)
			return err;
	}
	return 0;
}

// A key that isn't there is skipped when missing_ok; *pos is the key reached, *deleted how many went.
int fim_map_delete_batch(int fd, const char *keys, uint32_t key_size, uint32_t n, int missing_ok, uint32_t *deleted,
			 uint32_t *pos)
{
	LIBBPF_OPTS(bpf_map_batch_opts, opts);
	bool batch = true;
	int err = 0;

	*deleted = *pos = 0;
	while (*pos < n) {
		const char *at = keys + (size_t)*pos * key_size;
		uint32_t count = batch ? n - *pos : 1;
		uint32_t asked = count;

		err = batch ? bpf_map_delete_batch(fd, at, &count, &opts) : bpf_map_delete_elem(fd, at);
		if (batch && err == -FIM_ENOTSUPP) {
			batch = false;
			continue;
		}
		if (err && !batch)
			count = 0;
		if (!err)
			count = asked;
		*deleted += count;
		*pos += count;
		if (err && !(err == -ENOENT && missing_ok))
			return err;
		if (err)
			++*pos;
	}
	return 0;
}

struct fim_dump {
	char *keys;
	char *values;
	uint32_t count;
};

struct dump_state {
	struct fim_dump *out;
	size_t key_size, value_size;
	uint64_t room, limit;
};

static int dump_reserve(struct dump_state *s, uint64_t more)
{
	uint64_t want = s->out->count + more, room = s->room ? s->room : 256;
	char *p;

	// A map that changes faster than it can be walked would otherwise never end.
	if (s->out->count > s->limit)
		return -EAGAIN;
	if (want <= s->room)
		return 0;
	while (room < want)
		room *= 2;
	p = realloc(s->out->keys, room * s->key_size + 1);
	if (!p)
		return -ENOMEM;
	s->out->keys = p;
	p = realloc(s->out->values, room * s->value_size + 1);
	if (!p)
		return -ENOMEM;
	s->out->values = p;
	s->room = room;
	return 0;
}

static int dump_batches(int fd, struct dump_state *s, uint32_t batch, char *cursor)
{
	LIBBPF_OPTS(bpf_map_batch_opts, opts);
	char *in = NULL;
	int tries = 0;

	for (;;) {
		uint32_t count = batch;
		int err = dump_reserve(s, batch);

		if (err)
			return err;
		err = bpf_map_lookup_batch(fd, in, cursor, s->out->keys + s->out->count * s->key_size,
					   s->out->values + s->out->count * s->value_size, &count, &opts);
		if (err == -ENOSPC && batch < (1u << 30)) { // one hash bucket held more than the batch
			batch *= 2;
			continue;
		}
		if (err && err != -ENOENT && err != -EINTR)
			return err;
		if (err == -EINTR && ++tries > 100)
			return err;
		s->out->count += count;
		if (err == -ENOENT)
			return 0;
		if (count || !err)
			in = cursor;
	}
}

static int dump_singly(int fd, struct dump_state *s, char *key)
{
	char *prev = NULL;
	int err;

	while (!(err = bpf_map_get_next_key(fd, prev, key))) {
		prev = key;
		err = dump_reserve(s, 1);
		if (err)
			return err;
		err = bpf_map_lookup_elem(fd, key, s->out->values + s->out->count * s->value_size);
		if (err == -ENOENT)
			continue;
		if (err)
			return err;
		memcpy(s->out->keys + s->out->count * s->key_size, key, s->key_size);
		s->out->count++;
	}
	return err == -ENOENT ? 0 : err;
}

void fim_dump_free(struct fim_dump *d)
{
	free(d->keys);
	free(d->values);
	memset(d, 0, sizeof(*d));
}

int fim_map_dump(int fd, uint32_t key_size, uint32_t value_size, uint32_t max_entries, struct fim_dump *out)
{
	struct dump_state s = {
		.out = out, .key_size = key_size, .value_size = value_size, .limit = 2ull * max_entries + 65536,
	};
	uint32_t batch = max_entries < 4096 ? (max_entries < 64 ? 64 : max_entries) : 4096;
	// The cursor is a bucket number for hash tables and a key for all others.
	char *cursor = calloc(1, key_size < 8 ? 8 : key_size);
	int err;

	memset(out, 0, sizeof(*out));
	if (!cursor)
		return -ENOMEM;
	err = dump_batches(fd, &s, batch, cursor);
	if ((err == -FIM_ENOTSUPP || err == -EINVAL) && !out->count)
		err = dump_singly(fd, &s, cursor);
	free(cursor);
	if (err)
		fim_dump_free(out);
	return err;
}

// ---------------------------------------------------------------- links, queries, ids

// Numbers of the kernel's UAPI that the distribution's headers may not have yet.
enum { FIM_TCX_INGRESS = 46, FIM_TCX_EGRESS = 47, FIM_NETKIT_PRIMARY = 54, FIM_NETKIT_PEER = 55 };

int fim_link_create(int prog_fd, int target, int attach_type, uint32_t flags, uint32_t relative, uint64_t revision)
{
	LIBBPF_OPTS(bpf_link_create_opts, opts, .flags = flags);

	if (attach_type == FIM_TCX_INGRESS || attach_type == FIM_TCX_EGRESS) {
		opts.tcx.relative_fd = relative;
		opts.tcx.expected_revision = revision;
	} else if (attach_type == FIM_NETKIT_PRIMARY || attach_type == FIM_NETKIT_PEER) {
		opts.netkit.relative_fd = relative;
		opts.netkit.expected_revision = revision;
	}
	return bpf_link_create(prog_fd, target, (enum bpf_attach_type)attach_type, &opts);
}

int fim_link_update(int link_fd, int prog_fd, int old_prog_fd)
{
	LIBBPF_OPTS(bpf_link_update_opts, opts);

	if (old_prog_fd >= 0) {
		opts.flags = BPF_F_REPLACE;
		opts.old_prog_fd = (uint32_t)old_prog_fd;
	}
	return bpf_link_update(link_fd, prog_fd, &opts);
}

// Returns -ENOSPC with *count set when `cap` is too small.
int fim_prog_query(int target, int attach_type, uint32_t query_flags, uint32_t cap, uint32_t *prog_ids,
		   uint32_t *link_ids, uint32_t *count, uint64_t *revision)
{
	bool mprog = attach_type == FIM_TCX_INGRESS || attach_type == FIM_TCX_EGRESS ||
		     attach_type == FIM_NETKIT_PRIMARY || attach_type == FIM_NETKIT_PEER;
	LIBBPF_OPTS(bpf_prog_query_opts, opts, .query_flags = query_flags, .prog_ids = prog_ids, .prog_cnt = cap);
	int err;

	if (mprog)
		opts.link_ids = link_ids;
	err = bpf_prog_query_opts(target, (enum bpf_attach_type)attach_type, &opts);
	*count = opts.prog_cnt;
	*revision = mprog ? opts.revision : 0;
	return err;
}

struct fim_link_info {
	uint32_t type, id, prog_id, attach_type, ifindex;
	uint64_t cgroup_id;
};

// The part of the UAPI's struct bpf_link_info that matters here; newer members are absent from older headers.
struct link_info_uapi {
	uint32_t type, id, prog_id, pad;
	union {
		struct { uint64_t cgroup_id; uint32_t attach_type; } cgroup;
		struct { uint32_t ifindex, attach_type; } dev;
		uint64_t room[16];
	};
};

int fim_link_info(int fd, struct fim_link_info *out)
{
	enum { LINK_CGROUP = 3, LINK_XDP = 6, LINK_TCX = 11, LINK_NETKIT = 13 };
	struct link_info_uapi info = {};
	uint32_t len = sizeof(info);
	int err = bpf_obj_get_info_by_fd(fd, &info, &len);

	if (err)
		return err;
	memset(out, 0, sizeof(*out));
	out->type = info.type;
	out->id = info.id;
	out->prog_id = info.prog_id;
	if (info.type == LINK_CGROUP) {
		out->cgroup_id = info.cgroup.cgroup_id;
		out->attach_type = info.cgroup.attach_type;
	} else if (info.type == LINK_TCX || info.type == LINK_NETKIT) {
		out->ifindex = info.dev.ifindex;
		out->attach_type = info.dev.attach_type;
	} else if (info.type == LINK_XDP) {
		out->ifindex = info.dev.ifindex;
		out->attach_type = BPF_XDP;
	}
	return 0;
}

struct fim_prog_info {
	uint32_t type, id, nr_map_ids, verified_insns, xlated_len, jited_len;
	uint64_t load_time, run_time_ns, run_cnt;
	unsigned char tag[8];
	char name[16];
};

int fim_prog_info(int fd, struct fim_prog_info *out, uint32_t *map_ids, uint32_t cap)
{
	struct bpf_prog_info info = { .nr_map_ids = cap, .map_ids = (uint64_t)(uintptr_t)map_ids };
	uint32_t len = sizeof(info);
	int err = bpf_prog_get_info_by_fd(fd, &info, &len);

	if (err)
		return err;
	*out = (struct fim_prog_info){
		.type = info.type, .id = info.id, .nr_map_ids = info.nr_map_ids, .verified_insns = info.verified_insns,
		.xlated_len = info.xlated_prog_len, .jited_len = info.jited_prog_len, .load_time = info.load_time,
		.run_time_ns = info.run_time_ns, .run_cnt = info.run_cnt,
	};
	memcpy(out->tag, info.tag, sizeof(out->tag));
	memcpy(out->name, info.name, sizeof(out->name));
	return 0;
}

// ---------------------------------------------------------------- clsact

static int tc_hook(struct bpf_tc_hook *hook, int ifindex, int egress)
{
	*hook = (struct bpf_tc_hook){
		.sz = sizeof(*hook), .ifindex = ifindex, .attach_point = egress ? BPF_TC_EGRESS : BPF_TC_INGRESS,
	};
	return 0;
}

int fim_tc_qdisc(int ifindex)
{
	struct bpf_tc_hook hook;

	tc_hook(&hook, ifindex, 0);
	return bpf_tc_hook_create(&hook);
}

int fim_tc_attach(int ifindex, int egress, int prog_fd, uint32_t handle, uint32_t prio, int replace, uint32_t *prog_id)
{
	LIBBPF_OPTS(bpf_tc_opts, opts, .prog_fd = prog_fd, .handle = handle, .priority = prio);
	struct bpf_tc_hook hook;
	int err;

	if (replace)
		opts.flags = BPF_TC_F_REPLACE;
	tc_hook(&hook, ifindex, egress);
	err = bpf_tc_attach(&hook, &opts);
	*prog_id = opts.prog_id;
	return err;
}

int fim_tc_query(int ifindex, int egress, uint32_t handle, uint32_t prio, uint32_t *prog_id)
{
	LIBBPF_OPTS(bpf_tc_opts, opts, .handle = handle, .priority = prio);
	struct bpf_tc_hook hook;
	int err;

	tc_hook(&hook, ifindex, egress);
	err = bpf_tc_query(&hook, &opts);
	*prog_id = opts.prog_id;
	return err;
}

int fim_tc_detach(int ifindex, int egress, uint32_t handle, uint32_t prio)
{
	LIBBPF_OPTS(bpf_tc_opts, opts, .handle = handle, .priority = prio);
	struct bpf_tc_hook hook;

	tc_hook(&hook, ifindex, egress);
	return bpf_tc_detach(&hook, &opts);
}

// ---------------------------------------------------------------- test runs

struct fim_test_run {
	const char *data_in;
	uint32_t data_in_len;
	char *data_out;
	uint32_t data_out_len;
	const char *ctx_in;
	uint32_t ctx_in_len;
	char *ctx_out;
	uint32_t ctx_out_len;
	uint32_t repeat, flags, retval, duration_ns;
};

int fim_prog_test_run(int fd, struct fim_test_run *r)
{
	LIBBPF_OPTS(bpf_test_run_opts, opts, .data_in = r->data_in, .data_size_in = r->data_in_len,
		    .data_out = r->data_out, .data_size_out = r->data_out_len, .ctx_in = r->ctx_in,
		    .ctx_size_in = r->ctx_in_len, .ctx_out = r->ctx_out, .ctx_size_out = r->ctx_out_len,
		    .repeat = (int)r->repeat, .flags = r->flags);
	int err = bpf_prog_test_run_opts(fd, &opts);

	r->data_out_len = opts.data_size_out;
	r->ctx_out_len = opts.ctx_size_out;
	r->retval = opts.retval;
	r->duration_ns = opts.duration;
	return err;
}

// ---------------------------------------------------------------- ring buffer

struct fim_ring {
	struct ring_buffer *rb;
	char *data;     // records one after the other
	uint32_t *ends; // where each one ends in data
	size_t data_room;
	uint32_t ends_room, count, max;
	int err;
};

// Returning < 0 makes libbpf stop after having released this record.
static int ring_sample(void *ctx, void *data, size_t len)
{
	struct fim_ring *r = ctx;
	size_t used = r->count ? r->ends[r->count - 1] : 0;

	if (used + len > r->data_room) {
		size_t room = (used + len) * 2;
		char *p = room <= UINT32_MAX ? realloc(r->data, room) : NULL;

		if (!p) {
			r->err = -ENOMEM;
			return -ENOMEM;
		}
		r->data = p;
		r->data_room = room;
	}
	memcpy(r->data + used, data, len);
	r->ends[r->count++] = (uint32_t)(used + len);
	return r->count >= r->max ? -ECANCELED : 0;
}

struct fim_ring *fim_ring_new(int map_fd)
{
	struct fim_ring *r = calloc(1, sizeof(*r));

	if (!r)
		return NULL;
	r->rb = ring_buffer__new(map_fd, ring_sample, r, NULL);
	if (!r->rb) {
		int saved = errno;

		free(r);
		errno = saved;
		return NULL;
	}
	return r;
}

int fim_ring_fd(struct fim_ring *r)
{
	return ring_buffer__epoll_fd(r->rb);
}

int fim_ring_drain(struct fim_ring *r, uint32_t max)
{
	int n;

	r->count = 0;
	r->err = 0;
	if (max == 0)
		return 0;
	if (max > r->ends_room) {
		uint32_t *p = realloc(r->ends, (size_t)max * sizeof(*p));

		if (!p)
			return -ENOMEM;
		r->ends = p;
		r->ends_room = max;
	}
	r->max = max;
	n = ring_buffer__consume(r->rb);
	if (r->err)
		return r->err;
	return n < 0 && n != -ECANCELED ? n : (int)r->count;
}

void fim_ring_free(struct fim_ring *r)
{
	ring_buffer__free(r->rb);
	free(r->data);
	free(r->ends);
	free(r);
}

// ---------------------------------------------------------------- sockets in another network namespace

struct socket_request {
	int netns_fd, domain, type, protocol, result;
};

static void *socket_thread(void *arg)
{
	struct socket_request *r = arg;

	if (setns(r->netns_fd, CLONE_NEWNET)) {
		r->result = -errno;
		return NULL;
	}
	r->result = socket(r->domain, r->type, r->protocol);
	if (r->result < 0)
		r->result = -errno;
	return NULL;
}

// Opens a socket that belongs to the given network namespace. It is made on a thread that ends at once, so that no
// thread of the caller ever changes its namespace, not even for a moment.
int fim_socket_in(int netns_fd, int domain, int type, int protocol)
{
	struct socket_request r = { netns_fd, domain, type, protocol, -EIO };
	pthread_t thread;
	int err = pthread_create(&thread, NULL, socket_thread, &r);

	if (err)
		return -err;
	pthread_join(thread, NULL);
	return r.result;
}

struct netns_request {
	const char *path;
	int result;
};

static void *netns_thread(void *arg)
{
	struct netns_request *r = arg;

	if (unshare(CLONE_NEWNET) || mount("/proc/thread-self/ns/net", r->path, "none", MS_BIND, NULL))
		r->result = -errno;
	return NULL;
}

// Makes a namespace on a thread that ends at once and keeps it by a mount on `path`.
int fim_netns_create(const char *path)
{
	struct netns_request r = { path, 0 };
	pthread_t thread;
	int err = pthread_create(&thread, NULL, netns_thread, &r);

	if (err)
		return -err;
	pthread_join(thread, NULL);
	return r.result;
}

// For threads that end after what they do there.
int fim_setns(int netns_fd)
{
	return setns(netns_fd, CLONE_NEWNET) ? -errno : 0;
}

int fim_umount(const char *path)
{
	return umount2(path, MNT_DETACH) ? -errno : 0;
}
