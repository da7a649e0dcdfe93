"""The experts' matmul: a loop in plain JAX anywhere, Pallas kernels (``hopper/``) on Hopper GPUs."""
