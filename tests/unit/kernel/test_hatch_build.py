"""What the wheel's build hook decides."""

from __future__ import annotations

import importlib.util
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


def test_every_step_has_what_it_needs(hook: ModuleType) -> None:
    root = Path(hook.__file__ or "").parents[1]
    *makes, extension = hook.build_steps()
    assert [command[:2] for command in makes] == [["make", "-C"]] * 3
    assert all((root / command[2] / "Makefile").exists() for command in makes)
    assert (root / extension[1]).exists()
