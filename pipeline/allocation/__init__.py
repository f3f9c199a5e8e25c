"""Allocation: one spec per matrix, chosen so that the model loses least within a budget of bits."""
