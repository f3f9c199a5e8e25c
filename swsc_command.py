"""The `swsc` command as it is installed: sees to it that `jobs` and `pipeline` are this tool's own before it imports them."""

import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("jobs", "pipeline", "swsc_core")
_HOME = Path(__file__).resolve().parent


def main() -> int:
    """Run the command; exit code 2 if a folder of somebody else's hides one of its packages."""
    for name in PACKAGES:
        spec = find_spec(name)
        places = list(spec.submodule_search_locations or [spec.origin or ""]) if spec else []
        if not any(Path(place).resolve() == _HOME / name for place in places):
            found = places[0] if places else "nothing"
            print(
                f"error: {found} is found in place of this tool's own package {_HOME / name}: rename that folder, or run the"
                " command where neither PYTHONPATH nor the working directory puts it first",
                file=sys.stderr,
            )
            return 2
    from jobs.cli import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
