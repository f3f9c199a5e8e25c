"""Settings of a command. Each field is a flag of the command line and a key of configuration files."""
