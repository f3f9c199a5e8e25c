"""One compression of one model from start to end: calibration, allocation, compression, tuning."""
