"""One variant of one model from start to end: calibrate, allocate, compress, tune."""
