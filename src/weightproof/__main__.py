"""`python -m weightproof`: the command line, where the environment's programs are not on the path."""

from weightproof.cli import main

if __name__ == "__main__":
    main()
