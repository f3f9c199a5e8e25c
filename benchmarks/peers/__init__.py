"""Other tools on one model, measured with the perplexity protocol of this project: `python -m benchmarks.peers --help`.

Each tool quantizes in its own process and virtual environment (quantize_*.py, requirements-*.txt). All tools get the
same calibration tokens, and write a dense checkpoint of restored weights and the number of bytes that they would store.
"""
