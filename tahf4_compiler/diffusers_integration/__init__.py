"""What knows diffusers: the quantizer and its configuration. Imported only when diffusers is."""
