"""tahf4: a graph compiler that runs PyTorch models in HiFloat4 W4A4."""
