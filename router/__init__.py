"""The mouth and ears: sockets, HTTP, processes and disk. Runs without torch."""
