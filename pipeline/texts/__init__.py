"""Texts: reading them, windows of tokens, contamination of test text."""
