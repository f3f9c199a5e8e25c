"""What is claimed of a GPU, checked and measured on one: `python -m benchmarks.gpu`."""
