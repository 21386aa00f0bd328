"""Models that hold their linears in HiF4 and nothing else: the module, conversion, and diffusers' loading."""
