"""The controllers of a lab cluster, against any API server: workloads, EndpointSlices, scheduling, garbage, namespaces.

They stand in for kube-controller-manager and kube-scheduler in the lab and in tests, no further. What to do is decided
by pure functions of the observed objects (deployments, replicas, daemons, slices, schedule, garbage); the loop does it.
"""
