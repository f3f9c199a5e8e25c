"""Entry points: argv to settings, one call of the pipeline, exit code. `swsc VERB` and `python -m jobs VERB`."""
