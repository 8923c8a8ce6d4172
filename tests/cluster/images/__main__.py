"""``python -m tests.cluster.images [NAME...]`` builds images (all by default) and prints the archives' paths."""

from __future__ import annotations

import sys

from tests.cluster.images.build import ImageError, ensure


def main() -> int:
    try:
        for path in ensure(sys.argv[1:]).values():
            print(path)
    except ImageError as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
