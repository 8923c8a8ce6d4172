"""`fimbria sysdump`: one archive with the state of a cluster or of a node, for those who help from afar."""
