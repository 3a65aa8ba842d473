"""Operations on adapters. They compute and return results; they never print, and know nothing of the command line."""
