"""An embedded Kubernetes-style API server, for the lab and for tests only.

One process over one SQLite file that kubectl and our informers can't tell from kube-apiserver in what the lab needs.
It is no product: one user, no admission chain, no protobuf, no high availability. Where it differs from
kube-apiserver, kube-apiserver is right; ``tests/kube/test_api_conformance.py`` runs against both.
"""
