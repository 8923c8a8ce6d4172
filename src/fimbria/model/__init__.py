"""Frozen dataclasses in the words of the field; no I/O."""
