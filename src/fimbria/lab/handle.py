"""A running lab as an object, for programs: tests, demonstrations, benchmarks. Synchronous; every call stands for
itself."""

import asyncio
import json
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

from fimbria.lab import access, cluster, components, kernel, state
from fimbria.lab.access import PodPlace
from fimbria.lab.errors import LabError
from fimbria.lab.layout import LabSpec, Paths
from fimbria.lab.manifests import Manifest, parse
from fimbria.lab.objects import Objects, apply_all, remove_all
from fimbria.lab.slowness import factor

T = TypeVar("T")
POLL = 0.05


class Lab:
    """`target` everywhere is node/NAME, node/world, node/control, node/fabric, or [NAMESPACE/]POD."""

    def __init__(self, name: str) -> None:
        """Raises LabError if there is no such lab."""
        self.spec: LabSpec = state.load(name)
        self.paths = Paths(name)

    # --- objects -------------------------------------------------------------------------------------------------

    def call(self, work: Callable[[Objects], Awaitable[T]]) -> T:
        """Runs `work` with a client of its own. Raises ApiError or LabError."""

        async def run() -> T:
            async with cluster.api(self.paths) as client:
                return await work(client)

        return asyncio.run(run())

    def request(self, method: str, path: str, body: Any = None, **params: str) -> dict[str, Any]:
        """One API request; raises ApiError."""
        return self.call(lambda c: c.request(method, path, body, **params))

    def apply(self, text: str) -> None:
        """Objects in YAML. Raises LabError if one is refused."""
        self._each(apply_all, text)

    def delete(self, text: str) -> None:
        self._each(remove_all, text)

    def _each(self, step: Callable[..., Awaitable[int]], text: str) -> None:
        errors: list[str] = []

        def tell(m: Manifest, said: str) -> None:
            if said.startswith("error"):
                errors.append(f"{m.kind} {m.name}: {said}")

        manifests = parse(text, "manifest")
        self.call(lambda c: step(c, manifests, tell))
        if errors:
            raise LabError("; ".join(errors))

    def pod(self, pod: str) -> dict[str, Any]:
        namespace, name = _split(pod)
        return self.request("GET", f"/api/v1/namespaces/{namespace}/pods/{name}")

    def wait(self, what: str, condition: Callable[[], T], patience: float = 20.0) -> T:
        """The first value of `condition` that is true. Raises LabError after `patience` seconds."""
        deadline = time.monotonic() + patience * factor()
        while True:
            value = condition()
            if value:
                return value
            if time.monotonic() > deadline:
                raise LabError(f"{what}: not within {patience:.0f} s")
            time.sleep(POLL)

    def wait_ready(self, pods: Iterable[str], patience: float = 30.0) -> None:
        """Until all are Ready. Raises LabError naming the first that isn't, with its status."""
        deadline = time.monotonic() + patience
        for pod in pods:
            while not _condition(status := self.pod(pod)["status"], "Ready"):
                if time.monotonic() > deadline:
                    raise LabError(f"pod {pod} isn't ready: {json.dumps(status)}")
                time.sleep(POLL)

    def addresses(self, pod: str) -> list[str]:
        return [entry["ip"] for entry in self.pod(pod)["status"].get("podIPs") or ()]

    # --- inside --------------------------------------------------------------------------------------------------

    def argv(self, target: str, *command: str, container: str = "") -> list[str]:
        """The command line on the machine that runs `command` inside the target."""
        if target.startswith("node/"):
            return [*components.enter(self.paths, target.removeprefix("node/")), "--", *command]
        return access.pod_argv(self.paths, PodPlace.of(self.pod(target)), container, command)

    def run(self, target: str, *command: str, stdin: str | None = None) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self.argv(target, *command), input=stdin, capture_output=True, text=True, check=False,
            env=components.ENVIRONMENT,
        )  # fmt: skip

    def start(self, target: str, *command: str) -> "subprocess.Popen[str]":
        """A command that runs on; the caller ends it (the process inside dies with it)."""
        return subprocess.Popen(
            self.argv(target, *command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=components.ENVIRONMENT,
        )  # fmt: skip

    def probe(self, target: str, proto: str, host: str, port: int = 0, *options: str) -> dict[str, Any]:
        """One connection attempt: the tool's JSON with `result`, `latency_us` and perhaps `answer`. Raises LabError."""
        where = [host] if proto == "icmp" else [host, str(port)]
        done = self.run(target, kernel.binary("labtool"), "probe", proto, *where, *options)
        try:
            value: dict[str, Any] = json.loads(done.stdout.splitlines()[0])
            return value
        except (ValueError, IndexError):
            raise LabError(f"probe from {target}: {done.stderr.strip() or done.stdout.strip()}") from None

    def log(self, pod: str, container: str = "") -> str:
        path = access.pod_log(self.paths, PodPlace.of(self.pod(pod)), container)
        return b"".join(access.read_log(path, follow=False)).decode(errors="replace")

    # --- processes -----------------------------------------------------------------------------------------------

    def kill(self, process: str, number: int = 9) -> None:
        components.send(self.paths, process, number)

    def restart(self, process: str) -> None:
        """Starts a process that has ended."""
        cluster.start(self.spec.name, process)

    def process_log(self, process: str) -> str:
        return components.log_path(self.paths, process).read_text(errors="replace")


def _split(pod: str) -> tuple[str, str]:
    namespace, _, name = pod.rpartition("/")
    return namespace or "default", name


def _condition(status: dict[str, Any], kind: str) -> bool:
    return any(c["type"] == kind and c["status"] == "True" for c in status.get("conditions") or ())
