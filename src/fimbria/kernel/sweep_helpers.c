// SPDX-License-Identifier: Apache-2.0
// Second C side of fimbria.kernel._libbpf: walks over tables that programs fill, and removal of what has expired there.
// A batch of entries is judged in one call, and an entry is removed only as what it was judged as.

static uint64_t stamp_at(const char *row, uint32_t offset)
{
	uint64_t stamp;

	memcpy(&stamp, row + offset, sizeof(stamp));
	return stamp;
}

// One batch. `in` is NULL to begin with, then the cursor that the last call wrote. Returns 0, -ENOENT at the end of the
// table (with *count entries all the same), or -ENOSPC if `*count` is less than what one bucket of the table holds.
int fim_walk(int fd, char *in, char *out, char *keys, char *values, uint32_t *count)
{
	LIBBPF_OPTS(bpf_map_batch_opts, opts);

	return bpf_map_lookup_batch(fd, in, out, keys, values, count, &opts);
}

struct fim_rows {
	char *keys, *values;
	uint64_t *before; // for each row that was kept: it is expired as long as its stamp is less than this
	uint32_t count, key_size, value_size;
	uint32_t stamp; // offset in the value
};

static void keep(struct fim_rows *rows, uint32_t to, uint32_t from, uint64_t before)
{
	if (to != from) {
		memcpy(rows->keys + (size_t)to * rows->key_size, rows->keys + (size_t)from * rows->key_size, rows->key_size);
		memcpy(rows->values + (size_t)to * rows->value_size, rows->values + (size_t)from * rows->value_size,
		       rows->value_size);
	}
	rows->before[to] = before;
}

static bool find_number(const uint32_t *numbers, uint32_t count, uint32_t number, uint32_t *at)
{
	uint32_t low = 0, high = count;

	while (low < high) {
		uint32_t middle = (low + high) / 2;

		if (numbers[middle] < number)
			low = middle + 1;
		else
			high = middle;
	}
	*at = low;
	return low < count && numbers[low] == number;
}

// Sorted numbers with a limit each; what isn't among them has `other`.
struct fim_groups {
	uint32_t offset, count; // of a 32-bit number in the key
	const uint32_t *numbers;
	const uint64_t *before;
	uint64_t other;
};

static uint64_t group_before(const struct fim_groups *groups, const char *key)
{
	uint32_t number, at;

	if (!groups->count)
		return groups->other;
	memcpy(&number, key + groups->offset, sizeof(number));
	return find_number(groups->numbers, groups->count, number, &at) ? groups->before[at] : groups->other;
}

// Leaves only the rows whose stamp is less than their group's limit.
void fim_keep_expired(struct fim_rows *rows, const struct fim_groups *groups)
{
	uint32_t kept = 0;

	for (uint32_t i = 0; i < rows->count; i++) {
		uint64_t before = group_before(groups, rows->keys + (size_t)i * rows->key_size);

		if (stamp_at(rows->values + (size_t)i * rows->value_size, rows->stamp) < before)
			keep(rows, kept++, i, before);
	}
	rows->count = kept;
}

// Leaves only the rows whose stamp is `now` or later.
void fim_keep_living(struct fim_rows *rows, uint64_t now)
{
	uint32_t kept = 0;

	for (uint32_t i = 0; i < rows->count; i++)
		if (stamp_at(rows->values + (size_t)i * rows->value_size, rows->stamp) >= now)
			keep(rows, kept++, i, 0);
	rows->count = kept;
}

// Leaves only the rows whose 32-bit number at `offset` of the value is one of the sorted `numbers`.
void fim_keep_numbers(struct fim_rows *rows, uint32_t offset, const uint32_t *numbers, uint32_t count)
{
	uint32_t kept = 0, number, at;

	for (uint32_t i = 0; i < rows->count; i++) {
		memcpy(&number, rows->values + (size_t)i * rows->value_size + offset, sizeof(number));
		if (find_number(numbers, count, number, &at))
			keep(rows, kept++, i, 0);
	}
	rows->count = kept;
}

// Removes the rows that still are what they were judged as. Taking an entry out tells what it was at that moment: one
// that was renewed since is put back at once, unless a program has made a new one meanwhile. Returns how many are gone.
int fim_take(int fd, const struct fim_rows *rows, char *value, uint32_t *renewed)
{
	int taken = 0;

	*renewed = 0;
	for (uint32_t i = 0; i < rows->count; i++) {
		const char *key = rows->keys + (size_t)i * rows->key_size;
		int err = bpf_map_lookup_elem(fd, key, value);

		// Most renewals show here, and nothing is ever missing.
		if (!err && stamp_at(value, rows->stamp) >= rows->before[i]) {
			++*renewed;
			continue;
		}
		if (!err)
			err = bpf_map_lookup_and_delete_elem(fd, key, value);
		if (err == -ENOENT)
			continue;
		if (err)
			return err;
		if (stamp_at(value, rows->stamp) < rows->before[i]) {
			taken++;
			continue;
		}
		++*renewed;
		err = bpf_map_update_elem(fd, key, value, BPF_NOEXIST);
		if (err && err != -EEXIST)
			return err;
	}
	return taken;
}

// Writes rows to another map where it has none of that name (the kernel's batches can't ask for that). Returns how many.
int fim_add(int fd, const struct fim_rows *rows)
{
	int added = 0;

	for (uint32_t i = 0; i < rows->count; i++) {
		int err = bpf_map_update_elem(fd, rows->keys + (size_t)i * rows->key_size,
					      rows->values + (size_t)i * rows->value_size, BPF_NOEXIST);

		if (err && err != -EEXIST)
			return err;
		added += !err;
	}
	return added;
}

// ---------------------------------------------------------------- address translation

// Offsets of `struct nat_key`, `struct nat_entry`, `struct ct_key` and `struct ct_entry`, as their BTF has them.
struct fim_nat {
	int ct_fd;
	uint32_t saddr, daddr, sport, dport, proto, direction;
	uint32_t addr, port, flags, frontend, frontend_port;
	uint32_t local, remote, local_port, remote_port, ct_proto, scope;
	uint32_t ct_key_size, ct_value_size, expires;
	uint32_t of_service, scope_service, direction_in; // enumerators
	uint64_t now, recent, lonely; // used after `recent`: in use; before `lonely`: over if no connection is known
};

enum { FIM_TALLY = 1 << 16, FIM_ADDR = 16, FIM_ROW = 256 };

// How many source ports are taken towards each destination, by a hash of it: what two destinations share is counted
// for both, so a figure is never too small, and too large by a 65,536th of the table on average.
struct fim_tally {
	uint32_t counts[FIM_TALLY];
	uint32_t most, rows;
	char key[FIM_ROW]; // an ingress row of the fullest one
};

static uint64_t mix(uint64_t hash, const char *data, size_t n)
{
	for (size_t i = 0; i < n; i++)
		hash = (hash ^ (unsigned char)data[i]) * 0x100000001b3ull;
	return hash;
}

static void tally(const struct fim_nat *n, struct fim_tally *t, const char *key, uint32_t key_size)
{
	uint64_t hash = 0xcbf29ce484222325ull;
	uint32_t slot;

	hash = mix(hash, key + n->saddr, FIM_ADDR);
	hash = mix(hash, key + n->daddr, FIM_ADDR);
	hash = mix(hash, key + n->sport, 2);
	hash = mix(hash, key + n->proto, 1);
	slot = (hash ^ hash >> 32) % FIM_TALLY;
	t->rows++;
	if (++t->counts[slot] > t->most) {
		t->most = t->counts[slot];
		memcpy(t->key, key, key_size);
	}
}

// One row, and what its bits say.
struct nat_row {
	const char *key, *value;
	bool in, service;
};

// When the connection that a row serves expires; 0: none is known.
static uint64_t nat_owner_expires(const struct fim_nat *n, const struct nat_row *r)
{
	char owner[FIM_ROW] = {}, found[FIM_ROW];

	memcpy(owner + n->local, r->in ? r->value + n->addr : r->key + n->saddr, FIM_ADDR);
	memcpy(owner + n->local_port, r->in ? r->value + n->port : r->key + n->sport, 2);
	memcpy(owner + n->remote, r->service ? r->value + n->frontend : r->key + (r->in ? n->saddr : n->daddr), FIM_ADDR);
	memcpy(owner + n->remote_port,
	       r->service ? r->value + n->frontend_port : r->key + (r->in ? n->sport : n->dport), 2);
	owner[n->ct_proto] = r->key[n->proto];
	owner[n->scope] = (char)(r->service ? n->scope_service : 0);
	return bpf_map_lookup_elem(n->ct_fd, owner, found) ? 0 : stamp_at(found, n->expires);
}

// Each half of a binding is judged for itself: the one that is left of two is how programs find the port again.
static bool nat_over(const struct fim_nat *n, const struct nat_row *r, uint64_t used)
{
	uint64_t expires = nat_owner_expires(n, r);

	return expires ? expires < n->now : used < n->lonely;
}

// Counts the ports in use, and leaves only the rows whose connection is over. Returns -EINVAL for rows too long.
int fim_nat_keep_over(const struct fim_nat *n, struct fim_rows *rows, struct fim_tally *t)
{
	uint32_t kept = 0;

	if (rows->key_size > FIM_ROW || rows->value_size > FIM_ROW || n->ct_key_size > FIM_ROW || n->ct_value_size > FIM_ROW)
		return -EINVAL;
	for (uint32_t i = 0; i < rows->count; i++) {
		struct nat_row r = {
			.key = rows->keys + (size_t)i * rows->key_size, .value = rows->values + (size_t)i * rows->value_size,
		};
		uint64_t used = stamp_at(r.value, rows->stamp);
		uint16_t flags;

		memcpy(&flags, r.value + n->flags, sizeof(flags));
		r.service = flags & n->of_service;
		r.in = (uint32_t)r.key[n->direction] == n->direction_in;
		if (r.in)
			tally(n, t, r.key, rows->key_size);
		if (used < n->recent && nat_over(n, &r, used))
			keep(rows, kept++, i, n->recent);
	}
	rows->count = kept;
	return 0;
}
