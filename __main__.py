"""`python -m meshwright`, and the `meshwright` console script."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    from .compiler.cli import main as run

    run()


if __name__ == "__main__":
    main()
