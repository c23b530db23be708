"""The text example, run as its user would."""

import runpy
from pathlib import Path

import pytest

pytestmark = pytest.mark.tensorflow("a program written with it")

PROGRAM = Path(__file__).parent.parent / "examples" / "text_classifier.py"


@pytest.mark.slow
def test_both_optimizers_learn_far_more_than_the_most_frequent(capsys):
    ours, built_in = runpy.run_path(str(PROGRAM))["main"]()
    output = capsys.readouterr().out
    assert ours.accuracy > 0.7
    assert built_in.accuracy > 0.7
    assert f"{ours.accuracy:.1%}" in output
    assert "keras.optimizers.RMSprop" in output
