"""The Kubernetes API: configuration, a typed client, informers that fill tables, events and leader election."""
