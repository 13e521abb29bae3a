"""`python -m clpet` is the `clpet` command."""

from clpet.cli.main import main

if __name__ == "__main__":
    main()
