"""The command as a module: `python -m jobs VERB …`, which submitted Ray jobs run."""

from jobs.cli import main

raise SystemExit(main())
