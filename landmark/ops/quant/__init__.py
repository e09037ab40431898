"""Numbers in few bits: one folder a format."""
