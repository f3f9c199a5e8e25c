"""The algorithms: K-Means, codebook fit, truncated SVD, round-to-nearest."""
