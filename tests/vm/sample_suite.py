"""Run in the guest by test_vm.py, to see what comes back of tests that pass, fail and are skipped."""

import os

import pytest


def test_passes() -> None:
    assert os.uname().nodename == "fimbria-vm"


def test_fails() -> None:
    raise AssertionError("on purpose")


@pytest.mark.skip(reason="on purpose")
def test_is_skipped() -> None: ...
