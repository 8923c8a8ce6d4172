"""The CNI plugin (a static C shim) and its installation on a node."""
