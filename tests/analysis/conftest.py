import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[2] / "analysis"), str(Path(__file__).parent)]

import fake_results  # noqa: E402


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A run of 15 methods in all three groups at four budgets."""
    return fake_results.write(tmp_path_factory.mktemp("run") / "out")


@pytest.fixture(scope="session")
def results(folder):
    import kvreplay_analysis

    return kvreplay_analysis.load(folder)


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    from kvreplay_analysis.style import plt

    plt.close("all")
