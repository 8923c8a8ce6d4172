"""Which release of Fimbria this is."""

from typing import Final

RELEASE: Final = "0.1.0"  # the same as in pyproject.toml: a test compares; asking the package's metadata takes 30 ms
