"""``python -m loratools``: the same as the ``loratools`` command."""

from loratools.cli import main

if __name__ == "__main__":
    main()
