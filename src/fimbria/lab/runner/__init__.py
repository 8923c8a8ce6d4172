"""The node runner: a small kubelet for the lab. It runs CNI plugins and processes for real; only images are missing."""
