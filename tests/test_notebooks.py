"""The notebooks in `examples/`: they run, and what is stored is what they show."""

import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.tensorflow("notebooks written with it")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def notebook(request):
    return nbformat.read(EXAMPLES / request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    """Return for each code cell the kinds of its outputs."""
    return [
        {o.get("name", o.output_type) for o in cell.outputs}
        for cell in code_cells(notebook)
    ]


@pytest.mark.parametrize(
    "notebook", [path.name for path in sorted(EXAMPLES.glob("*.ipynb"))], indirect=True
)
def test_it_is_stored_as_run(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert set.union(*outputs(notebook)) == {"stdout", "display_data"}


@pytest.mark.parametrize(
    "notebook",
    [
        pytest.param("mnist.ipynb", marks=pytest.mark.rest),
        pytest.param("embeddings.ipynb", marks=pytest.mark.rest),
        pytest.param("from_pytorch.ipynb", marks=pytest.mark.peers),
    ],
    indirect=True,
)
def test_it_runs(notebook):
    stored = outputs(notebook)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    which = nbformat.v4.new_code_cell("import sys; print(sys.executable)")
    notebook.cells.append(which)
    NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=300,
        resources={"metadata": {"path": str(EXAMPLES)}},
    ).execute()  # raises where a cell does
    assert notebook.cells.pop().outputs[0].text.strip() == sys.executable
    # What TensorFlow thinks of the machine goes to stderr and is not stored.
    assert [kinds - {"stderr"} for kinds in outputs(notebook)] == stored
