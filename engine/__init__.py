"""The muscle: tokens in, tokens out. One process a device, one step loop; the budget sizes its steps."""
