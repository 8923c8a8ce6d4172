"""What the wheel's build hook decides."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    """The hook, which is a script and no module of the package."""
    path = Path(__file__).parents[3] / "scripts" / "hatch_build.py"
    spec = importlib.util.spec_from_file_location("hatch_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_wheel_is_for_the_stable_abi_of_one_platform(hook: ModuleType) -> None:
    python, abi, platform = hook.wheel_tag().split("-")
    assert (python, abi) == ("cp311", "abi3")
    assert platform.startswith("linux_")


def test_only_what_exists_is_built(hook: ModuleType, tmp_path: Path) -> None:
    extension = [sys.executable, "src/fimbria/kernel/build_libbpf.py"]
    assert hook.build_steps(tmp_path) == [extension]
    for name in ("bpf", "cni-shim"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "Makefile").touch()
    assert hook.build_steps(tmp_path) == [["make", "-C", "bpf"], ["make", "-C", "cni-shim"], extension]
