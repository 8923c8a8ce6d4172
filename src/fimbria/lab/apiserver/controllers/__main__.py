"""`python -m fimbria.lab.apiserver.controllers`."""

import sys

from fimbria.startup import cheap_imports

with cheap_imports():
    from fimbria.lab.apiserver.controllers.main import main

sys.exit(main())
