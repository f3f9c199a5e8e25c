"""Compressed models in the engines that serve models: what they share here, a module for each engine beside it."""
