"""`python -m model` is the command line `dsv4`."""

from model.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
