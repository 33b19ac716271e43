"""``python -m dynprune``: the same as the ``dynprune`` command."""

from dynprune.app import main

if __name__ == "__main__":
    main()
