"""KV blocks: who holds which, on the device, in the host pool and on disk."""
