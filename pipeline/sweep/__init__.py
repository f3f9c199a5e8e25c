"""Many models × variants × evaluations over one pool of workers."""
