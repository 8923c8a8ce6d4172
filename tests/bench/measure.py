"""How things are measured: commands pinned to a core inside a namespace, rounds that interleave what is compared."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fimbria.lab import components, kernel

CLIENT_CPU: Final = "0"
SERVER_CPU: Final = str(min((os.cpu_count() or 1) - 1, 1))
TCP_PORT: Final = 9000
IPERF_PORT: Final = 5201
TRIES: Final = 3


class BenchError(Exception):
    """A measurement couldn't be made; the text says why."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How long and how often. `say` tells people what is going on."""

    rounds: int = 5
    seconds: int = 1
    quick: bool = False
    say: Callable[[str], None] = field(default=lambda _text: None)

    def times(self, full: int, quick: int) -> int:
        """A number of repetitions, smaller for a smoke test."""
        return quick if self.quick else full


@dataclass(frozen=True, slots=True)
class Place:
    """Where commands run: a prefix that enters it."""

    prefix: tuple[str, ...]

    def argv(self, *command: str) -> list[str]:
        """The whole command line."""
        return [*self.prefix, *command]

    def run(self, *command: str, patience: float = 60.0) -> str:
        """What a command printed. Raises BenchError if it fails or takes longer than `patience` seconds."""
        try:
            done = subprocess.run(
                self.argv(*command), capture_output=True, text=True, check=False, env=components.ENVIRONMENT,
                timeout=patience, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise BenchError(f"{' '.join(command)}: not done after {patience:.0f} s") from None
        if done.returncode != 0:
            raise BenchError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-300:]}")
        return done.stdout


HERE: Final = Place(())


def server_command() -> str:
    """For a shell: both servers, on the core that isn't the client's."""
    tool = kernel.binary("labtool")
    return (
        f"taskset -c {SERVER_CPU} iperf3 -s -p {IPERF_PORT} >/dev/null 2>&1 & "
        f"exec taskset -c {SERVER_CPU} {tool} serve --tcp {TCP_PORT}"
    )


def rate(place: Place, mode: str, host: str, port: int = TCP_PORT, seconds: float = 1) -> float:
    """Operations per second of `rr` (one connection) or `crr` (a connection each). Raises BenchError, also for errors
    under way: a rate with losses would compare something else."""
    command = ("taskset", "-c", CLIENT_CPU, kernel.binary("labtool"), mode, "tcp", host, str(port))
    answer: dict[str, Any] = json.loads(place.run(*command, "--milliseconds", str(round(seconds * 1000))))
    return float(answer["per_second"])


def bulk(place: Place, host: str, seconds: int = 1) -> float:
    """Gbit/s of one TCP stream as received, cubic: the default congestion control paces. Raises BenchError."""
    command = ("taskset", "-c", CLIENT_CPU, "iperf3", "-c", host, "-p", str(IPERF_PORT), "-C", "cubic", "-J")
    answer: dict[str, Any] = json.loads(place.run(*command, "-t", str(seconds)))
    return float(answer["end"]["sum_received"]["bits_per_second"]) / 1e9


Measure = Callable[[], float]


def interleave(variants: Mapping[str, Measure], rounds: int) -> dict[str, list[float]]:
    """Samples of each variant, one each a round; who begins changes from round to round. Raises BenchError."""
    names: Sequence[str] = list(variants)
    samples: dict[str, list[float]] = {n: [] for n in names}
    for i in range(rounds):
        start = i % len(names)
        for name in [*names[start:], *names[:start]]:
            samples[name].append(_again(name, variants[name]))
    return samples


def _again(name: str, work: Measure) -> float:
    """A few tries: a single timeout on a crowded machine must not cost the whole run. The last failure counts."""
    for left in reversed(range(TRIES)):
        try:
            return work()
        except BenchError as e:
            if not left:
                raise BenchError(f"{name}: {e}") from None
    raise AssertionError
