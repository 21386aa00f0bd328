"""What the generated kernels become for GPUs: ``tahf4 kernels``, ``tahf4 roofline``, ``tahf4 bench``."""
