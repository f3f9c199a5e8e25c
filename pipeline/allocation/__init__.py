"""A bit budget becomes one spec per matrix."""
