"""Programs that show jax_ep at work; README.md has the list."""
