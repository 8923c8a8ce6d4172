"""Builds ``_libbpf.abi3.so``, the cffi extension over a statically linked libbpf.

Run as ``python -m fimbria.kernel.build_libbpf``, or as a plain script (the wheel's build hook does, because the package
isn't installed yet at that point). It needs a C compiler, Python's headers, and the static archives of libbpf >= 1.4,
libelf, zlib and zstd. Only the C library stays dynamic, so the wheel doesn't depend on what a node has installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
SOURCES = tuple(HERE / f"{name}_helpers.c" for name in ("libbpf", "sweep", "maglev"))
TARGET = HERE / "_libbpf.abi3.so"

CDEF = """
struct bpf_object; struct bpf_map; struct bpf_program; struct fim_ring;

void fim_init(void);
void fim_log_reset(void);
const char *fim_log(size_t *len);

struct bpf_object *fim_open(const char *data, size_t len, const char *name);
int bpf_object__load(struct bpf_object *obj);
void bpf_object__close(struct bpf_object *obj);
struct bpf_map *bpf_object__next_map(const struct bpf_object *obj, const struct bpf_map *map);
struct bpf_program *bpf_object__next_program(const struct bpf_object *obj, struct bpf_program *prog);
struct bpf_map *bpf_object__find_map_by_name(const struct bpf_object *obj, const char *name);
const char *fim_raw_btf(struct bpf_object *obj, uint32_t *len);
struct fim_var {
    const char *section; const char *name; uint32_t offset, size, kind; int is_signed, is_volatile;
};
int fim_vars(struct bpf_object *obj, struct fim_var *out, int cap);

const char *bpf_map__name(const struct bpf_map *map);
int bpf_map__fd(const struct bpf_map *map);
uint32_t bpf_map__type(const struct bpf_map *map);
uint32_t bpf_map__key_size(const struct bpf_map *map);
uint32_t bpf_map__value_size(const struct bpf_map *map);
uint32_t bpf_map__max_entries(const struct bpf_map *map);
uint32_t bpf_map__map_flags(const struct bpf_map *map);
bool bpf_map__is_internal(const struct bpf_map *map);
int bpf_map__set_max_entries(struct bpf_map *map, uint32_t max_entries);
int bpf_map__set_autocreate(struct bpf_map *map, bool autocreate);
bool bpf_map__autocreate(const struct bpf_map *map);
int bpf_map__reuse_fd(struct bpf_map *map, int fd);
int bpf_map__set_inner_map_fd(struct bpf_map *map, int fd);
void *bpf_map__initial_value(const struct bpf_map *map, size_t *psize);

const char *bpf_program__name(const struct bpf_program *prog);
const char *bpf_program__section_name(const struct bpf_program *prog);
int bpf_program__fd(const struct bpf_program *prog);
uint32_t bpf_program__type(const struct bpf_program *prog);
uint32_t bpf_program__expected_attach_type(const struct bpf_program *prog);
bool bpf_program__autoload(const struct bpf_program *prog);
int bpf_program__set_autoload(struct bpf_program *prog, bool autoload);

int bpf_obj_pin(int fd, const char *pathname);
int bpf_obj_get(const char *pathname);

int fim_map_create(uint32_t type, const char *name, uint32_t key_size, uint32_t value_size, uint32_t max_entries,
                   uint32_t flags, int inner_fd, uint64_t map_extra, int btf_fd, uint32_t btf_key, uint32_t btf_value);
struct fim_map_info {
    uint32_t type, id, key_size, value_size, max_entries, flags, btf_id, btf_key, btf_value; uint64_t extra;
    char name[16];
};
int fim_map_info(int fd, struct fim_map_info *out);
int fim_map_lookup(int fd, const char *key, char *value, uint64_t flags);
int fim_map_update(int fd, const char *key, const char *value, uint64_t flags);
int fim_map_delete(int fd, const char *key);
int fim_map_update_batch(int fd, const char *keys, const char *values, uint32_t key_size, uint32_t value_size,
                         uint32_t n, uint64_t flags, uint32_t *done);
int fim_map_delete_batch(int fd, const char *keys, uint32_t key_size, uint32_t n, int missing_ok, uint32_t *deleted,
                         uint32_t *pos);
struct fim_dump { char *keys; char *values; uint32_t count; };
int fim_map_dump(int fd, uint32_t key_size, uint32_t value_size, uint32_t max_entries, struct fim_dump *out);
void fim_dump_free(struct fim_dump *d);
int bpf_map_freeze(int fd);
int libbpf_num_possible_cpus(void);

int fim_walk(int fd, char *in, char *out, char *keys, char *values, uint32_t *count);
struct fim_rows {
    char *keys; char *values; uint64_t *before; uint32_t count, key_size, value_size, stamp;
};
struct fim_groups {
    uint32_t offset, count; const uint32_t *numbers; const uint64_t *before; uint64_t other;
};
void fim_keep_expired(struct fim_rows *rows, const struct fim_groups *groups);
void fim_keep_living(struct fim_rows *rows, uint64_t now);
void fim_keep_numbers(struct fim_rows *rows, uint32_t offset, const uint32_t *numbers, uint32_t count);
int fim_add(int fd, const struct fim_rows *rows);
int fim_take(int fd, const struct fim_rows *rows, char *value, uint32_t *renewed);
struct fim_nat {
    int ct_fd;
    uint32_t saddr, daddr, sport, dport, proto, direction;
    uint32_t addr, port, flags, frontend, frontend_port;
    uint32_t local, remote, local_port, remote_port, ct_proto, scope;
    uint32_t ct_key_size, ct_value_size, expires;
    uint32_t of_service, scope_service, direction_in;
    uint64_t now, recent, lonely;
};
struct fim_tally { uint32_t counts[65536]; uint32_t most, rows; char key[256]; };
int fim_nat_keep_over(const struct fim_nat *n, struct fim_rows *rows, struct fim_tally *t);

int fim_link_create(int prog_fd, int target, int attach_type, uint32_t flags, uint32_t relative, uint64_t revision);
int fim_link_update(int link_fd, int prog_fd, int old_prog_fd);
int bpf_link_detach(int link_fd);
int fim_prog_query(int target, int attach_type, uint32_t query_flags, uint32_t cap, uint32_t *prog_ids,
                   uint32_t *link_ids, uint32_t *count, uint64_t *revision);
struct fim_link_info { uint32_t type, id, prog_id, attach_type, ifindex; uint64_t cgroup_id; };
int fim_link_info(int fd, struct fim_link_info *out);
struct fim_prog_info {
    uint32_t type, id, nr_map_ids, verified_insns, xlated_len, jited_len; uint64_t load_time, run_time_ns, run_cnt;
    unsigned char tag[8]; char name[16];
};
int fim_prog_info(int fd, struct fim_prog_info *out, uint32_t *map_ids, uint32_t cap);
int bpf_prog_get_next_id(uint32_t start_id, uint32_t *next_id);
int bpf_map_get_next_id(uint32_t start_id, uint32_t *next_id);
int bpf_link_get_next_id(uint32_t start_id, uint32_t *next_id);
int bpf_prog_get_fd_by_id(uint32_t id);
int bpf_map_get_fd_by_id(uint32_t id);
int bpf_link_get_fd_by_id(uint32_t id);
int bpf_btf_get_fd_by_id(uint32_t id);

int fim_tc_qdisc(int ifindex);
int fim_tc_attach(int ifindex, int egress, int prog_fd, uint32_t handle, uint32_t prio, int replace, uint32_t *prog_id);
int fim_tc_query(int ifindex, int egress, uint32_t handle, uint32_t prio, uint32_t *prog_id);
int fim_tc_detach(int ifindex, int egress, uint32_t handle, uint32_t prio);

struct fim_test_run {
    const char *data_in; uint32_t data_in_len; char *data_out; uint32_t data_out_len;
    const char *ctx_in; uint32_t ctx_in_len; char *ctx_out; uint32_t ctx_out_len;
    uint32_t repeat, flags, retval, duration_ns;
};
int fim_prog_test_run(int fd, struct fim_test_run *r);

struct fim_ring { char *data; uint32_t *ends; ...; };
struct fim_ring *fim_ring_new(int map_fd);
int fim_ring_fd(struct fim_ring *r);
int fim_ring_drain(struct fim_ring *r, uint32_t max);
void fim_ring_free(struct fim_ring *r);

const char *libbpf_version_string(void);

int fim_maglev(const char *members, uint32_t n, uint32_t *table, uint32_t size);

int fim_socket_in(int netns_fd, int domain, int type, int protocol);
int fim_netns_create(const char *path);
int fim_setns(int netns_fd);
int fim_umount(const char *path);
"""


def emit(path: Path) -> None:
    """Writes the generated C source to `path`."""
    ffi = FFI()
    ffi.cdef(CDEF)
    source = "".join(f'#include "{p.name}"\n' for p in SOURCES)
    ffi.set_source("fimbria.kernel._libbpf", source, py_limited_api=True)
    ffi.emit_c_code(str(path))


def compile_command(source: Path, output: Path) -> list[str]:
    """The one compiler call that turns the generated source into the extension."""
    static = ["-Wl,-Bstatic", "-lbpf", "-lelf", "-lz", "-lzstd", "-Wl,-Bdynamic"]
    return [
        *os.environ.get("CC", "cc").split(),
        *("-shared", "-fPIC", "-O2", "-g0", "-Wall", "-Wno-deprecated-declarations", "-pthread"),
        "-DPy_LIMITED_API=0x030b0000",
        # Symbols of the archives stay inside: another extension of the process may carry its own libelf or zlib.
        *("-Wl,--exclude-libs,ALL", "-Wl,-z,relro,-z,now", "-s"),
        # cffi's checks name the file that they stand in.
        *(f"-I{HERE}", f"-I{sysconfig.get_path('include')}", f"-ffile-prefix-map={source.parent}=."),
        str(source),
        *("-o", str(output)),
        *static,
    ]


def build(target: Path = TARGET) -> Path:
    """Builds the extension and moves it into place in one step, so that a running agent never maps a half-written file.

    Raises subprocess.CalledProcessError when the compiler fails.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as tmp:
        source, output = Path(tmp, "_libbpf.c"), Path(tmp, target.name)
        emit(source)
        subprocess.run(compile_command(source, output), check=True)
        output.replace(target)
    return target


def up_to_date(target: Path = TARGET) -> bool:
    """True when the extension is newer than the files it is made from."""
    if not target.exists():
        return False
    return target.stat().st_mtime >= max(p.stat().st_mtime for p in (*SOURCES, Path(__file__)))


if __name__ == "__main__":
    if "--force" in sys.argv[1:] or not up_to_date():
        print(build())
