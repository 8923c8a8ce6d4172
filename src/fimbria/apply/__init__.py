"""From desired rows to the kernel: delta, plan, loop and its targets."""
