"""Models as they are opened: stored and compressed models, matrices, loading into transformers."""
