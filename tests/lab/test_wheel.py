"""The wheel, installed as on a node: no source tree, no compiler, nothing but what the runtime lock names."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fimbria.release import RELEASE

ROOT = Path(__file__).parents[2]
COMPILERS = re.compile(r"(.*-)?(gcc|g\+\+|cc|c\+\+|cpp|clang|clang\+\+|ld|as|make|llc)(\.bfd|\.gold)?(-[\d.]+)?")
LICENSES = {"LICENSE", "THIRD-PARTY.md", "bpf/LICENSE.BSD-2-Clause", "bpf/LICENSE.GPL-2.0"}


def run(argv: list[str], timeout: float = 120, **settings: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False, **settings)
    assert done.returncode == 0, f"{argv} ended with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)], cwd=ROOT)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def commands(wheel: Path) -> Path:
    """The directory with the commands of a fresh virtual environment that has the wheel."""
    venv = wheel.parent / "venv"
    run([sys.executable, "-m", "venv", str(venv)])
    pip = [str(venv / "bin/pip"), "install", "-q", "--disable-pip-version-check"]
    run([*pip, "--require-hashes", "-r", str(ROOT / "requirements-runtime.lock")], timeout=240)
    run([*pip, "--no-deps", "--no-index", str(wheel)])
    run([str(venv / "bin/pip"), "check"])
    return venv / "bin"


def compilers() -> set[Path]:
    """The files behind all commands of this machine that compile or link."""
    places = [p for d in ("/usr/bin", "/usr/local/bin") for p in Path(d).iterdir() if COMPILERS.fullmatch(p.name)]
    return {p.resolve() for p in places if p.exists()}


@pytest.fixture
def bare_node(commands: Path) -> Iterator[list[str]]:
    """A command prefix: the mounts of this machine, without the source tree and without anything that compiles."""
    holder = subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sleep", "600"])
    prefix = ["nsenter", "--mount", f"--target={holder.pid}", "--wd=/"]
    try:
        ours = os.readlink("/proc/self/ns/mnt")
        while os.readlink(f"/proc/{holder.pid}/ns/mnt") == ours:
            assert holder.poll() is None
        run([*prefix, "umount", "--all", "--types", "nsfs"])  # our copy would keep other labs' namespaces alive
        run([*prefix, "mount", "-t", "tmpfs", "-o", "size=4k", "none", str(ROOT)])
        for path in compilers():
            run([*prefix, "mount", "--bind", "/dev/null", str(path)])
        yield prefix
    finally:
        holder.kill()
        holder.wait()


def test_contents(wheel: Path) -> None:
    assert re.fullmatch(rf"fimbria-{re.escape(RELEASE)}-cp311-abi3-manylinux_2_\d+_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"fimbria-{RELEASE}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        modes = {n: archive.getinfo(n).external_attr >> 16 & 0o777 for n in names}
    assert {f"fimbria/_bpf/{p.stem}.o" for p in (ROOT / "bpf").glob("*.bpf.c")} == under(names, "fimbria/_bpf/")
    assert under(names, "fimbria/_bin/") == {f"fimbria/_bin/{n}" for n in ("fimbria-cni", "labrun", "labtool")}
    assert all(modes[n] & 0o111 for n in under(names, "fimbria/_bin/"))
    assert {f"fimbria/crds/{p.name}" for p in (ROOT / "src/fimbria/crds").iterdir() if p.suffix == ".yaml"} <= names
    assert {n.removeprefix(f"{info}/licenses/") for n in under(names, f"{info}/licenses/")} == LICENSES
    assert {n.split("/")[0] for n in names} == {"fimbria", info}
    odd = [n for n in names if n.endswith((".c", ".h", ".pyc", "Makefile")) or "/test" in n]
    assert odd == []
    assert f"\nVersion: {RELEASE}\n" in metadata
    assert metadata.endswith((ROOT / "README.md").read_text())


def under(names: set[str], prefix: str) -> set[str]:
    return {n for n in names if n.startswith(prefix)}


def test_no_path_of_the_building_machine(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        told = [n for n in archive.namelist() if str(ROOT).encode() in archive.read(n)]
    assert told == []


def test_demo(commands: Path, bare_node: list[str], lab_name: str) -> None:
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
    fimbria = [*bare_node, str(commands / "fimbria")]
    for gone in ("gcc", "clang-19"):
        if shutil.which(gone, path=environment["PATH"]):
            assert subprocess.run([*bare_node, gone, "--version"], capture_output=True, check=False).returncode != 0
    assert not subprocess.run([*bare_node, "ls", str(ROOT)], capture_output=True, check=True).stdout
    assert "Run the agent" in run([*fimbria, "--help"], env=environment).stdout
    try:
        shown = run([*fimbria, "demo", "--name", lab_name, "--plain"], env=environment).stdout
    finally:
        run([*fimbria, "lab", "down", "--name", lab_name], env=environment)
    after = shown.split("after the policies")[1].split("\n\n")[0]
    assert "✓ open" in after
    assert "✗ dropped (new)" in after
    assert "denied by CiliumNetworkPolicy" in shown
