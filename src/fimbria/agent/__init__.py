"""The agent: composition root of a node."""
