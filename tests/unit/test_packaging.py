"""What the wheel's build hook decides, and that the two locks and the package agree."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from fimbria.release import RELEASE

ROOT = Path(__file__).parents[2]
PINNED = re.compile(r"^([a-z0-9-]+)==(\S+)", re.MULTILINE)


def load_hook():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "scripts/hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hook = load_hook()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pinned(name: str) -> dict[str, str]:
    return dict(PINNED.findall((ROOT / name).read_text()))


def test_version_is_read_from_the_release() -> None:
    where = PROJECT["tool"]["hatch"]["version"]
    found = re.search(where["pattern"], (ROOT / where["path"]).read_text())
    assert found is not None
    assert found["version"] == RELEASE


def test_every_object_of_the_tree_is_a_product() -> None:
    names = {str(p.relative_to(ROOT)) for p in hook.products(ROOT)}
    assert {f"src/fimbria/_bpf/{p.stem}.o" for p in (ROOT / "bpf").glob("*.bpf.c")} < names
    assert "src/fimbria/_bpf/pod.bpf.o" in names
    assert "src/fimbria/_bin/fimbria-cni" in names
    assert "src/fimbria/kernel/_libbpf.abi3.so" in names


def test_tag_names_the_newest_glibc_that_is_needed() -> None:
    lines = "  0x0010:   Name: GLIBC_2.9\n  0x0020:   Name: GLIBC_2.34\n  0x0030:   Name: GLIBC_2.2.5\n"
    assert hook.wheel_tag(lines, "x86_64") == "cp311-abi3-manylinux_2_34_x86_64"


def test_tag_of_an_extension_without_glibc_is_an_error() -> None:
    with pytest.raises(ValueError, match="no version of glibc"):
        hook.wheel_tag("No version information found in this file.", "x86_64")


def test_runtime_lock_is_part_of_the_lock() -> None:
    everything, runtime = pinned("requirements.lock"), pinned("requirements-runtime.lock")
    assert runtime.items() <= everything.items()
    wanted = {re.split(r"[><=]", d)[0] for d in PROJECT["project"]["dependencies"]}
    assert wanted <= runtime.keys()
    assert not runtime.keys() & {"pytest", "mypy", "ruff", "hypothesis", "scapy", "hatchling"}


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-runtime.lock"])
def test_locked_packages_have_hashes(name: str) -> None:
    text = (ROOT / name).read_text()
    blocks = re.split(r"^(?=[a-z0-9-]+==)", text, flags=re.MULTILINE)[1:]
    assert [b.splitlines()[0] for b in blocks if "--hash=sha256:" not in b] == []
