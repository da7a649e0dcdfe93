"""Shared by all parts: types, the form of errors, numerics, capacity, native libraries."""
