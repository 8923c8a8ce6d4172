"""Puts this directory on the import path: its modules are a program's parts (run.py), not a package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
