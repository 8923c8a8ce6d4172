"""What we chose and must remember: restored first, then allocating. Pure."""
