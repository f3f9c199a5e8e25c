"""Tuning: the stored values of a compressed model move towards the predictions of the original model."""
