"""`python -m fimbria.operator`."""

import sys

from fimbria.operator.main import main

sys.exit(main())
