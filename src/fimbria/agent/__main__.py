"""`python -m fimbria.agent`."""

import sys

from fimbria.startup import cheap_imports

with cheap_imports():
    from fimbria.agent.main import main

sys.exit(main())
