// DPDK's hash table and its longest-prefix match, over the keys, the routes and the order that forwarder/benches/pipeline.rs writes.
//
//   lookup KEYS [EAL options]
//
// Commands on standard input, a line each: `hash BURSTS`, `lpm BURSTS` or `both BURSTS`. The answer is the median of ns per packet
// over so many bursts of 64. Keys lie in the cache when a lookup starts, as headers do after they were parsed.

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include <rte_eal.h>
#include <rte_hash.h>
#include <rte_hash_crc.h>
#include <rte_lpm.h>
#include <rte_memory.h>
#include <valgrind/callgrind.h>

#define BURST 64
#define KEY_LEN 16

struct route {
	uint32_t prefix;
	uint32_t len;
};

struct sample {
	uint32_t flow;
	uint32_t leaves_for;
};

static uint32_t flows, samples, routes;
static uint8_t (*keys)[KEY_LEN];
static struct route *route;
static struct sample *sample;

static void die(const char *what)
{
	fprintf(stderr, "lookup: %s\n", what);
	exit(1);
}

static void *read_array(FILE *file, size_t count, size_t size)
{
	void *array = malloc(count * size + 1);
	if (array == NULL || fread(array, size, count, file) != count)
		die("the file of keys is cut off");
	return array;
}

static void read_keys(const char *path)
{
	FILE *file = fopen(path, "r");
	if (file == NULL)
		die("cannot open the file of keys");
	uint32_t *counts = read_array(file, 3, sizeof(*counts));
	flows = counts[0], samples = counts[1], routes = counts[2];
	keys = read_array(file, flows, sizeof(*keys));
	route = read_array(file, routes, sizeof(*route));
	sample = read_array(file, samples, sizeof(*sample));
	fclose(file);
}

// As our own tables have it; without huge pages set aside by the administrator this is the next best.
static int ask_for_huge_pages(const struct rte_memseg_list *list, void *unused)
{
	(void)unused;
	madvise(list->base_va, list->len, MADV_HUGEPAGE);
	return 0;
}

static struct rte_hash *make_hash(void)
{
	struct rte_hash_parameters parameters = {
		.name = "flows",
		.entries = flows < 1024 ? 1024 : flows + flows / 4,
		.key_len = KEY_LEN,
		.hash_func = rte_hash_crc,
		.socket_id = SOCKET_ID_ANY,
	};
	struct rte_hash *hash = rte_hash_create(&parameters);
	if (hash == NULL)
		die("no memory for the hash table");
	for (uint32_t i = 0; i < flows; i++)
		if (rte_hash_add_key(hash, keys[i]) < 0)
			die("the hash table is full");
	return hash;
}

static struct rte_lpm *make_lpm(void)
{
	struct rte_lpm_config config = { .max_rules = routes + 16, .number_tbl8s = routes / 4 + 256 };
	struct rte_lpm *lpm = rte_lpm_create("routes", SOCKET_ID_ANY, &config);
	if (lpm == NULL)
		die("no memory for the routes");
	for (uint32_t i = 0; i < routes; i++)
		if (rte_lpm_add(lpm, route[i].prefix, route[i].len, 0) < 0)
			die("cannot add a route");
	// The endpoints' side; everything else by two halves of a default route.
	if (rte_lpm_add(lpm, 10u << 24 | 128u << 16, 9, 1) < 0 || rte_lpm_add(lpm, 0, 1, 0) < 0 ||
	    rte_lpm_add(lpm, 1u << 31, 1, 0) < 0)
		die("cannot add a route");
	return lpm;
}

static uint64_t now_ns(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
	const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return (x > y) - (x < y);
}

// The low 24 bits are the next hop.
static int is_inside(uint32_t result)
{
	return (result & RTE_LPM_LOOKUP_SUCCESS) != 0 && (result & 0xffffff) == 1;
}

static double measure(const struct rte_hash *hash, struct rte_lpm *lpm, uint32_t bursts)
{
	static uint32_t cursor;
	uint64_t *spent = calloc(bursts, sizeof(*spent));
	CALLGRIND_START_INSTRUMENTATION;
	for (uint32_t burst = 0; burst < bursts; burst++) {
		uint8_t key[BURST][KEY_LEN];
		const void *pointer[BURST];
		int32_t position[BURST] = { 0 };
		uint32_t address[BURST], next_hop[BURST] = { 0 };
		for (int i = 0; i < BURST; i++) {
			const struct sample *s = &sample[cursor++ % samples];
			memcpy(key[i], keys[s->flow], KEY_LEN);
			pointer[i] = key[i];
			address[i] = s->leaves_for;
		}
		const uint64_t start = now_ns();
		CALLGRIND_TOGGLE_COLLECT;
		if (hash != NULL)
			rte_hash_lookup_bulk(hash, pointer, BURST, position);
		if (lpm != NULL)
			rte_lpm_lookup_bulk(lpm, address, next_hop, BURST);
		CALLGRIND_TOGGLE_COLLECT;
		spent[burst] = now_ns() - start;
		for (int i = 0; i < BURST; i++)
			if (position[i] < 0 || (lpm != NULL && !is_inside(next_hop[i])))
				die("a key or a route was not found");
	}
	CALLGRIND_DUMP_STATS;
	CALLGRIND_STOP_INSTRUMENTATION;
	qsort(spent, bursts, sizeof(*spent), by_value);
	const double median = (double)spent[bursts / 2] / BURST;
	free(spent);
	return median;
}

int main(int argc, char **argv)
{
	if (argc < 2)
		die("usage: lookup KEYS [EAL options]");
	read_keys(argv[1]);
	if (rte_eal_init(argc - 1, argv + 1) < 0)
		die("DPDK does not start");
	rte_memseg_list_walk(ask_for_huge_pages, NULL);
	struct rte_hash *hash = make_hash();
	struct rte_lpm *lpm = make_lpm();
	printf("{\"flows\": %" PRIu32 ", \"routes\": %" PRIu32 "}\n", flows, routes);
	fflush(stdout);
	char word[16];
	uint32_t bursts;
	while (scanf("%15s %" SCNu32, word, &bursts) == 2) {
		const int has_hash = strcmp(word, "lpm") != 0, has_lpm = strcmp(word, "hash") != 0;
		printf("%.3f\n", measure(has_hash ? hash : NULL, has_lpm ? lpm : NULL, bursts ? bursts : 1));
		fflush(stdout);
	}
	return 0;
}
