# ruff: noqa: E501
"""Selection of upstream's specs, and what is read from their reports."""

from __future__ import annotations

import re

import pytest
from tests.cluster.upstream import report
from tests.cluster.upstream.results import Result, Run, dump, merge, parse, parse_junit, summary
from tests.cluster.upstream.specs import Skip, focus_of, load_skips, parse_list, parse_skips, select, stale

LISTED = """The following spec names can be used with 'ginkgo run --focus/skip':
    k8s.io/kubernetes@v1.36.3/test/e2e/network/dns.go:54: [sig-network] DNS should provide DNS for the cluster [Conformance]
    k8s.io/kubernetes@v1.36.3/test/e2e/network/service.go:1240: [sig-network] Services should work after restarting apiserver [Disruptive]
    k8s.io/kubernetes@v1.36.3/test/e2e/apps/job.go:1: [sig-apps] Job should run
    k8s.io/kubernetes@v1.36.3/test/e2e/network/x.go:7: [sig-network] Netpol: a 'b' (c) doesn't | cost $1 [Feature:SCTP]
"""
DNS, RESTART, ODD = (
    "[sig-network] DNS should provide DNS for the cluster [Conformance]",
    "[sig-network] Services should work after restarting apiserver [Disruptive]",
    "[sig-network] Netpol: a 'b' (c) doesn't | cost $1 [Feature:SCTP]",
)
NAMES = sorted([DNS, RESTART, ODD])
JUNIT = f"""<testsuites><testsuite name="Kubernetes e2e suite">
<testcase name="[SynchronizedBeforeSuite]" status="passed" time="0.1"></testcase>
<testcase name="[It] {DNS}" status="passed" time="12.5"><system-err>noise</system-err></testcase>
<testcase name="[It] {RESTART}" status="failed" time="3"><failure message="no answer&#10;at all" type="failed">where</failure></testcase>
<testcase name="[It] [sig-apps] Job should run" status="skipped" time="0"><skipped message="skipped"></skipped></testcase>
<testcase name="[It] [sig-network] Left" status="skipped" time="1"><skipped message="skipped - needs 3 nodes"></skipped></testcase>
</testsuite></testsuites>"""


def test_only_specs_of_the_network_are_listed() -> None:
    assert parse_list(LISTED) == NAMES


def test_specs_are_divided() -> None:
    skips = [Skip(re.compile("SCTP"), "no SCTP here"), Skip(re.compile("DNS"), "never", re.compile("Conformance"))]
    found = select(NAMES, skips)
    assert (found.together, found.alone, found.skipped) == ((DNS,), (RESTART,), {ODD: "no SCTP here"})
    assert select(NAMES, skips, focus="DNS").alone == ()
    assert select(NAMES, skips, skip="DNS").together == ()


def test_a_skip_that_meets_nothing_is_named() -> None:
    assert stale(NAMES, [Skip(re.compile("DNS"), "x"), Skip(re.compile("IPVS"), "x")]) == ["IPVS"]


@pytest.mark.parametrize(
    "text", ["[[skip]]\nspec = 'x'", "[[skip]]\nspec = 'x'\nreason = 'no'", "[[skip]]\nreason = 'a b c'\nspec = ''"]
)
def test_a_skip_without_a_reason_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="skip 1"):
        parse_skips(text)


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown why"):
        parse_skips("[[skip]]\nspec = 'x'\nreason = 'a b c'\nwhy = 1")


def test_the_list_can_be_read() -> None:
    assert load_skips()


def test_the_focus_meets_these_specs_only() -> None:
    focus = re.compile(focus_of([DNS, ODD]))
    assert [name for name in NAMES if focus.search(f"Kubernetes e2e suite {name}")] == sorted([DNS, ODD])


def test_reports_are_read() -> None:
    assert parse_junit(JUNIT) == [
        Result(DNS, "passed", 12.5),
        Result(RESTART, "failed", 3, "no answer\nat all"),
        Result("[sig-network] Left", "skipped", 1, "needs 3 nodes"),
    ]


def test_who_was_interrupted_has_no_result() -> None:
    case = '<testcase name="[It] [sig-network] A" status="{}" time="1"><error message="x"></error></testcase>'
    text = (
        f"<testsuites>{''.join(case.format(status) for status in ('interrupted', 'aborted', 'timedout'))}</testsuites>"
    )
    assert [one.state for one in parse_junit(text)] == ["failed"]  # time that ran out is a verdict


def test_a_failed_set_up_is_a_result() -> None:
    case = '<testcase name="[SynchronizedBeforeSuite]" time="1"><failure message="no node"/></testcase>'
    assert parse_junit(f"<testsuites>{case}</testsuites>") == [
        Result("[SynchronizedBeforeSuite]", "failed", 1, "no node")
    ]


def test_a_later_run_replaces_what_it_asked() -> None:
    former = Run((Result(DNS, "failed", 1), Result(ODD, "passed", 1)), {RESTART: "no SSH"}, "2026-01-01")
    later = Run((Result(DNS, "passed", 2), Result(RESTART, "passed", 3)), {}, "2026-01-02")
    merged = merge(former, later)
    assert {one.name: one.state for one in merged.results} == dict.fromkeys([DNS, ODD, RESTART], "passed")
    assert (merged.date, merged.listed) == ("2026-01-02", {})
    assert parse(dump(merged)) == merged


def test_the_summary_names_failures() -> None:
    text = summary(Run(tuple(parse_junit(JUNIT)), {ODD: "x"}))
    assert f"FAILED {RESTART} (3 s)" in text and "    no answer" in text
    assert text.endswith("1 passed, 1 failed, 1 skipped; 1 not asked")


def test_the_document_is_that_of_the_results() -> None:
    """Whoever changes the results or the reasons writes the document anew."""
    assert report.DOCUMENT.read_text() == report.document(report.load())


def test_every_spec_that_is_not_run_has_its_present_reason() -> None:
    reasons, listed = {one.reason for one in load_skips()}, report.load().listed
    assert listed and set(listed.values()) <= reasons
