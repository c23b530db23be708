"""The step as one native call on CPUs: arithmetic, and bindings for each framework.

`step.cc` and those beside it compute on plain pointers. `ops.cc` and `tensorflow.py`
are the bindings for TensorFlow, `pointers.cc` and `torch.py` those for PyTorch.

`python -m keras_rmsprop.kernel` builds it (see `build.py`). Without it the portable way
takes the step. It is never an error: `why_not` says why there is no kernel.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any

from keras_rmsprop.kernel import build, files

SWITCH = "KERAS_RMSPROP_KERNEL"
"""The environment variable that, set to 0, switches the kernel off."""
DTYPES = {
    "float32": ("float32", "bfloat16", "float16"),
    "float64": ("float64", "float32"),
}
"""The dtypes of weights that it takes, by the dtype in which it computes."""
SLOTS = {"float32": ("float32", "bfloat16", "uint8"), "float64": ("float64",)}
"""The dtypes of slots, likewise. The slots of rows have that in which it computes."""


def loaded(
    library: build.Library, load: Callable[[str], Any], *, warn: bool = True
) -> tuple[Any, str]:
    """Return a library of the kernel; or None, and why it is not there.

    Args:
        library: Which one.
        load: Loads it, from its path.
        warn: Whether to warn if there is one that cannot be loaded.
    """
    switch = os.environ.get(SWITCH, "").strip().lower()
    if switch in ("0", "false", "no", "off"):
        return None, f"{SWITCH} is {switch}"
    path = "its library"
    try:
        found = build.found(library)
        if found is None:
            return None, "`python -m keras_rmsprop.kernel` has not built it yet"
        path = str(found.path)
        return load(files.loadable(found)), ""
    except Exception as error:  # of TensorFlow, of the file system
        why = f"{path} cannot be loaded: {' '.join(str(error).split())}"
        if warn:
            text = f"There is no kernel, so steps are slower. {why}."
            warnings.warn(text, stacklevel=3)
        return None, why
