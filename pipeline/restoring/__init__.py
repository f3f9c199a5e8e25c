"""Restoring a compressed model to a dense checkpoint: the job, and the flow that hands it out."""
