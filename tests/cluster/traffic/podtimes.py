"""`python -m tests.cluster.traffic.podtimes KUBECONFIG < ORDER`: makes pods and says when what happened to each.

ORDER is JSON in one line: {"pods": [MANIFEST...], "mode": "once" | "each" | "steady", "pause": SECONDS,
"remove": BOOL, "patience": SECONDS}. "once" makes all at the same time, "each" the next one when the one before is
Ready (and gone, if `remove`), "steady" one every `pause` seconds, whatever became of the others, until the standard
input is closed; of those it leaves the ones that never were Ready.

Prints one JSON line for each pod: {"name", "uid", "posted", "created", "scheduled", "sandbox", "started", "ready",
"removed", "gone", "phase", "reason", "refusals": [TEXT...]}, with times in seconds since 1970, null for what didn't
happen. They are the moments at which a watch told it: Kubernetes' own stamps are whole seconds.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.cluster.traffic.api import Api, ApiRefused

PODS: Final = "/api/v1/namespaces/{}/pods"
AT_ONCE: Final = 20  # requests under way


@dataclass
class Times:
    """One pod's life. `refusals` are kubelet's words on sandboxes that couldn't be made."""

    name: str
    uid: str = ""
    posted: float = 0.0
    created: float | None = None
    scheduled: float | None = None
    sandbox: float | None = None
    started: float | None = None
    ready: float | None = None
    removed: float | None = None
    gone: float | None = None
    phase: str = ""
    reason: str = ""
    refusals: list[str] = field(default_factory=list)

    def see(self, kind: str, pod: Mapping[str, Any], now: float) -> None:
        """One event of the watch."""
        status = pod.get("status") or {}
        true = {c["type"] for c in status.get("conditions") or () if c["status"] == "True"}
        containers = status.get("containerStatuses") or ()
        self.uid = pod["metadata"]["uid"]
        self.phase, self.reason = status.get("phase", ""), status.get("reason", "")
        if (pod["spec"].get("nodeName") or "PodScheduled" in true) and self.scheduled is None:
            self.scheduled = now
        if "PodReadyToStartContainers" in true and self.sandbox is None:
            self.sandbox = now
        if containers and all(c.get("started") for c in containers) and self.started is None:
            self.started = now
        if "Ready" in true and self.ready is None:
            self.ready = now
        if kind == "DELETED":
            self.gone = now


class Watcher:
    """All pods of a namespace, as the API server tells of them."""

    def __init__(self, api: Api, namespace: str) -> None:
        self.api, self.path = api, PODS.format(namespace)
        self.pods: dict[str, Times] = {}
        self.changed = threading.Condition()
        version = api.request("GET", f"{self.path}?limit=1")["metadata"]["resourceVersion"]
        threading.Thread(target=self._follow, args=(version,), daemon=True).start()

    def _follow(self, version: str) -> None:
        while True:
            try:
                for event in self.api.watch(self.path, version):
                    version = event["object"]["metadata"]["resourceVersion"]
                    with self.changed:
                        name = event["object"]["metadata"]["name"]
                        if name in self.pods:
                            self.pods[name].see(event["type"], event["object"], time.time())
                            self.changed.notify_all()
            except OSError as error:
                print(f"podtimes: watch: {error}", file=sys.stderr)
                time.sleep(0.1)

    def until(self, wanted: Callable[[], bool], patience: float) -> bool:
        """Waits for something of the pods; False if it didn't happen in `patience` seconds."""
        with self.changed:
            return self.changed.wait_for(wanted, patience)

    def make(self, manifest: Mapping[str, Any]) -> Times:
        """Creates a pod. Raises ApiRefused, OSError."""
        times = Times(manifest["metadata"]["name"], posted=time.time())
        with self.changed:
            self.pods[times.name] = times
        self.api.request("POST", self.path, manifest)
        times.created = time.time()
        return times

    def remove(self, times: Times) -> None:
        """Asks for a pod's end."""
        times.removed = time.time()
        self.api.request("DELETE", f"{self.path}/{times.name}", {"gracePeriodSeconds": 0 if times.ready is None else 1})


def settled(times: Times) -> bool:
    """Ready, or past hope."""
    return times.ready is not None or times.phase in ("Failed", "Succeeded")


def once(watcher: Watcher, order: Mapping[str, Any]) -> None:
    """All at the same time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        made = list(pool.map(watcher.make, order["pods"]))
        watcher.until(lambda: all(map(settled, made)), order["patience"])
        if order["remove"]:
            list(pool.map(watcher.remove, made))
            watcher.until(lambda: all(t.gone for t in made), order["patience"])


def each(watcher: Watcher, order: Mapping[str, Any]) -> None:
    """One after the other."""
    for manifest in order["pods"]:
        times = watcher.make(manifest)
        watcher.until(lambda t=times: settled(t), order["patience"])  # type: ignore[misc]
        if order["remove"]:
            watcher.remove(times)
            watcher.until(lambda t=times: t.gone is not None, order["patience"])  # type: ignore[misc]
        time.sleep(order["pause"])


def _until_closed(over: threading.Event) -> None:
    sys.stdin.read()
    over.set()


def steady(watcher: Watcher, order: Mapping[str, Any]) -> None:
    """At a pace, until told to end; those that are Ready are removed some pods later."""
    over = threading.Event()
    threading.Thread(target=_until_closed, args=(over,), daemon=True).start()
    made: list[Times] = []
    for manifest in order["pods"]:
        made.append(watcher.make(manifest))
        if order["remove"]:
            for old in made[:-4]:
                if old.ready is not None and old.removed is None:
                    watcher.remove(old)
        if over.wait(order["pause"]):
            break
    watcher.until(lambda: all(map(settled, made)), order["patience"])
    good = [t for t in made if t.ready is not None]
    if order["remove"]:
        for times in good:
            if times.removed is None:
                watcher.remove(times)
        watcher.until(lambda: all(t.gone for t in good), order["patience"])


def refusals(api: Api, namespace: str, pods: Mapping[str, Times]) -> None:
    """Adds what kubelet said about sandboxes that it couldn't make."""
    for event in api.request("GET", f"/api/v1/namespaces/{namespace}/events")["items"]:
        mine = pods.get(event["involvedObject"].get("name", ""))
        if mine is not None and event["reason"] == "FailedCreatePodSandBox":
            mine.refusals += [event["message"]] * int(event.get("count") or 1)


Mode = Callable[[Watcher, Mapping[str, Any]], None]
MODES: Final[Mapping[str, Mode]] = {"once": once, "each": each, "steady": steady}


def main(argv: Sequence[str]) -> int:
    """Exit status 0 when every pod could be made, whatever became of it."""
    api = Api.of(Path(argv[0]))
    order = json.loads(sys.stdin.readline())
    namespace = order["pods"][0]["metadata"]["namespace"]
    watcher = Watcher(api, namespace)
    try:
        MODES[order["mode"]](watcher, order)
    except (ApiRefused, OSError) as error:
        print(f"podtimes: {error}", file=sys.stderr)
        return 1
    finally:
        refusals(api, namespace, watcher.pods)
        for times in watcher.pods.values():
            print(json.dumps(asdict(times)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
