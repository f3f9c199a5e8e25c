"""One script a claim; README.md says command, machine and figures. Run from the checkout: python -m benchmarks.NAME."""
