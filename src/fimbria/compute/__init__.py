"""Tables in, desired rows out. Synchronous and pure."""
