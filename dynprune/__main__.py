"""``python -m dynprune``: the same as the ``dynprune`` command."""

from dynprune.app import command_line

if __name__ == "__main__":
    command_line()
