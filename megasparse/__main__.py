"""`python -m megasparse` is the `megasparse` command; `torchrun -m megasparse ...` too."""

from megasparse.cli import main

if __name__ == "__main__":
    main()
