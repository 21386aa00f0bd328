"""What knows transformers: its quantizer. Imported only when transformers is."""
