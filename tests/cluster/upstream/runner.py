"""Runs upstream's unmodified test binary against a cluster of the bed."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.bed import Cluster
from tests.cluster.images.recipes import ROOT, kube
from tests.cluster.upstream.results import FAILED, Result, Run, parse_junit
from tests.cluster.upstream.specs import Selection, focus_of

from fimbria.release import RELEASE

REPORT = "junit_01.xml"  # of the test binary itself: names are those of --list-tests
BALANCED = "[Feature:LoadBalancer]"
HOUR = 3600.0
GRACE = 120.0  # for specs' own clean-up when a run ends early


class UpstreamError(RuntimeError):
    """The suite couldn't be run; failures of specs are results and no error."""


@dataclass(frozen=True)
class Bench:
    """Where a run happens: the cluster, a folder for logs and reports, how many specs at a time."""

    cluster: Cluster
    folder: Path
    processes: int


def binaries() -> Path:
    """Folder of e2e.test and ginkgo, built if need be. Raises UpstreamError."""
    try:
        found: Path = kube.ensure(["e2e.test", "ginkgo", "kubectl"])
    except kube.BuildError as error:
        raise UpstreamError(str(error)) from None
    return found


def run(bench: Bench, selection: Selection, seconds: float = 3 * HOUR) -> Run:
    """All of a selection: first what may run together, then the rest by itself. Who interrupts it gets what there is
    until then. Raises UpstreamError."""
    results: list[Result] = []
    balanced = any(BALANCED in name for name in (*selection.together, *selection.alone))
    whole = True
    with _cloud(bench) if balanced else contextlib.nullcontext():
        for label, names, processes in (
            ("together", selection.together, bench.processes),
            ("alone", selection.alone, 1),
        ):
            if names and whole:
                found, whole = _run(bench, bench.folder / label, names, min(processes, len(names)), seconds)
                results += found
    absent = {*selection.together, *selection.alone} - {one.name for one in results}
    if absent and whole and not any(one.state == FAILED for one in results):
        raise UpstreamError(f"no result of {len(absent)} specs, such as {min(absent)}; see {bench.folder}")
    return Run(
        tuple(results),
        selection.skipped,
        datetime.date.today().isoformat(),
        kube.version(),
        platform.release().split("-")[0],
        RELEASE,
        len(bench.cluster.nodes()),
    )


def spread(cluster: Cluster) -> None:
    """Each node becomes a zone of its own, as specs about zones expect three of them."""
    for node in cluster.nodes():
        cluster.kubectl("label", "node", node, f"topology.kubernetes.io/zone=zone-{node}", "--overwrite")


@contextlib.contextmanager
def _cloud(bench: Bench) -> Iterator[None]:
    """Somebody who gives Services of type LoadBalancer addresses, for as long as specs run."""
    bench.folder.mkdir(parents=True, exist_ok=True)
    module = [sys.executable, "-m", "tests.cluster.upstream.cloud", str(bench.cluster.layout.pki)]
    with (bench.folder / "cloud.log").open("w") as log:
        command = [*bench.cluster.enter("control"), "--", *module]
        options: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
        child = subprocess.Popen(command, cwd=ROOT, env=bench.cluster.control_env, **options)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _run(bench: Bench, folder: Path, names: Sequence[str], processes: int, seconds: float) -> tuple[list[Result], bool]:
    """Results, and whether they are all."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [*bench.cluster.enter("control"), "--", *_command(bench, folder, names, processes, seconds)]
    started, whole = time.monotonic(), True
    with (folder / "log").open("w") as log:
        options: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
        child = subprocess.Popen(command, env=bench.cluster.control_env, **options)
        try:
            child.wait(timeout=seconds + GRACE)
        except KeyboardInterrupt:
            whole = False
        finally:
            _end(child)
    report = folder / REPORT
    if not report.exists():
        tail = (folder / "log").read_text(errors="replace")[-2000:]
        took = f"{time.monotonic() - started:.0f} s, exit status {child.returncode}"
        raise UpstreamError(f"no report after {took}:\n{tail}")
    return parse_junit(report.read_text()), whole


def _end(child: subprocess.Popen[bytes]) -> None:
    """Specs clean up behind themselves, if there is time."""
    if child.poll() is not None:
        return
    os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(timeout=GRACE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _command(bench: Bench, folder: Path, names: Sequence[str], processes: int, seconds: float) -> list[str]:
    built, kubeconfig = binaries(), bench.cluster.layout.kubeconfig
    ginkgo = [f"--procs={processes}", f"--timeout={seconds:.0f}s", "--no-color", "--silence-skips"]
    ginkgo += [f"--focus={focus_of(names)}"]
    specs = ["--provider=local", f"--kubeconfig={kubeconfig}", f"--kubectl-path={built / 'kubectl'}"]
    specs += [f"--num-nodes={len(bench.cluster.nodes())}", f"--report-dir={folder}"]
    return [str(built / "ginkgo"), *ginkgo, str(built / "e2e.test"), "--", *specs]
