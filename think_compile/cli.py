"""The entry point of the `think-compile` command: says what to install when its packages are missing.

The commands themselves are in commands.py, which needs typer and rich; this file needs nothing.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; exits with status 1 and one sentence if its packages are not installed."""
    try:
        from think_compile.commands import app
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.exit(f"think-compile: the command line needs {package}: pip install 'think-compile[demo]'")
    app()


if __name__ == "__main__":
    main()
