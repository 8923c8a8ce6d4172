"""Names of the datapath's enumerations, out of the BTF of `layout.bpf.o`: there is no second list to keep."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path

from fimbria.kernel.btf import Btf, enum_values


def layout_object() -> bytes:
    """The object that holds the BTF of all shared types."""
    return (Path(str(files("fimbria"))) / "_bpf" / "layout.bpf.o").read_bytes()


@cache
def enum_names(enum: str, prefix: str) -> dict[int, str]:
    """Value -> name without `prefix`. Raises BtfError for an unknown enumeration."""
    btf = Btf.from_elf(layout_object())
    return {value: name.removeprefix(prefix) for name, value in enum_values(btf, enum).items()}


def drop_reason_name(reason: int) -> str:
    """As the Hubble flow API names it."""
    return enum_names("drop_reason", "DROP_").get(reason, f"REASON_{reason}")
