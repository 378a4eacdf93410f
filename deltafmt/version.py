"""The version of the package (the version of the format is in `manifest`)."""

__version__ = "0.1.0"
