"""Measurements behind the figures of docs/: one script per claim; its docstring names the command and a good result."""
