"""What all tests share: where the reference data lies, and the factory of adapter files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT / ".." / "shared"

# So that `import factories` works from every folder of tests, whatever pytest's import mode.
sys.path.insert(0, str(ROOT / "tests"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data."""
    if not SHARED.is_dir():
        pytest.skip("the folder of reference data is not beside the repository")
    return SHARED.resolve()
