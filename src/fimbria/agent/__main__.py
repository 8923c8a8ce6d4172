"""`python -m fimbria.agent`."""

import sys

from fimbria.agent.main import main

sys.exit(main())
