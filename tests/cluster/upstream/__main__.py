"""``python -m tests.cluster.upstream`` runs upstream's end-to-end specs of the network against a cluster of the bed."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from tests.cluster.bed import BedError, Cluster
from tests.cluster.upstream import report
from tests.cluster.upstream.results import FAILED, PASSED, merge, summary
from tests.cluster.upstream.runner import Bench, UpstreamError, binaries, run, spread
from tests.cluster.upstream.specs import CONFORMANCE, list_specs, load_skips, select


def main() -> int:
    asked = _parser().parse_args()
    try:
        if asked.document:
            report.write(report.load())
            return 0
        cluster = Cluster(asked.name)
        focus = asked.focus if not asked.conformance else rf"(?=.*{asked.focus}).*\[{CONFORMANCE[1:-1]}\]"
        done = {one.name for one in report.load().of(PASSED)} if asked.missing else set()
        names = [name for name in list_specs(binaries() / "e2e.test") if name not in done]
        selection = select(names, load_skips(), focus, asked.skip)
        together, alone = len(selection.together), len(selection.alone)
        _say(f"{together} specs, {asked.procs} at a time, then {alone} alone; {len(selection.skipped)} not asked")
        if asked.list:
            print("\n".join([*selection.together, *selection.alone]))
            return 0
        spread(cluster)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        found = run(Bench(cluster, asked.output or cluster.layout.logs / "upstream", asked.procs), selection)
    except (BedError, UpstreamError) as error:
        _say(str(error))
        return 2
    print(summary(found))
    if asked.record:
        report.save(merge(report.load(), found))
        report.write(report.load())
    return 1 if found.of(FAILED) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.cluster.upstream", description=__doc__)
    parser.add_argument("--name", default="kube", help="the cluster's name")
    parser.add_argument("--conformance", action="store_true", help="only what a conformant cluster must pass")
    parser.add_argument("--focus", default="", help="only specs whose name meets this regular expression")
    parser.add_argument("--skip", default="", help="no specs whose name meets this regular expression")
    parser.add_argument("--missing", action="store_true", help="no specs that have passed by the results that are kept")
    parser.add_argument("--procs", type=int, default=3, help="how many specs at a time (3)")
    parser.add_argument("--output", type=Path, help="folder for logs and reports")
    parser.add_argument("--list", action="store_true", help="print the specs instead of running them")
    parser.add_argument("--record", action="store_true", help="keep the results, and write docs/conformance.md")
    parser.add_argument("--document", action="store_true", help="only write docs/conformance.md from what is kept")
    return parser


def _say(message: str) -> None:
    print(f"upstream: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
