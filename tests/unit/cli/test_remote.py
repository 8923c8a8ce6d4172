"""`--node`: which command line is run there."""

import pytest

from fimbria.cli.remote import without_ours


@pytest.mark.parametrize(
    ("given", "there"),
    [
        ("endpoint list --node a", "endpoint list"),
        ("--node a endpoint list -o json", "endpoint list -o json"),
        ("monitor --node=a --kubeconfig x --context=y --pod z", "monitor --pod z"),
        ("status --kubeconfig=x --verbose", "status --verbose"),
        ("map dump x --grep --nodes", "map dump x --grep --nodes"),
    ],
)
def test_what_chooses_the_node_stays_here(given: str, there: str) -> None:
    assert without_ours(given.split()) == there.split()


def test_no_kubeconfig(call, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    done = call("endpoint", "list", "--node", "a")
    assert done.exit_code == 2
    assert "no kubeconfig was given" in done.stderr


def test_a_kubeconfig_that_cannot_be_read(call) -> None:
    done = call("status", "--kubeconfig", "/nonexistent/x")
    assert done.exit_code == 2
    assert "/nonexistent/x" in done.stderr
