"""`python -m fimbria.observer`."""

import sys

from fimbria.startup import cheap_imports

with cheap_imports():
    from fimbria.observer.main import main

sys.exit(main())
