"""The distributed run: checkpoint, plan, workers, commit, evaluation, report. Ray is used in pipeline/engine/ray_backend alone."""

VERSION = (
    "0.1.0"  # of the whole package; said here because a submitted job runs from a checkout, where nothing is installed
)
