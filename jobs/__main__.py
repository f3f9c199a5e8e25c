"""`python -m jobs VERB …`, which is what `ray job submit --working-dir . -- …` runs."""

from jobs.cli import main

raise SystemExit(main())
