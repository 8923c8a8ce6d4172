"""Runs inside a node: many CNI operations at once, each by a process of its own, as a busy kubelet's runtime would.

    python cni_load.py ADD|DEL COUNT

Containers are named fimload0, fimload1, ... Prints JSON: one object {container, ms, rc, answer} for each.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

CONF = b'{"cniVersion":"1.1.0","name":"fimbria","type":"fimbria-cni"}'


def operate(command: str, container: str) -> dict[str, object]:
    """One execution of the plugin. `ms` is its whole life."""
    env = {
        "CNI_COMMAND": command, "CNI_CONTAINERID": container, "CNI_IFNAME": "eth0",
        "CNI_NETNS": f"/run/netns/{container}", "CNI_PATH": "/opt/cni/bin",
    }  # fmt: skip
    started = time.perf_counter()
    done = subprocess.run(["/opt/cni/bin/fimbria-cni"], input=CONF, capture_output=True, env=env, check=False)
    took = (time.perf_counter() - started) * 1000
    answer = json.loads(done.stdout) if done.stdout else None
    return {"container": container, "ms": took, "rc": done.returncode, "answer": answer}


def main() -> None:
    command, count = sys.argv[1], int(sys.argv[2])
    names = [f"fimload{i}" for i in range(count)]
    if command == "ADD":
        batch = "".join(f"netns add {n}\n" for n in names)
        subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True)
    with ThreadPoolExecutor(int(os.environ.get("PARALLEL", str(count)))) as pool:
        results = list(pool.map(lambda n: operate(command, n), names))
    if command == "DEL":
        subprocess.run(["ip", "-batch", "-"], input="".join(f"netns del {n}\n" for n in names), text=True, check=True)
    print(json.dumps(results))


main()
