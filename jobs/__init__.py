"""Entry points: a module per verb turns arguments into a request, calls the verb and prints its result."""
