"""What the generated kernels become for GPUs: the table of ``tahf4 kernels``, and the roofline of ``tahf4 roofline``."""
