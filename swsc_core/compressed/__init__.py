"""Compressed matrices: one class per method behind one interface, entries of config.json, encoding and decoding."""
