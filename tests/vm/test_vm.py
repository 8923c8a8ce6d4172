"""Boots Debian's kernels. See README.md for what it takes."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import kernels
import machine
import pytest
import suite

KERNELS = ("6.1", "6.12")
HERE = Path(__file__).parent
pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory for the machine's files, which also marks its processes; both must be gone at the end."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield tmp_path
    assert marked(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def marked(place: Path) -> list[str]:
    """Command lines of other processes whose environment has `place` as TMPDIR."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if f"TMPDIR={place}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append((entry / "cmdline").read_text())
            except OSError:  # gone, or not ours
                continue
    return found


@pytest.mark.parametrize("kernel", KERNELS)
def test_boots_the_kernel_with_our_python(kernel: str, place: Path) -> None:
    code = "import json, os, sys, aiohttp, msgspec; print(json.dumps([os.uname().release, sys.prefix, os.getuid()]))"
    result = machine.run(kernel, ["python", "-c", code])
    assert result.rc == 0, result.output
    assert json.loads(result.output) == [kernels.get(kernel).release, str(machine.REPO / ".venv"), 0]


@pytest.mark.parametrize(("kernel", "tcx"), [("6.1", errno.EINVAL), ("6.12", 0)])
def test_namespaces_veth_and_tc_work(kernel: str, tcx: int, place: Path) -> None:
    result = machine.run(kernel, ["python", str(HERE / "probe.py")])
    assert result.rc == 0, result.output
    expected = {"plain": True, "clsact_ok": True, "clsact_drop": False, "tcx": tcx, "tcx_drop": tcx != 0}
    assert json.loads(result.output) == expected


@pytest.mark.parametrize("kernel", KERNELS)
def test_modules_of_the_overlays_load(kernel: str, place: Path) -> None:
    modules = "vxlan wireguard esp4 esp6 xfrm_user sch_ingress cls_bpf act_bpf bridge xt_conntrack nf_tables dummy tun"
    result = machine.run(kernel, ["modprobe", "-a", *modules.split()])
    assert result.rc == 0, result.output


@pytest.mark.parametrize("kernel", KERNELS)
def test_writes_stay_in_the_guest(kernel: str, place: Path) -> None:
    witness = machine.REPO / f".fim-vm-witness-{os.getpid()}"
    script = (
        'set -e; echo x >"$1"; test -s "$1"; mkdir /run/again; mount -t virtiofs root /run/again; '
        'if echo x >"/run/again$1"; then echo written; fi'
    )
    result = machine.run(kernel, ["sh", "-c", script, "sh", str(witness)])
    assert result.rc == 0, result.output
    assert "Read-only file system" in result.output
    assert not witness.exists()


def test_a_failing_command_is_not_repeated(place: Path) -> None:
    result = machine.run("6.1", ["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (result.rc, result.output, result.attempts) == (7, "out\nerr\n", 1)


def test_an_unknown_command_fails(place: Path) -> None:
    assert machine.run("6.1", ["/no/such/command"]).rc == 127


def test_a_command_that_takes_too_long_is_told_so(place: Path) -> None:
    for seconds in (3, 60):  # a loaded machine may need more than three to begin
        with pytest.raises(machine.GuestTimeout, match=f"still running after {seconds} s") as caught:
            machine.run("6.12", ["sh", "-c", "echo begun; sleep 1000"], timeout=seconds)
        if caught.value.output:
            break
    assert caught.value.output == "begun\n"


def test_a_daemon_left_behind_keeps_nobody_waiting(place: Path) -> None:
    result = machine.run("6.12", ["sh", "-c", "sleep 1000 & exit 4"], timeout=60)
    assert result.rc == 4
    assert result.run_seconds < 30


def test_a_crash_is_tried_once_more_and_told_apart(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(machine.MachineError, match=r"(?s)crashed while the command ran.*sysrq triggered") as caught:
        machine.run("6.12", ["sh", "-c", "echo c >/proc/sysrq-trigger"])
    assert not isinstance(caught.value, machine.GuestTimeout)
    assert capfd.readouterr().err.count("trying once more") == 1


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=lambda v: str(v)
)
def test_no_process_outlives_an_interrupted_run(number: signal.Signals, code: int, place: Path) -> None:
    command = [sys.executable, str(HERE / "run.py"), "--kernel", "6.1", "--", "sh", "-c", "echo begun; sleep 1000"]
    # A shell that runs the tests in the background has SIGINT ignored, and children inherit that.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(5) == "begun"
            assert len(marked(place)) == 3
            process.send_signal(number)
            assert process.wait(30) == code
        finally:
            process.kill()
    deadline = time.monotonic() + 10
    while marked(place) and time.monotonic() < deadline:
        time.sleep(0.05)
    if number == signal.SIGKILL:  # only files can stay then
        for path in [*place.glob("*/*"), *place.glob("*")]:
            path.rmdir() if path.is_dir() else path.unlink()


def test_the_command_line_gives_output_and_code(place: Path) -> None:
    command = [sys.executable, str(HERE / "run.py"), "--kernel", "6.12", "--", "sh", "-c", "uname -r; exit 5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (5, kernels.get("6.12").release + "\n"), done.stderr


def test_a_test_file_runs_in_the_guest(place: Path) -> None:
    summary = suite.run_tests("6.12", HERE / "sample_suite.py")
    assert summary.counts == {"passed": 1, "failed": 1, "skipped": 1}, summary.output
    assert summary.rc == 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_programs_load(kernel: str, place: Path) -> None:
    result = machine.run(kernel, ["python", "tests/bpf/load_all.py"], timeout=600)
    assert result.rc == 0, result.output


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kernel", KERNELS)
def test_real_sctp(kernel: str, place: Path) -> None:
    """The machines that this is developed on have no SCTP of their own."""
    summary = suite.run_tests(kernel, "tests/bpf/test_sctp_traffic.py", "-q", timeout=800)
    assert summary.ok, summary.output


# A lab of two nodes is a dozen Python processes; emulated, each takes seconds to start.
STORY = {"FIMBRIA_STORY_ROUTINGS": "overlay", "FIMBRIA_STORY_NODES": "2", "FIMBRIA_LAB_SLOWNESS": "15"}


@pytest.mark.timeout(2000)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_main_story(kernel: str, place: Path) -> None:
    summary = suite.run_tests(kernel, "tests/lab/test_story.py", "-q", timeout=1800, memory=2048, env=STORY)
    assert summary.ok, summary.output
