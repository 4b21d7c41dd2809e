"""Who may call: keys, tenants, what each has taken, and whose KV answers for whom."""
