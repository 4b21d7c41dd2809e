"""Our own engine workers: which there are, and one socket to each."""
