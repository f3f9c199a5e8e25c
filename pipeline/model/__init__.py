"""What is read and written, and where: stores, checkpoints, compressed artifacts."""
