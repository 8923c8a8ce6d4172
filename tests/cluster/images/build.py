"""Builds images without Docker and without a registry: buildah in a chroot over a Debian made by mmdebstrap.

Archives land in ``${FIMBRIA_CACHE:-~/.cache/fimbria}/images``, named by the content of what they were built from, so a
second run only compares. Layers are kept there too: a change of our sources alone costs seconds.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.images.archive import write_archive
from tests.cluster.images.recipes import DERIVED, ROOT, Recipe, recipes

SUITE = "bookworm"
KEPT = 2  # archives of an image: the newest, and the one that another run may be reading
LAYERS = 400
NEEDED = ("buildah", "mmdebstrap", "gcc")


class ImageError(RuntimeError):
    """An image can't be built; the message names it and says why."""


def cache_dir() -> Path:
    return Path(os.environ.get("FIMBRIA_CACHE") or Path.home() / ".cache" / "fimbria") / "images"


def ensure(names: Sequence[str] = ()) -> dict[str, Path]:
    """The archives of the images asked for, or of all, by name; what is missing or outdated is built. A second caller
    waits for the first one's lock. Raises ImageError."""
    known = recipes()
    if unknown := [name for name in names if name not in known]:
        raise ImageError(f"no image {', '.join(unknown)}; there are {', '.join(known)}")
    if absent := [tool for tool in NEEDED if shutil.which(tool) is None]:
        raise ImageError(f"no {', '.join(absent)} here: scripts/setup --test installs what tests need")
    cache_dir().mkdir(parents=True, exist_ok=True)
    wanted = {name: known[name] for name in names or known}
    # archives appear whole: who needs nothing built needn't wait for who builds something else
    found = {name: _archive(recipe) for name, recipe in wanted.items()}
    if all(map(_kept, found.values())):
        return found
    with _locked(cache_dir() / "lock"):
        return {name: _ensure(recipe) for name, recipe in wanted.items()}


def content_hash(recipe: Recipe) -> str:
    """Twelve hex digits over names and contents of all that the image comes from."""
    digest = hashlib.sha256()
    for path in [*_files(recipe.inputs), *([Path(__file__)] if recipe.based else [])]:
        data = path.read_bytes()
        digest.update(f"{recipe.references} {path.name} {path.stat().st_mode & 0o111} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()[:12]


def _files(inputs: Sequence[Path]) -> Iterator[Path]:
    for path in inputs:
        if not path.is_dir():
            yield path
            continue
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(set(folders) - set(DERIVED))
            yield from (Path(folder, name) for name in sorted(names) if not name.endswith((".so", ".pyc", ".tmp")))


def _archive(recipe: Recipe) -> Path:
    """Where the image's archive is, or will be."""
    from tests.cluster.images.recipes import kube

    kube.ensure([path.name for path in recipe.inputs if path.parent == kube.bin_dir()])
    return cache_dir() / f"{recipe.name}-{content_hash(recipe)}.tar"


def _kept(archive: Path) -> bool:
    """True if it is there. What is used last is kept longest."""
    try:
        os.utime(archive)
    except FileNotFoundError:
        return False
    return True


def _ensure(recipe: Recipe) -> Path:
    out = _archive(recipe)
    if _kept(out):
        return out
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"{recipe.name}-", dir=cache_dir()) as scratch:
        context, layout = Path(scratch, "context"), Path(scratch, "layout")
        _fill(recipe, context)
        _build(recipe, context, layout)
        write_archive(layout, recipe.references, out)
    for old in sorted(cache_dir().glob(f"{recipe.name}-{'?' * 12}.tar"), key=lambda p: -p.stat().st_mtime)[KEPT:]:
        old.unlink()
    _say(f"{recipe.name}: {out.stat().st_size / 1e6:.0f} MB in {time.monotonic() - started:.0f} s")
    return out


def _fill(recipe: Recipe, context: Path) -> None:
    """The context is kept where filling it anew would mean downloading anew."""
    context.mkdir()
    wheels = cache_dir() / "wheelhouse"
    if recipe.name.startswith("fimbria") and wheels.exists():
        shutil.copytree(wheels, context / "wheelhouse")
    try:
        recipe.fill(context)
    except (OSError, ValueError, RuntimeError, subprocess.CalledProcessError) as error:
        raise ImageError(f"{recipe.name}: {error}") from error
    if (context / "wheelhouse").exists():
        shutil.rmtree(wheels, ignore_errors=True)
        shutil.copytree(context / "wheelhouse", wheels)


def _build(recipe: Recipe, context: Path, layout: Path) -> None:
    arguments = ["--build-arg", f"BASE={_base()}"] if recipe.based else []
    command = ["bud", "-q", "--isolation", "chroot", "--layers", "--pull-never", *arguments]
    image = _buildah([*command, "-f", str(recipe.dockerfile), str(context)], recipe.name).split()[-1]
    _buildah(["push", "-q", "--disable-compression", image, f"oci:{layout}"], recipe.name)


def _base() -> str:
    """A minimal Debian as an image in buildah's storage; made once for each text of this recipe. Buildah doesn't say
    which layers are of use no more: when they have piled up, all are made anew."""
    if len(_buildah(["images", "--all", "--quiet"], "base").split()) > LAYERS:
        _buildah(["rmi", "--all", "--force"], "base")
    options = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "info", "locale")]
    recipe = ["--variant=minbase", *options, SUITE]
    name = f"localhost/fimbria-base:{hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]}"
    if name in _buildah(["images", "--format", "{{.Name}}:{{.Tag}}"], "base").split():
        return name
    with tempfile.TemporaryDirectory(prefix="base-", dir=cache_dir()) as scratch:
        _run(["mmdebstrap", "-q", *recipe, f"{scratch}/base.tar", _mirror()], "base")
        Path(scratch, "Dockerfile").write_text('FROM scratch\nADD base.tar /\nCMD ["bash"]\n')
        _buildah(["bud", "-q", "--isolation", "chroot", "-t", name, scratch], "base")
    return name


def _mirror() -> str:
    """Where this machine's apt gets the suite from."""
    command = ["apt-get", "indextargets", "--format", "$(CODENAME) $(SITE)", "Created-By: Packages"]
    for line in _run(command, "base").splitlines():
        suite, _, site = line.partition(" ")
        if suite == SUITE:
            return site
    raise ImageError(f"base: no mirror of Debian {SUITE} is configured on this machine")


def _buildah(arguments: Sequence[str], image: str) -> str:
    store = ["--root", str(cache_dir() / "storage"), "--runroot", "/run/fimbria-images", "--storage-driver", "overlay"]
    return _run(["buildah", *store, *arguments], image)


def _run(command: Sequence[str], image: str) -> str:
    done = subprocess.run(["nice", "-n", "5", *command], capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode != 0:
        raise ImageError(f"{image}: {command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process is building images; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _say(message: str) -> None:
    print(f"images: {message}", file=sys.stderr, flush=True)
