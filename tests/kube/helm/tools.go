//go:build tools

// Package tools pins Helm, which ../build.py builds.
package tools

import _ "helm.sh/helm/v4/cmd/helm"
