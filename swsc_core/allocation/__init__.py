"""Dividing a bit budget over matrices."""
