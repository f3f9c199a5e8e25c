"""Compression: jobs that compress the matrices of a layer or copy tensors, and the output of a layer."""
