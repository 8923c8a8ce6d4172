"""The lab's main story with the real kube-apiserver in the embedded one's place."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(1800)


def _realserver() -> object:
    spec = importlib.util.spec_from_file_location("fimbria_realserver", Path(__file__).with_name("realserver.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_story_on_the_real_api_server(tmp_path: Path) -> None:
    real = _realserver()
    with real.real_apiserver(tmp_path) as kubeconfig:  # type: ignore[attr-defined]
        env = os.environ | {"FIMBRIA_STORY_KUBECONFIG": str(kubeconfig), "FIMBRIA_STORY_ROUTINGS": "overlay"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/lab/test_story.py"],
            cwd=ROOT, env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout, done.stdout[-2000:]
