"""Parser, flags, help and the generated page of the command line."""
