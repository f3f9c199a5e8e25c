"""PyTorch modules whose weights stay compressed in memory."""
