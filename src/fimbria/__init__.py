"""Fimbria: eBPF networking for Kubernetes."""
