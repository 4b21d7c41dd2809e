"""What happened, for machines and people: receipts, metrics, traces."""
