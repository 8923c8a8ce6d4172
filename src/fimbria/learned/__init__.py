"""State that the kernel learned from packets: expired, counted and shown, never reconciled."""
