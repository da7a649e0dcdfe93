"""The version of the package; the native libraries are checked against it when they load."""

__version__ = "0.1.0"
