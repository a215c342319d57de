"""What the tests of flows share, since Prefect takes ten seconds and more to make its database."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PREFECT_HOME of the commands that start an ephemeral server; the first of them makes the database."""
    return tmp_path_factory.mktemp("prefect")
