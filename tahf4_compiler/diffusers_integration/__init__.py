"""What knows diffusers: the quantizer and its configuration. Imported only when diffusers is."""

import diffusers.quantizers.auto  # noqa: F401  (its tables come first: whoever imports them asks for the quantizer here)
