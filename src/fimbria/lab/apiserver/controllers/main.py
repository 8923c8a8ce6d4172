"""Starts the lab's controllers: ``python -m fimbria.lab.apiserver.controllers --kubeconfig FILE``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
from pathlib import Path

import yaml

from fimbria.lab.apiserver.controllers.client import Client
from fimbria.lab.apiserver.controllers.loop import Loop


async def run(kubeconfig: Path) -> None:
    async with Client(kubeconfig) as client:
        work = asyncio.create_task(Loop(client).run(lambda: logging.info("ready")))
        for name in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(name, work.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await work


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fimbria.lab.apiserver.controllers",
        description="Deployments, ReplicaSets, DaemonSets, EndpointSlices, scheduling, garbage collection and "
        "namespace deletion for Fimbria's lab and tests only, against any API server. Never run it on a real cluster.",
    )
    parser.add_argument("--kubeconfig", type=Path, required=True)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="controllers: %(levelname)s %(message)s")
    try:
        asyncio.run(run(options.kubeconfig))
    except (OSError, KeyError, StopIteration, TypeError, yaml.YAMLError) as error:
        print(f"controllers: {options.kubeconfig}: {error!r}", file=sys.stderr)
        return 1
    return 0
