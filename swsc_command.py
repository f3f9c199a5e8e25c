"""Entry point of the installed `swsc` command, which first checks that it imports this tool's own packages."""

import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("jobs", "pipeline", "swsc_core")
_HOME = Path(__file__).resolve().parent


def main() -> int:
    """Run the command; exit code 2 if a directory on the import path hides one of the tool's packages."""
    for name in PACKAGES:
        spec = find_spec(name)
        locations = list(spec.submodule_search_locations or [spec.origin or ""]) if spec else []
        if not any(Path(location).resolve() == _HOME / name for location in locations):
            imported = locations[0] if locations else "nothing"
            print(
                f"error: {imported} is imported instead of this tool's package {_HOME / name}: rename that directory,"
                " or run the command where neither PYTHONPATH nor the working directory puts it first",
                file=sys.stderr,
            )
            return 2
    from jobs.cli import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
