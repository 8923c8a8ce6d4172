// Builds cnitool, the reference runtime that the CNI plugin is judged by; see build.py.
module fimbria.invalid/tests/cni

go 1.24.0

require github.com/containernetworking/cni v1.3.0
