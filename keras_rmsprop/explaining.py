"""What `RMSprop.explain` says: how each variable is updated, and why."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from keras_rmsprop import codecs, hooks
from keras_rmsprop.automatic import Search
from keras_rmsprop.backends import current as backend
from keras_rmsprop.building import codec_of
from keras_rmsprop.stepping import Steps
from keras_rmsprop.update import Update, Way

MOST_NAMES = 4
"""How many variables of each way are named."""


def explain(steps: Steps, paths: Sequence[str]) -> str:
    """Return how each variable is updated.

    Args:
        steps: Takes the steps of an optimizer.
        paths: The paths of its variables.
    """
    optimizer: Any = steps.optimizer
    variables = optimizer._trainable_variables
    names = [f"{p} {tuple(v.shape)}" for p, v in zip(paths, variables, strict=True)]
    updates = steps.updates_of(variables)
    kinds = backend.kinds_of_steps(steps, variables)
    lines = explained(
        {
            text: [_way(update, steps, xla=xla) for update in updates]
            for text, xla in kinds.items()
        },
        names,
    )
    text = "\n".join(lines)
    if steps.jit_compile is not False and (why := backend.why_no_kernel()):
        text += f"\nNo kernel: {why}."
    if steps.has_blocks():
        stored = [
            Way(
                *codecs.explained(update.slots, codec_of(optimizer, update.variable)[1])
            )
            for update in updates
        ]
        text += "\n" + "\n".join(explained({"State between steps:": stored}, names))
    if steps.on(Search) and (rate := optimizer.current_learning_rate):
        text += f"\nThe learning rate found is {rate:.3g}."
    return text


def _way(update: Update, steps: Steps, *, xla: bool) -> Way:
    optimizer: Any = steps.optimizer
    if own := steps.own() & hooks.OWN_UPDATE:
        names = " and ".join(f"`{name}`" for name in sorted(own))
        return Way(f"by its own {names}", "as Keras would")
    if update.slots.velocity is None:
        return Way("replaced by its gradient", "as of float8 training")
    why = steps.why_all_rows(update.variable)
    if update.rows is not None and why:
        return Way("by all rows", f"sparse gradients, but {why}")
    way = backend.way(update, steps.constants(0.0), xla=xla)
    clock = update.rows.clock if update.rows is not None else None
    if clock is not None and optimizer.use_ema and clock.average.shared:
        also = "its average by all, as another optimizer updates the table, too"
        way = way._replace(why=f"{way.why}; {also}")
    return way


def explained(
    steps: Mapping[str, Sequence[Way]], variables: Sequence[str]
) -> list[str]:
    r"""Return the lines for each kind of step: one for each way in it.

    Args:
        steps: For each kind of step, described in words, the way of each variable.
        variables: The names of the variables.

    Example:
        >>> alone, together = Way("on its own", "large"), Way("concatenated", "small")
        >>> print("\n".join(explained({"Eager:": [alone, together, together]}, "abc")))
        Eager:
          1 on its own (large): a
          2 concatenated (small): b, c
    """
    lines = []
    for text, ways in steps.items():
        lines += textwrap.wrap(text, 80)
        for way in dict.fromkeys(ways):
            names = [v for v, w in zip(variables, ways, strict=True) if w == way]
            shown = ", ".join(names[:MOST_NAMES])
            more = len(names) - MOST_NAMES
            line = f"{len(names)} {way.name} ({way.why}): {shown}"
            line += f" and {more} more" if more > 0 else ""
            lines += textwrap.wrap(
                line, 80, initial_indent="  ", subsequent_indent="    "
            )
    return lines
