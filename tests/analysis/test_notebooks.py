"""The notebooks of docs/ run from top to bottom, and were run before they were committed."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))

pytestmark = pytest.mark.skipif("KVREPLAY_BINARY" not in os.environ, reason="needs KVREPLAY_BINARY, the built kvreplay")


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == {"read_a_trace", "tune_a_decay", "write_a_policy"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_says_what_it_said(path):
    book = nbformat.read(path, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    before = [shape_of(cell) for cell in code]
    assert any(before), "committed without its outputs"
    NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    assert [shape_of(cell) for cell in code] == before


def shape_of(cell):
    """Kinds of output, in their order: numbers may change with the tool, what is shown may not."""
    kinds = [output.get("name") or sorted(output["data"]) for output in cell.outputs]
    return [kind for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
