"""What can be done with a compressed model: scripts to be read from top to bottom, and run offline."""
