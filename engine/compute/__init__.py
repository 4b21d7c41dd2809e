"""A step made: rows in, token ids out, on a CPU or a GPU."""
