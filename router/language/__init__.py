"""From words to token ids and back: templates, vocabularies, stops, and what is known again."""
