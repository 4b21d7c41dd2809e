"""The configuration: read once, and once more when it changes."""
