
import pytest
from tiny_runs import Whole, undisturbed


@pytest.fixture(scope="session")
def m2(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Up to M2, whose stages are M3's too."""
    return undisturbed("m2", tmp_path_factory.mktemp("whole"))
