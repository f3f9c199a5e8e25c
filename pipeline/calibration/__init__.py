"""Second moments of the inputs of matrices, gathered on a text."""
