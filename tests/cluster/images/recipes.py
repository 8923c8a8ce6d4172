"""Which images there are, under which names, from which files, and how the folder is filled that each is built in."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from fimbria.release import RELEASE

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent.parent
REPOSITORY = "ghcr.io/fimbria/fimbria"
NEXT = f"{RELEASE}-next"
# Built in place by make, or by running: what they come from counts, and they don't.
DERIVED = ("__pycache__", "_bin", "_bpf")


@dataclass(frozen=True)
class Recipe:
    """How one image comes about: `inputs` (files, or folders with all below) decide, by content, whether it is built
    anew; `fill` puts into an empty folder what `dockerfile` copies."""

    name: str
    references: tuple[str, ...]
    dockerfile: Path
    inputs: tuple[Path, ...]
    fill: Callable[[Path], None]
    based: bool = False  # begins with our Debian, given as build argument BASE


def load(path: Path) -> ModuleType:
    """A module by its file, for what is no package. Raises ImportError."""
    spec = importlib.util.spec_from_file_location(f"fimbria_images_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


kube = load(ROOT / "tests/kube/build.py")


def _nothing(_: Path) -> None:
    """For images that are made of packages alone."""


def _pause(folder: Path) -> None:
    source = HERE / "pause/pause.c"
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Os", "-static", "-s"]
    subprocess.run(["gcc", *flags, "-o", str(folder / "pause"), str(source)], check=True)


def _copier(*tools: str, module_files: Sequence[str] = ()) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        built = kube.ensure(tools)
        for tool in tools:
            shutil.copy2(built / tool, folder / tool)
        for name in module_files:
            shutil.copyfile(kubernetes_source() / name, folder / Path(name).name)
            (folder / Path(name).name).chmod(0o644)

    return fill


def _fimbria(release: str | None) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        load(ROOT / "scripts/image_context.py").write_context(folder, release)

    return fill


def kubernetes_source() -> Path:
    """The folder of the module k8s.io/kubernetes. Raises subprocess.CalledProcessError."""
    go = shutil.which("go") or "/usr/local/go/bin/go"
    command = [go, "list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes"]
    done = subprocess.run(command, cwd=ROOT / "tests/kube", check=True, capture_output=True, text=True)
    return Path(done.stdout.strip())


def _required(go_mod: Path, module: str) -> str:
    found = re.search(rf"^(?:require )?\s*{re.escape(module)} (v\S+)", go_mod.read_text(), re.MULTILINE)
    if not found:
        raise ValueError(f"{go_mod}: no requirement on {module}")
    return found[1]


def recipes() -> dict[str, Recipe]:
    """All images by name. Names and tags of those that aren't ours are what upstream's specs and kubelets ask for."""
    binaries: Path = kube.bin_dir()
    dns = _required(ROOT / "tests/kube/coredns/go.mod", "github.com/coredns/coredns")
    ours = (*(ROOT / p for p in ("src/fimbria", "bpf", "scripts", "pyproject.toml", "requirements-runtime.lock")),)
    dockerfile = ROOT / "deploy/Dockerfile"
    e2e = "registry.k8s.io/e2e-test-images"
    every = [
        Recipe(
            "pause",
            ("registry.k8s.io/pause:3.10.1", "registry.k8s.io/pause:3.10.2"),
            HERE / "pause/Dockerfile",
            (HERE / "pause",),
            _pause,
        ),
        Recipe(
            "coredns",
            (f"registry.k8s.io/coredns/coredns:{dns}",),
            HERE / "coredns/Dockerfile",
            (HERE / "coredns", binaries / "coredns"),
            _copier("coredns"),
        ),
        Recipe(
            "agnhost",
            (f"{e2e}/agnhost:2.63.0", f"{e2e}/glibc-dns-testing:2.0.0"),
            HERE / "agnhost/Dockerfile",
            (HERE / "agnhost", binaries / "agnhost", binaries / "coredns"),
            _copier(
                "agnhost",
                "coredns",
                module_files=[f"test/images/agnhost/porter/localhost.{part}" for part in ("crt", "key")],
            ),
            based=True,
        ),
        Recipe(
            "busybox",
            (f"{e2e}/busybox:1.37.0-1",),
            HERE / "busybox/Dockerfile",
            (HERE / "busybox",),
            _nothing,
            based=True,
        ),
        Recipe(
            "nginx",
            (f"{e2e}/nginx:1.15-4", f"{e2e}/nginx:1.27-0"),
            HERE / "nginx/Dockerfile",
            (HERE / "nginx",),
            _nothing,
            based=True,
        ),
        Recipe(
            "reset",
            (f"{e2e}/regression-issue-74839:1.4",),
            HERE / "reset/Dockerfile",
            (HERE / "reset", binaries / "regression-issue-74839"),
            _copier("regression-issue-74839"),
        ),
        Recipe("fimbria", (f"{REPOSITORY}:{RELEASE}",), dockerfile, (dockerfile, *ours), _fimbria(None), based=True),
        Recipe(
            "fimbria-next",
            (f"{REPOSITORY}:{NEXT}",),
            dockerfile,
            (dockerfile, *ours),
            _fimbria(f"{RELEASE}+next"),  # as Python writes what a tag can't hold
            based=True,
        ),
    ]
    return {recipe.name: recipe for recipe in every}
