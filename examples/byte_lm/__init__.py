"""A byte-level mixture-of-experts language model, for ``examples/train_moe.py``."""
