"""Tasks, jobs, pools and workers. The engine knows no feature."""
