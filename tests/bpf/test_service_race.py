"""One client's connections, opened on two CPUs at once, go to one backend (service_race.bpf.c)."""

import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from compiling import compile_object
from datapath import addr
from selection import Selection

from fimbria.kernel.bpf import BpfObject, prog_test_run
from fimbria.model import rows

SOURCE: Final = Path(__file__).with_name("service_race.bpf.c")
ROUNDS: Final = 2000  # as there: a client each
SERVICE, GONE = 7, 99
BACKENDS: Final = {n: (f"10.0.0.{n}", 8080) for n in range(1, 6)}


@pytest.fixture
def s(tmp_path: Path) -> Iterator[Selection]:
    with BpfObject(compile_object(SOURCE, tmp_path)) as obj:
        yield Selection(obj)


def race(s: Selection) -> list[tuple[int, int]]:
    """Who chose at the same moment: what the one CPU got, and what the other."""
    first, second, *_ = sorted(os.sched_getaffinity(0))
    results: list[int] = []

    def run(side: int, cpu: int) -> None:
        os.sched_setaffinity(0, {cpu})  # of this thread alone
        results.append(prog_test_run(s.programs["race_test"].fd, bytes([side]) + bytes(63)).retval)

    threads = [threading.Thread(target=run, args=at) for at in ((0, first), (1, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [ROUNDS, ROUNDS]
    found = [s.maps["chosen"].lookup(struct.pack("=I", at)) or b"" for at in range(2 * ROUNDS)]
    numbers = [int.from_bytes(raw, "little") for raw in found]
    both = zip(numbers[:ROUNDS], numbers[ROUNDS:], strict=True)
    return [(one, other) for one, other in both if one and other]


@pytest.mark.parametrize("lost", [False, True], ids=["a-new-client", "its-backend-is-gone"])
def test_a_client_gets_one_backend_whoever_chooses(s: Selection, lost: bool) -> None:
    s.service(SERVICE, ("10.96.0.1", 80), BACKENDS, "AFFINITY", affinity=3600)
    if lost:
        for client in range(1, ROUNDS + 1):
            key = rows.AffinityKey(addr("::ffff:0.0.0.0")[:12] + struct.pack("=I", client), SERVICE, 0)
            s.put("affinity", key, rows.Affinity(time.monotonic_ns(), GONE))
    chosen = race(s)
    assert len(chosen) > ROUNDS // 20, "the two never met"
    assert [pair for pair in chosen if pair[0] != pair[1]] == []
    assert {one for one, _ in chosen} == set(BACKENDS), "each is chosen"
