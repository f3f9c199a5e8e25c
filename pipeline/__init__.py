"""The distributed run: checkpoint, plan, workers, commit, evaluation, report. Ray stands in run/cluster.py and run/ray_pool.py alone."""
