"""`python -m fimbria.lab.runner`."""

import sys

from fimbria.startup import cheap_imports

with cheap_imports():
    from fimbria.lab.runner.main import main

sys.exit(main())
