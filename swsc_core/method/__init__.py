"""The algorithms: K-Means, codebook fit, truncated SVD, rounding to nearest."""
