"""The native backends, in the form of ``jax_ep.reference``: calls of FFI targets by our primitive."""
