"""A real Kubernetes on one machine: `python -m tests.cluster.bed --help`."""

from tests.cluster.bed.cluster import Cluster
from tests.cluster.bed.errors import BedError

__all__ = ["BedError", "Cluster"]
