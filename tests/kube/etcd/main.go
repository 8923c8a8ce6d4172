// The command etcd, of the version that Kubernetes is released with. Debian's is older than 3.4.25, from which on an
// API server can ask it how far a watch has come: without that it serves no streamed and no consistent list from memory.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() {
	etcdmain.Main(os.Args)
}
