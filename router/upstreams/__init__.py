"""Foreign engines: OpenAI-compatible servers behind the same door, mind and books as our own workers.

Owns everything that speaks to them. Never imports torch or a tokenizer: `headway serve --upstream` needs
neither."""
