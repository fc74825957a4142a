"""`python -m llamakit`: the same as the `llamakit` command."""

from llamakit.cli import main

if __name__ == "__main__":
    main()
