"""Sources that are converted to a directory first: models on the Hub, GGUF files.

Only these modules have side effects.
"""
