"""CNI requests from the shim: frames, the specification's rules, results, and the server on the agent's socket."""
