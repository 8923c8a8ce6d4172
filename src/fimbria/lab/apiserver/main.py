"""Starts the lab's API server.

``python -m fimbria.lab.apiserver --db FILE --listen HOST:PORT --kubeconfig-out FILE``
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import ipaddress
import logging
import os
import signal
import sqlite3
import sys
from pathlib import Path

from aiohttp import web

from fimbria.lab.apiserver import bootstrap, credentials
from fimbria.lab.apiserver.app import Api
from fimbria.lab.apiserver.registry import Registry
from fimbria.lab.apiserver.services import Network
from fimbria.lab.apiserver.store import Store

DEFAULT_RANGES = "10.96.0.0/16,fd00:10:96::/112"


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fimbria.lab.apiserver",
        description="An embedded Kubernetes-style API server for Fimbria's lab and tests only; never for a cluster.",
    )
    parser.add_argument("--db", type=Path, required=True, help="SQLite file; token and certificate are kept next to it")
    parser.add_argument(
        "--listen",
        action="append",
        required=True,
        metavar="HOST:PORT|unix:PATH",
        help="where to serve: TLS with a bearer token, or a unix socket of mode 0600; repeatable; port 0 "
        "takes a free one",
    )
    parser.add_argument(
        "--kubeconfig-out", type=Path, help="where to write a kubeconfig (mode 0600) for the first address"
    )
    parser.add_argument("--service-cidr", default=DEFAULT_RANGES, help="one range, or two of different families")
    parser.add_argument("--history", type=int, default=10_000, help="changes kept per resource for watches")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args(arguments)
    options.networks = _networks(parser, options.service_cidr)
    return options


def _networks(parser: argparse.ArgumentParser, text: str) -> list[Network]:
    try:
        networks = [ipaddress.ip_network(part.strip()) for part in text.split(",")]
    except ValueError as error:
        parser.error(f"--service-cidr: {error}")
    if len(networks) > 2 or len({network.version for network in networks}) != len(networks):
        parser.error("--service-cidr: give one range, or two of different families")
    if any(network.num_addresses < 8 for network in networks):
        parser.error("--service-cidr: a range needs at least 8 addresses")
    return list(networks)


def split_address(text: str) -> tuple[str, int]:
    """``10.0.0.1:6443`` or ``[::1]:6443``. Raises ValueError."""
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    ipaddress.ip_address(host)
    if not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} has no valid port")
    return host, int(port)


async def serve(options: argparse.Namespace) -> None:
    store = Store(options.db, options.history)
    os.chmod(options.db, 0o600)
    registry = Registry(store, options.networks)
    token = credentials.token(options.db.with_suffix(".token"))
    runner = Api(registry, token).runner()
    await runner.setup()
    try:
        bound = await _listen(runner, options)
        endpoint = next(
            (one for one in bound if not ipaddress.ip_address(one[0]).is_loopback), bound[0] if bound else None
        )
        bootstrap.ensure(registry, endpoint or ("127.0.0.1", 443))
        if options.kubeconfig_out and bound:
            _write_kubeconfig(options, bound[0], token)
        for host, port in bound:
            logging.info("serving https://%s", _url_host(host, port))
        # what was loaded stays: the collector needn't look at it again
        gc.collect()
        gc.freeze()
        await _until_signal()
    finally:
        await runner.cleanup()
        store.close()


async def _listen(runner: web.AppRunner, options: argparse.Namespace) -> list[tuple[str, int]]:
    """Starts every listener; returns the TCP addresses with their real ports."""
    addresses = [split_address(text) for text in options.listen if not text.startswith("unix:")]
    context = None
    if addresses:
        crt, key = credentials.certificate(options.db.parent, [host for host, _ in addresses])
        context = credentials.server_context(crt, key)
    bound: list[tuple[str, int]] = []
    for host, port in addresses:
        site = web.TCPSite(runner, host, port, ssl_context=context)
        await site.start()
        bound.append((host, runner.addresses[-1][1]))
    for text in options.listen:
        if text.startswith("unix:"):
            await _listen_unix(runner, text.removeprefix("unix:"))
    return bound


async def _listen_unix(runner: web.AppRunner, path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    previous = os.umask(0o177)
    try:
        await web.UnixSite(runner, path).start()
    finally:
        os.umask(previous)


def _url_host(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _write_kubeconfig(options: argparse.Namespace, address: tuple[str, int], token: str) -> None:
    authority = (options.db.parent / "server.crt").read_bytes()
    text = credentials.kubeconfig(f"https://{_url_host(*address)}", authority, token)
    credentials.private_write(options.kubeconfig_out, text)


async def _until_signal() -> None:
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    await stop.wait()


def main() -> int:
    options = parse_arguments(sys.argv[1:])
    level = logging.DEBUG if options.verbose else logging.INFO
    logging.basicConfig(level=level, format="apiserver: %(levelname)s %(message)s")
    try:
        asyncio.run(serve(options))
    except sqlite3.Error as error:
        print(f"apiserver: {options.db}: {error}", file=sys.stderr)
        return 1
    except (OSError, ValueError, credentials.CredentialError) as error:
        print(f"apiserver: {error}", file=sys.stderr)
        return 1
    return 0
