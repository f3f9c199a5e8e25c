"""The distributed run: checkpoint, plan, workers, commit, evaluation, report. Only engine/ray_backend uses Ray."""

# The version of the package. It is a constant because a submitted job runs from a checkout that is not installed.
VERSION = "0.1.0"
