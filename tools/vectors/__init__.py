"""The generator of the conformance vectors; `tools/make_vectors.py` runs it."""
