"""`python -m fimbria.observer`."""

import sys

from fimbria.observer.main import main

sys.exit(main())
