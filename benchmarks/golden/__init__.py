"""Golden digests: what the commands write for many settings, recorded once and compared after every change of structure."""
