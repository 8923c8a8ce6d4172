"""The lab: a cluster of several nodes on one machine, for demonstrations and tests."""
