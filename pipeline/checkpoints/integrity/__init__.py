"""Digests of tensors and files, and checks of what was read against them."""
