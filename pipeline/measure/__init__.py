"""What a model is worth: windows of text, perplexity."""
