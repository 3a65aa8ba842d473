"""What operations found, shown: ``data`` for programs (JSON), the ``*_text`` files for people (rich)."""
