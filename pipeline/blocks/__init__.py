"""Models larger than a device: blocks of decoder layers are loaded in turn, and hidden states travel between them."""
