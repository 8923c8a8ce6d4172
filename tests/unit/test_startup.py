"""Cheap imports, each in a process of its own: what is imported once stays imported."""

import subprocess
import sys

import pytest


def answer(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def test_aiohttps_own_contexts_trust_nobody() -> None:
    code = (
        "from fimbria.startup import cheap_imports\n"
        "with cheap_imports():\n"
        "    from aiohttp import connector\n"
        "own = connector._SSL_CONTEXT_VERIFIED\n"
        "print(own.cert_store_stats()['x509_ca'], own.verify_mode.name, own.check_hostname)"
    )
    assert answer(code) == "0 CERT_REQUIRED True"


def test_contexts_made_later_trust_whom_the_system_trusts() -> None:
    stats = "import ssl; print(ssl.create_default_context().cert_store_stats())"
    code = f"from fimbria.startup import cheap_imports\nwith cheap_imports(): pass\n{stats}"
    assert answer(code) == answer(stats)


def test_collector_runs_again_and_leaves_the_modules_alone() -> None:
    code = (
        "import gc\n"
        "from fimbria.startup import cheap_imports\n"
        "with cheap_imports():\n"
        "    assert not gc.isenabled()\n"
        "    import asyncio\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 1000, gc.get_threshold())"
    )
    assert answer(code) == "True True (20000, 20, 20)"


@pytest.mark.parametrize(
    "module",
    ["agent", "observer", "operator", "lab.runner", "lab.apiserver", "lab.apiserver.controllers"],
)
def test_every_process_starts_so(module: str) -> None:
    code = (
        "import gc, runpy, sys\n"
        "sys.argv = ['-m', '--help']\n"
        "try:\n"
        f"    runpy.run_module('fimbria.{module}', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print(f'ended {end.code} {gc.get_freeze_count() > 10000}')"
    )
    assert answer(code).endswith("ended 0 True")
