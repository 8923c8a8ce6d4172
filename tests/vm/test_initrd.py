import subprocess
from pathlib import Path

import pytest
from initrd import Archive, InitrdError, job, module_files
from kernels import Kernel


def test_cpio_reads_the_archive_back(tmp_path: Path) -> None:
    archive = Archive()
    archive.directory("d")
    for size in range(6):  # every padding
        archive.file(f"d/{'n' * (size + 1)}", b"x" * size, 0o755)
    subprocess.run(["cpio", "-i", "--quiet"], input=archive.finish(), cwd=tmp_path, check=True)
    assert [p.read_bytes() for p in sorted((tmp_path / "d").iterdir())] == [b"x" * size for size in range(6)]
    assert all(p.stat().st_mode & 0o777 == 0o755 for p in (tmp_path / "d").iterdir())


def _kernel(directory: Path, dependencies: str, builtin: str) -> Kernel:
    kernel = Kernel("6.1.0-1", directory)
    kernel.modules.mkdir(parents=True)
    (kernel.modules / "modules.dep").write_text(dependencies)
    (kernel.modules / "modules.builtin").write_text(builtin)
    return kernel


def test_modules_come_after_what_they_need_and_once(tmp_path: Path) -> None:
    kernel = _kernel(tmp_path, "k/a-b.ko: k/c.ko k/d.ko\nk/c.ko: k/d.ko\nk/d.ko:\n", "k/in.ko\n")
    files = module_files(kernel, ["c", "in", "a_b"])
    assert [path.name for path in files] == ["d.ko", "c.ko", "a-b.ko"]


def test_a_missing_module_is_named(tmp_path: Path) -> None:
    with pytest.raises(InitrdError, match="no module overlay"):
        module_files(_kernel(tmp_path, "", ""), ["overlay"])


def test_the_job_gets_its_words_unchanged(tmp_path: Path) -> None:
    words = ["a b", "'q\"", "$(id)", "-n", "line\nbreak", ""]
    text = job(["printf", "%s\\0", *words, "end"], tmp_path, {"PATH": "/usr/bin:/bin", "X": "$HOME '"})
    done = subprocess.run(["sh"], input=text, capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == [*words, "end"]


def test_the_environment_is_exact(tmp_path: Path) -> None:
    done = subprocess.run(["sh"], input=job(["env"], tmp_path, {"X": "$HOME '"}), capture_output=True, text=True)
    assert done.stdout == "X=$HOME '\n"


def test_a_variable_the_shell_cannot_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InitrdError, match="'A B'"):
        job(["true"], tmp_path, {"A B": "1"})
