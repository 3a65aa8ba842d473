"""``python -m loratools``: the same as the ``loratools`` command."""

if __name__ == "__main__":
    try:
        from loratools.cli import main
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    main()
