"""Checkpoints: headers, tensors, and the files that belong to a model."""
