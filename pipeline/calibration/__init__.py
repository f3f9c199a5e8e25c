"""Calibration: Hessians of a model on a text, gathered by all workers and cached."""
