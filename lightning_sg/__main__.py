"""``python -m lightning_sg``: the command line."""

from lightning_sg.cli import main

if __name__ == "__main__":
    main()
