"""Opening, configuring, loading and pinning object files."""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest

from fimbria.kernel.bpf import (
    BpfError,
    BpfObject,
    ConstantError,
    Map,
    MapError,
    MapType,
    Program,
    VerifierError,
    create_map,
    prog_info,
    prog_test_run,
    program_by_id,
    unpin,
)
from fimbria.kernel.btf import Btf, enum_values
from fimbria.kernel.codec import Codec

CONSTANTS: dict[str, int | bool | bytes] = {"mark": 42, "delta": -7, "enabled": True, "mac": bytes(range(6))}


def test_what_is_in_the_file(compiled: dict[str, bytes]) -> None:
    with BpfObject(compiled["kernel"], "kernel.bpf") as obj:
        assert obj.maps["m_hash"].max_entries == 8192
        assert obj.maps["m_outer"].type == MapType.HASH_OF_MAPS
        assert obj.programs["sock_connect4"].attach_type == 10
        assert obj.constants == {"mark", "delta", "enabled", "mac"}


def test_constants_reach_the_program(loaded: BpfObject) -> None:
    with loaded.program("cls_constants") as program:
        run = prog_test_run(program.fd, bytes(64), ctx_in=bytes(192))
    assert run.retval == -7 + 5 + 3 + 7
    assert struct.unpack_from("=I", run.ctx_out, 8) == (42,)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"nope": 1}, "no such constant: nope"),
        ({"table": 1}, "no such constant: table"),
        ({"mark": 1 << 32}, "doesn't fit constant mark"),
        ({"mark": -1}, "doesn't fit constant mark"),
        ({"delta": 40000}, "doesn't fit constant delta"),
        ({"mac": b"12"}, "mac takes 6 bytes, not 2"),
        ({"mac": 5}, "mac is no integer"),
    ],
)
def test_bad_constants_are_refused(compiled: dict[str, bytes], values: dict[str, int | bytes], words: str) -> None:
    with BpfObject(compiled["kernel"]) as obj, pytest.raises(ConstantError, match=words):
        obj.set_constants(values)


def test_an_unset_constant_keeps_the_object_from_loading(compiled: dict[str, bytes]) -> None:
    with BpfObject(compiled["kernel"], "kernel") as obj:
        obj.set_constants({"mark": 1, "enabled": False})
        with pytest.raises(ConstantError, match="kernel: constants not set: delta, mac"):
            obj.load()


def test_the_verifier_is_quoted_and_nothing_is_printed(
    compiled: dict[str, bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    with BpfObject(compiled["refused"], "refused") as obj, pytest.raises(VerifierError) as caught:
        obj.load()
    assert caught.value.program == "unchecked"
    assert "invalid access to packet" in caught.value.log
    assert caught.value.errno == errno.EACCES
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"x" * 1000])
def test_rubbish_is_no_object(data: bytes) -> None:
    with pytest.raises(BpfError, match="open thing"):
        BpfObject(data, "thing")


def test_a_cut_object_is_refused(compiled: dict[str, bytes]) -> None:
    data = compiled["kernel"]
    for keep in range(0, len(data), len(data) // 50):
        with pytest.raises((BpfError, ValueError)):
            BpfObject(data[:keep], "thing").load()


def test_only_chosen_programs_load(compiled: dict[str, bytes]) -> None:
    with BpfObject(compiled["kernel"]) as obj:
        obj.set_constants(CONSTANTS)
        obj.autoload(["cls_first"])
        obj.load()
        with obj.program("cls_first") as program:
            assert prog_info(program.fd).name == "cls_first"
        with pytest.raises(BpfError, match="cls_second"):
            obj.program("cls_second")
        with pytest.raises(ValueError, match="too late"):
            obj.resize({"m_hash": 5})


def test_unknown_names_say_so(compiled: dict[str, bytes]) -> None:
    with BpfObject(compiled["kernel"], "kernel") as obj:
        with pytest.raises(KeyError, match="kernel has no map 'nope'"):
            obj.resize({"nope": 1})
        with pytest.raises(KeyError, match="kernel has no program 'nope'"):
            obj.autoload(["nope"])


def test_maps_are_shared_between_objects(compiled: dict[str, bytes]) -> None:
    with (
        create_map(MapType.ARRAY, 4, 8, 4, name="m_array") as shared,
        BpfObject(compiled["kernel"], "kernel") as obj,
    ):
        obj.set_constants(CONSTANTS)
        obj.reuse({"m_array": shared})
        obj.load()
        with obj.program("cls_second") as program:
            prog_test_run(program.fd, b"\0" * 12 + b"\x08\x00" + bytes(50), repeat=3)
            assert shared.info.id in prog_info(program.fd).map_ids
        assert shared.lookup(struct.pack("=I", 1)) == struct.pack("=Q", 3)


def test_a_map_of_maps_is_shared_with_what_is_in_it(compiled: dict[str, bytes], loaded: BpfObject) -> None:
    with loaded.map("m_outer") as outer, create_map(MapType.HASH, 4, 4, 16) as inner:
        inner.update(struct.pack("=I", 7), struct.pack("=I", 99))
        outer.update(struct.pack("=I", 7), struct.pack("=I", inner.fd))
        with BpfObject(compiled["kernel"], "second") as obj:
            obj.set_constants(CONSTANTS)
            obj.reuse({"m_outer": outer})
            obj.load()
            with obj.program("cls_inner") as program:
                assert prog_test_run(program.fd, bytes(64)).retval == 99


def test_a_map_of_another_shape_is_not_reused(compiled: dict[str, bytes]) -> None:
    with create_map(MapType.ARRAY, 4, 8, 5) as other, BpfObject(compiled["kernel"], "kernel") as obj:
        with pytest.raises(MapError, match="m_array") as caught:
            obj.reuse({"m_array": other})
        assert caught.value.errno == errno.EINVAL
        obj.resize({"m_array": 5})
        obj.reuse({"m_array": other})


def test_pins_outlive_the_object_and_are_replaced_in_one_step(compiled: dict[str, bytes], bpffs: Path) -> None:
    for generation in range(2):
        with BpfObject(compiled["kernel"]) as obj:
            obj.set_constants(CONSTANTS | {"mark": generation})
            obj.load()
            with obj.map("m_hash") as m, obj.program("cls_constants") as p:
                m.pin(bpffs / "m_hash-abc")
                p.pin(bpffs / "constants")
                m.update(bytes(8), struct.pack("=Q", generation))
    ours = sorted(p.name for p in bpffs.iterdir() if not p.name.endswith(".debug"))  # the kernel's own iterators
    assert ours == ["constants", "m_hash-abc"]
    with Map.open(bpffs / "m_hash-abc") as m, Program.open(bpffs / "constants") as p:
        assert m.lookup(bytes(8)) == struct.pack("=Q", 1)
        run = prog_test_run(p.fd, bytes(64), ctx_in=bytes(192))
        assert struct.unpack_from("=I", run.ctx_out, 8) == (1,)
    assert unpin(bpffs / "constants") and not unpin(bpffs / "constants")
    with pytest.raises(BpfError, match="open pin") as caught:
        Program.open(bpffs / "constants")
    assert caught.value.errno == errno.ENOENT


def test_pinning_outside_a_bpffs_fails(loaded: BpfObject, tmp_path: Path) -> None:
    with loaded.map("m_hash") as m, pytest.raises(BpfError, match="pin "):
        m.pin(tmp_path / "x")
    assert not list(tmp_path.glob("x*"))


def test_a_program_is_found_by_id(loaded: BpfObject) -> None:
    with loaded.program("cls_emit") as program:
        info = prog_info(program.fd)
        with program_by_id(info.id) as again:
            assert prog_info(again.fd) == info
        assert len(info.tag) == 16 and info.verified_insns > 0


def test_handles_close_once(loaded: BpfObject) -> None:
    program = loaded.program("cls_emit")
    program.close()
    program.close()
    with pytest.raises(ValueError, match="Program is closed"):
        _ = program.fd


@dataclass(frozen=True)
class Sample:
    """`struct sample` of the test object."""

    name: str
    wide: int
    small: int
    port: int
    flag: bool
    mac: bytes
    list: tuple[int, ...]
    colour: int


def test_the_codec_agrees_with_the_compiler(compiled: dict[str, bytes]) -> None:
    btf = Btf.from_elf(compiled["kernel"])
    codec = Codec(btf, "struct sample", Sample)
    want = Sample("eth0", 0x1122334455667788, -2, 8080, True, b"\2\0\0\0\0\t", (7, 8, 9), -1)
    with BpfObject(compiled["kernel"], "kernel") as obj:
        obj.set_constants(CONSTANTS)
        obj.load()
        with obj.map("kernel.rodata") as rodata:
            content = rodata.lookup(bytes(4))
    assert content is not None
    encoded = codec.encode(want)
    assert encoded in content
    assert codec.decode(encoded) == want
    assert enum_values(btf, "colour") == {"RED": 3, "BLUE": -1}
