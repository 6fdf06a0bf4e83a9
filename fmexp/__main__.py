"""`python -m fmexp`."""

from fmexp.cli import main

if __name__ == "__main__":
    main()
