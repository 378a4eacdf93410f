"""A second reader of the format, written from `spec/` alone; `tools/conformance_reader.py` runs it."""
