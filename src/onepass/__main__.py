"""`python -m onepass` is the `onepass` command."""

from onepass.cli import main

if __name__ == "__main__":
    main()
