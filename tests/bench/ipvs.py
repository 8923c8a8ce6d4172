"""kube-proxy's IPVS mode, which the kernels of the development machines don't have: everything, ours too, runs in a
virtual machine with Debian's. An emulated processor is slow: the ratios count, and sizes are small."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from tests.bench import kubeproxy
from tests.bench.measure import HERE, BenchError, Settings
from tests.bench.report import Figure, from_json, to_json
from tests.bench.services import Plan, through_services

KERNEL: Final = "6.12"
RUN: Final = Path(__file__).parents[1] / "vm/run.py"
SECONDS: Final = 1700
MEMORY: Final = 2048  # MB
MARK: Final = "figures: "
MODULES: Final = ("ip_vs", "ip_vs_rr", "nf_conntrack", "dummy", "ip_set_hash_ip", "xt_set", "ip_tables", "iptable_nat")
PLAN: Final = Plan((1, 100, 1000), (1, 1000), {"ipvs": 1000}, ("socket",), 2.0, 600.0)


def through_ipvs(settings: Settings) -> list[Figure]:
    """All figures, from a virtual machine. Raises BenchError."""
    kubeproxy.binary()
    settings.say(f"virtual machine with kernel {KERNEL}: up to {SECONDS / 60:.0f} minutes")
    guest = ("env", "FIMBRIA_LAB_SLOWNESS=15", "python", "-m", "tests.bench.ipvs", *(["--quick"] * settings.quick))
    limits = ("--timeout", str(SECONDS), "--memory", str(MEMORY))
    done = HERE.run(sys.executable, str(RUN), "--kernel", KERNEL, *limits, "--", *guest, patience=SECONDS + 120)
    answer = next((x.removeprefix(MARK) for x in done.splitlines() if x.startswith(MARK)), None)
    if answer is None:
        raise BenchError(f"the virtual machine gave no figures: {done[-500:]}")
    return from_json(answer)


def main() -> None:
    """In the guest."""
    began = time.monotonic()
    subprocess.run(["modprobe", "-a", *MODULES], check=True)

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    quick = "--quick" in sys.argv
    found = through_services(Settings(rounds=2 if quick else 3, quick=quick, say=say), PLAN)
    print(MARK + to_json(found).replace("\n", ""), flush=True)


if __name__ == "__main__":
    main()
