"""Settings: what a run is asked to do. Fields are flags of the command line and keys of configuration files alike."""
