"""What everything here knows: types, the form of errors, numerics, capacity, native libraries."""
