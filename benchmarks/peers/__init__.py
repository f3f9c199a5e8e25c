"""Rival tools on one model, measured by this project's own perplexity protocol: `python -m benchmarks.peers --help`.

Each tool quantizes in a process and a virtual environment of its own (quantize_*.py, requirements-*.txt), sees the same
calibration tokens, and leaves a dense checkpoint of restored weights beside a count of the bytes that it would store.
"""
