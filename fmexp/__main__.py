"""`python -m fmexp`, and the command `fmexp`."""

from fmexp import garbage


def main() -> None:
    """Run the program."""
    garbage.wait()
    from fmexp import cli

    cli.main()


if __name__ == "__main__":
    main()
