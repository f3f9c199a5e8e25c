"""Perplexity, and tasks of lm-evaluation-harness."""
