"""Which sequences are in the next step, and what came of the last one."""
