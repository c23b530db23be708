"""The programs and the notebook in `examples/`."""

import runpy
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, capsys):
    """Return the result of a program's `main()` and what it printed."""
    result = runpy.run_path(str(EXAMPLES / name))["main"]()
    return result, capsys.readouterr().out


@pytest.mark.slow
def test_regression_learns_the_line(capsys):
    result, output = run("regression.py", capsys)
    for first, last, floor in zip(*result, strict=True):
        assert first > 10 * last
        assert last == pytest.approx(floor, rel=0.2)
    assert f"{result.last[0]:.4f}" in output


@pytest.mark.slow
def test_linear_regression_lands_on_the_same_theta(capsys):
    result, output = run("linear_regression.py", capsys)
    np.testing.assert_allclose(result.keras, result.numpy, rtol=0, atol=1e-9)
    # A constant alpha of 0.1 hops half of that to either side of the minimum.
    for theta in (result.numpy, result.keras):
        np.testing.assert_allclose(
            np.abs(theta - result.least_squares), 0.05, rtol=0, atol=1e-6
        )
    np.testing.assert_allclose(
        result.keras_decaying_alpha, result.least_squares, rtol=0, atol=1e-6
    )
    assert "land on the same theta" in output


@pytest.fixture
def notebook():
    return nbformat.read(EXAMPLES / "mnist.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    """Return for each code cell the kinds of its outputs."""
    return [
        {o.get("name", o.output_type) for o in cell.outputs}
        for cell in code_cells(notebook)
    ]


def test_notebook_is_stored_as_run(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert set.union(*outputs(notebook)) == {"stdout", "display_data"}


@pytest.mark.slow
def test_notebook_runs(notebook):
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
