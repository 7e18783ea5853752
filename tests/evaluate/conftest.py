"""Real data of the metrics, beside the repository and never part of it."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """The path of a data file by its name, such as ``gsm8k/test.jsonl``; skips the test where there is none."""

    def find(name: str) -> Path:
        path = Path(__file__).resolve().parents[3] / "shared" / "data" / name
        if not path.is_file():
            pytest.skip(f"needs {path}, which is not part of the repository")
        return path

    return find
