"""Stored values move to lower the KL divergence to the original model."""
