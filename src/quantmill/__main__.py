"""`python -m quantmill` and `torchrun -m quantmill`: the same program as the command `quantmill`."""

from quantmill.cli import main

if __name__ == "__main__":
    main()
