"""The scripts and tests of this directory share datapath.py and its neighbours."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
