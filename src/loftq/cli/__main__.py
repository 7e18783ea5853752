"""``python -m loftq.cli``, for launchers that start a module: ``torchrun -m loftq.cli train …``."""

from loftq.cli import main

if __name__ == "__main__":
    main()
