"""Programs that show how to use jax_ep."""
