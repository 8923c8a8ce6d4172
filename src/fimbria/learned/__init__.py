"""What the kernel learned: expired, counted and shown, never reconciled."""
