"""Examples of using a compressed model. Each script reads from top to bottom and runs offline."""
