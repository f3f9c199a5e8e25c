"""Modules of PyTorch whose weights stay compressed."""
