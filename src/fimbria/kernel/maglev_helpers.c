// SPDX-License-Identifier: Apache-2.0
// Third C side of fimbria.kernel._libbpf: Maglev tables. fimbria.compute.maglev tells what this computes, and is what tests
// compare it with.

enum { MAGLEV_MAX_SIZE = 1 << 20, MAGLEV_NOBODY = -1 };

struct fim_member {
	unsigned char addr[16];
	uint16_t port, proto;
	uint32_t weight, backend;
};

struct maglev_turn {
	uint32_t at, step;
	uint64_t turns;
	int64_t next;   // in the same round
};

struct maglev_round {
	int64_t first, last;
};

static uint64_t maglev_mix(uint64_t value)
{
	value += 0x9e3779b97f4a7c15;
	value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9;
	value = (value ^ value >> 27) * 0x94d049bb133111eb;
	return value ^ value >> 31;
}

static uint64_t maglev_hash(uint64_t value, const struct fim_member *m)
{
	for (int word = 0; word < 2; word++) {
		uint64_t w = 0;

		for (int byte = 0; byte < 8; byte++)
			w = w << 8 | m->addr[word * 8 + byte];
		value = maglev_mix(value ^ w);
	}
	return maglev_mix(value ^ ((uint64_t)m->port << 16 | m->proto));
}

// Puts a member into the round of its next turn; rounds beyond the last one don't happen.
static void maglev_queue(struct maglev_round *rounds, uint32_t size, struct maglev_turn *turns, int64_t who,
			 uint64_t heaviest, uint64_t weight)
{
	uint64_t number = (2 * turns[who].turns + 1) * heaviest / (2 * weight);
	struct maglev_round *round;

	if (number >= size)
		return;
	round = &rounds[number];
	turns[who].next = MAGLEV_NOBODY;
	if (round->first == MAGLEV_NOBODY)
		round->first = who;
	else
		turns[round->last].next = who;
	round->last = who;
}

static void maglev_play(const struct fim_member *m, struct maglev_turn *turns, struct maglev_round *rounds,
			uint64_t heaviest, uint32_t *table, uint32_t size)
{
	uint32_t left = size;

	for (uint32_t now = 0; now < size; now++) {
		for (int64_t who = rounds[now].first, next; who != MAGLEV_NOBODY; who = next) {
			struct maglev_turn *t = &turns[who];

			while (table[t->at])
				t->at = t->at + t->step >= size ? t->at + t->step - size : t->at + t->step;
			table[t->at] = m[who].backend;
			if (!--left)
				return;
			next = t->next;
			t->turns++;
			maglev_queue(rounds, size, turns, who, heaviest, m[who].weight);
		}
	}
}

// `members` are n packed struct fim_member in order. Returns 0, or a negative errno.
int fim_maglev(const char *members, uint32_t n, uint32_t *table, uint32_t size)
{
	const struct fim_member *m = (const void *)members;
	struct maglev_turn *turns;
	struct maglev_round *rounds;
	uint64_t heaviest = 0;

	if (size < 2 || size > MAGLEV_MAX_SIZE)
		return -EINVAL;
	for (uint32_t i = 0; i < n; i++) {
		if (!m[i].backend)
			return -EINVAL;
		if (m[i].weight > heaviest)
			heaviest = m[i].weight;
	}
	memset(table, 0, size * sizeof(*table));
	if (!heaviest)
		return 0;
	turns = calloc(n, sizeof(*turns));
	rounds = malloc(size * sizeof(*rounds));
	if (!turns || !rounds) {
		free(turns);
		free(rounds);
		return -ENOMEM;
	}
	for (uint32_t i = 0; i < size; i++)
		rounds[i].first = MAGLEV_NOBODY;
	for (uint32_t i = 0; i < n; i++) {
		if (!m[i].weight)
			continue;
		turns[i].at = maglev_hash(0x66696d62726961, &m[i]) % size;
		turns[i].step = maglev_hash(0x6d61676c6576, &m[i]) % (size - 1) + 1;
		maglev_queue(rounds, size, turns, i, heaviest, m[i].weight);
	}
	maglev_play(m, turns, rounds, heaviest, table, size);
	free(turns);
	free(rounds);
	return 0;
}
