"""``python -m loftq.cli``: the command line where no script of it is installed."""

from loftq.cli import main

if __name__ == "__main__":
    main()
