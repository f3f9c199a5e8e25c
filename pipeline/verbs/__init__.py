"""One module per verb of `swsc`: one request in, one result out. `jobs` parses the requests and prints the results."""
