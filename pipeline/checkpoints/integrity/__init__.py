"""Digests of tensors and files, and checks of the bytes that are read."""
