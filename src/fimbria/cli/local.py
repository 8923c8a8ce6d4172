"""Asking the agent or the observer of this node over its local socket.

The standard library's client: importing aiohttp would take longer than everything else that a command does.
"""

from __future__ import annotations

import functools
import http.client
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar, cast
from urllib.parse import quote, urlencode

import click

RUN_DIR: Final = "/run/fimbria"
TIMEOUT: Final = 10.0
F = TypeVar("F", bound=Callable[..., Any])


class Unreachable(click.ClickException):
    """Nobody answers; exit status 2."""

    exit_code = 2


class Refused(click.ClickException):
    """It answered, with an error: what was asked for isn't there, or can't be understood. Exit status 1."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Local:
    """A component of this node; `who` is agent or observer. Every method raises Unreachable and Refused."""

    def __init__(self, who: str, path: str | Path | None = None) -> None:
        """`path` is its socket; by default in $FIMBRIA_RUN_DIR or /run/fimbria."""
        self.who = who
        self.path = Path(path) if path else Path(os.environ.get("FIMBRIA_RUN_DIR") or RUN_DIR) / f"{who}.sock"

    def get(self, *parts: str, **query: str) -> Any:
        """JSON of GET /v1/PARTS."""
        return json.loads(self.text(*parts, **query))

    def text(self, *parts: str, **query: str) -> str:
        """The answer as it is."""
        connection = _UnixConnection(self.path, TIMEOUT)
        try:
            return self._ask(connection, parts, query).read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None
        finally:
            connection.close()

    def lines(self, *parts: str, **query: str) -> Iterator[Any]:
        """JSON values, one a line, as they come; ends when the other side does. Returns once it has been accepted."""
        connection = _UnixConnection(self.path, TIMEOUT)
        try:
            answer = self._ask(connection, parts, query)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._unreachable(error) from None
        return self._read_lines(connection, answer)

    def _read_lines(self, connection: _UnixConnection, answer: http.client.HTTPResponse) -> Iterator[Any]:
        if connection.sock is not None:
            connection.sock.settimeout(None)  # a stream may be silent for any time
        try:
            while line := answer.readline():
                yield json.loads(line)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._unreachable(error) from None
        finally:
            connection.close()

    def _ask(
        self, connection: _UnixConnection, parts: tuple[str, ...], query: Mapping[str, str]
    ) -> http.client.HTTPResponse:
        path = "/v1/" + "/".join(quote(p, safe="") for p in parts)
        connection.request("GET", path + (f"?{urlencode(query)}" if query else ""))
        answer = connection.getresponse()
        if answer.status != 200:
            raise Refused(_error(answer), answer.status)
        return answer

    def _unreachable(self, error: Exception) -> Unreachable:
        return Unreachable(f"{self._why(error)}\n{self._advice(error)}")

    def _why(self, error: Exception) -> str:
        where = f"the {self.who} at {self.path}"
        if isinstance(error, FileNotFoundError):
            return f"No {self.who} runs on this node: there is no socket {self.path}."
        if isinstance(error, PermissionError):
            return f"Not allowed to ask {where}: only root may."
        if isinstance(error, ConnectionRefusedError):
            return f"The {self.who} has ended: nobody listens on {self.path}."
        if isinstance(error, TimeoutError):
            return f"No answer from {where} within {TIMEOUT:.0f} s: it runs, but hangs."
        return f"No answer from {where}: {error or type(error).__name__}."

    def _advice(self, error: Exception) -> str:
        if isinstance(error, PermissionError):
            return "Try again with sudo."
        if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
            return (
                f"Start it with `fimbria {self.who}`, or point elsewhere with --socket or FIMBRIA_RUN_DIR. "
                "In a lab: fimbria lab exec node/node1 -- fimbria ..."
            )
        return f"Its log says more; `fimbria {self.who} --help` says how it is started."


def _error(answer: http.client.HTTPResponse) -> str:
    body = answer.read(1 << 16).decode(errors="replace")
    try:
        return _sentence(str(json.loads(body)["error"]))
    except (ValueError, KeyError, TypeError):
        return f"HTTP {answer.status}: {body.strip()}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def socket_option(who: str) -> Callable[[F], F]:
    """`--socket`, handed to the command as a Local named after `who`; and `--node`, which runs the command there."""

    def local(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Local:
        return Local(who, value)

    socket_ = click.option(
        "--socket",
        who,
        metavar="PATH",
        callback=local,
        help=f"The {who}'s socket.  [default: $FIMBRIA_RUN_DIR/{who}.sock, {RUN_DIR}/{who}.sock]",
    )

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def run(*args: Any, **options: Any) -> Any:
            cluster = {name: options.pop(name) for name in ("kubeconfig", "context")}
            node = options.pop("on_node")
            if not node:
                return command(*args, **options)
            from fimbria.cli.remote import run_on  # late: who asks this node needs no Kubernetes

            return run_on(node, **cluster, hold=who == "observer")

        return cast("F", socket_(on_node(run)))

    return decorate


def on_node(command: F) -> F:
    """`--node`, and how to reach its cluster."""
    path = click.Path(dir_okay=False)
    for option in (
        click.option("--context", default="", metavar="NAME", help="With --node: one of the kubeconfig's contexts."),
        click.option("--kubeconfig", type=path, help="With --node: the cluster.  [default: as kubectl finds it]"),
        click.option("--node", "on_node", metavar="NAME", help="Ask that node instead, through the Kubernetes API."),
    ):
        command = option(command)
    return command
