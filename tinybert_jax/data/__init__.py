"""Raw text to examples: tables, corpora and records, before any tokenizer but its training."""
