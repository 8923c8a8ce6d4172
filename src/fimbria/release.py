"""Which release of Fimbria this is."""

from typing import Final

RELEASE: Final = "0.1.0"  # the wheel's version is read from here; asking the package's metadata takes 30 ms
