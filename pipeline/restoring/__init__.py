"""Restoration of a compressed model to a dense checkpoint."""
