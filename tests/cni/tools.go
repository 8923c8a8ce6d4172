//go:build tools

// Package tools pins the command that build.py builds, so that "go mod tidy" keeps what it needs.
package tools

import _ "github.com/containernetworking/cni/cnitool"
