"""Custom resource definitions, as Kubernetes manifests."""
