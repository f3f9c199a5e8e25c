"""Tiny models, stand-ins for services and a real Ray cluster: what tests and benchmarks share."""
