"""`fimbria prepare` from a container's mount namespace: what it mounts is there on the node."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"
# A node of its own: mounts and processes. The container is a second mount namespace within.
NODE = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
CONTAINER = ["unshare", "--mount", "--propagation", "private"]


def run(script: str, *values: object) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "PYTHONPATH": str(SOURCE), "PREPARE": f"{sys.executable} -m fimbria.cli.main prepare"}
    return subprocess.run(
        [*NODE, "sh", "-ec", script, "node", *map(str, values)],
        env=env, text=True, capture_output=True, check=False, timeout=120,
    )  # fmt: skip


def test_mounts_are_the_nodes(tmp_path: Path) -> None:
    container = " ".join(CONTAINER)
    done = run(
        f"""
        mount -t tmpfs none $1
        {container} $PREPARE --mount-bpffs $1/bpf --mount-cgroup $1/cgroup --cni-bin-dir $1/bin
        grep -c " $1/bpf bpf rw,nosuid,nodev,noexec" /proc/mounts
        grep -c " $1/cgroup cgroup2 rw,nosuid,nodev,noexec" /proc/mounts
        stat --format %a $1/bpf
        test -f $1/cgroup/cgroup.procs
        {container} $PREPARE --mount-bpffs $1/bpf --mount-cgroup $1/cgroup --cni-bin-dir $1/bin
        grep -c " $1/" /proc/mounts
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = [
        *(f"bpf at {tmp_path}/bpf: mounted", f"cgroup2 at {tmp_path}/cgroup: mounted", f"CNI plugin in {tmp_path}/bin"),
        *("1", "1", "1700"),
        *(f"bpf at {tmp_path}/bpf: there", f"cgroup2 at {tmp_path}/cgroup: there", f"CNI plugin in {tmp_path}/bin"),
        "2",
    ]
    assert done.stdout.splitlines() == said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--mount-bpffs /proc/nowhere", "mounting bpf at /proc/nowhere: No such file or directory"),
        ("--procfs /nowhere --mount-bpffs /tmp", "/nowhere/1/ns/cgroup: No such file or directory"),
        (
            "--cni-bin-dir /proc/nowhere",
            "/proc/nowhere/fimbria-cni can't be written (--cni-bin-dir): No such file or directory",
        ),
    ],
)
def test_failures_are_named(options: str, said: str) -> None:
    done = run(f"{' '.join(CONTAINER)} $PREPARE {options}")
    assert done.returncode == 1
    assert done.stderr == f"fimbria prepare: {said}\n"
