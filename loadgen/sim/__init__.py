"""The simulator: a trace against the real dispatcher and the real scheduler, in virtual time."""
