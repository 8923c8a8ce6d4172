"""A real Kubernetes on one machine: control plane and nodes, each in namespaces of its own. `python -m tests.cluster.bed`."""

from tests.cluster.bed.cluster import Cluster
from tests.cluster.bed.errors import BedError

__all__ = ["BedError", "Cluster"]
