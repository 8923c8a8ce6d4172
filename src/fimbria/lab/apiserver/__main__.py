"""`python -m fimbria.lab.apiserver`."""

import sys

from fimbria.startup import cheap_imports

with cheap_imports():
    from fimbria.lab.apiserver.main import main

sys.exit(main())
