"""Evaluation: perplexity, and tasks of lm-evaluation-harness."""
