"""The distributed run: checkpoint, plan, workers, commit, evaluation, report. Ray stands in run/cluster.py and run/ray_pool.py alone."""

VERSION = (
    "0.1.0"  # of the whole package; said here because a submitted job runs from a checkout, where nothing is installed
)
