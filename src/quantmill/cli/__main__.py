"""`python -m quantmill.cli` is `quantmill`."""

from quantmill.cli import main

if __name__ == "__main__":
    main()
