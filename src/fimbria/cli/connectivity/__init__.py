"""`fimbria connectivity test`: does a cluster's network do what Kubernetes promises?"""
