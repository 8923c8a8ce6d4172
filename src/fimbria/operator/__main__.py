"""`python -m fimbria.operator`."""

import sys

from fimbria.startup import cheap_imports

with cheap_imports():
    from fimbria.operator.main import main

sys.exit(main())
