#!/usr/bin/env python3
"""Writes what deploy/Dockerfile is built from into a folder: our wheel, the lock file, the wheels that it names.

The wheel is made from a copy of the sources, so that nobody's edits change them meanwhile; ``--release`` gives that
copy another version, as tests of upgrades need. Wheels of dependencies are fetched by pip, which checks their hashes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements-runtime.lock"
SOURCES = ("src", "bpf", "scripts", "pyproject.toml", "README.md", "LICENSE", "THIRD-PARTY.md")
RELEASE_FILE = "src/fimbria/release.py"


def with_release(text: str, release: str) -> str:
    """The text of release.py with another release. Raises ValueError if it names none."""
    changed, count = re.subn(r'(?<=RELEASE: Final = ")[^"]+', release, text)
    if count != 1:
        raise ValueError(f"{RELEASE_FILE} names {count} releases instead of one")
    return changed


def write_wheel(out: Path, release: str | None) -> None:
    """Builds the wheel into a folder. Raises ValueError with the builder's words."""
    with tempfile.TemporaryDirectory(prefix="fimbria-wheel-") as scratch:
        tree = Path(scratch)
        for name in SOURCES:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.tmp"))
            else:
                shutil.copy2(source, tree / name)
        if release is not None:
            path = tree / RELEASE_FILE
            path.write_text(with_release(path.read_text(), release))
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
        done = subprocess.run(command, cwd=tree, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise ValueError(f"the wheel can't be built:\n{done.stdout}{done.stderr}")


def fetch_dependencies(wheelhouse: Path) -> None:
    """Downloads the locked wheels unless the folder holds them already. Raises subprocess.CalledProcessError."""
    wanted = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    stamp = wheelhouse / ".lock-hash"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    shutil.rmtree(wheelhouse, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--only-binary", ":all:"]
    subprocess.run([*command, "--require-hashes", "-r", str(LOCK), "-d", str(wheelhouse)], check=True)
    stamp.write_text(wanted)


def write_context(out: Path, release: str | None = None) -> None:
    """Fills a folder; one of a former run is brought up to date. Raises OSError, ValueError,
    subprocess.CalledProcessError."""
    out.mkdir(parents=True, exist_ok=True)
    for wheel in out.glob("*.whl"):
        wheel.unlink()
    write_wheel(out, release)
    fetch_dependencies(out / "wheelhouse")
    shutil.copyfile(LOCK, out / LOCK.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--release", help="a version other than that of the sources")
    asked = parser.parse_args()
    os.umask(0o022)
    try:
        write_context(asked.out.resolve(), asked.release)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"image_context: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
