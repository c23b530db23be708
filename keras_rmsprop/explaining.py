"""What `RMSprop.explain` says: how each variable is updated, and why."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_rmsprop import codecs, hooks, options
from keras_rmsprop.automatic import Search
from keras_rmsprop.backends import current as backend
from keras_rmsprop.building import codec_of, is_apart
from keras_rmsprop.stepping import Steps
from keras_rmsprop.update import Update, Way

WIDTH = 88
"""A line names as many variables as fit."""


def explain(steps: Steps, paths: Sequence[str]) -> str:
    """Return how each variable is updated.

    Args:
        steps: Takes the steps of an optimizer.
        paths: The paths of its variables.
    """
    optimizer: Any = steps.optimizer
    variables = optimizer._trainable_variables
    names = [f"{p} {tuple(v.shape)}" for p, v in zip(paths, variables, strict=True)]
    updates = steps.without_gradients(variables)
    kinds = backend.kinds_of_steps(steps, variables)
    lines = explained(
        {
            text: [_way(update, steps, xla=xla) for update in updates]
            for text, xla in kinds.items()
        },
        names,
    )
    if steps.jit_compile is not False and (why := backend.why_no_kernel()):
        lines.append(f"No kernel: {why}.")
    lines += _state(updates, names, optimizer)
    if steps.on(Search):
        lines += _auto(optimizer, names)
    return "\n".join(lines)


def _auto(optimizer: Any, names: Sequence[str]) -> list[str]:
    """Return the learning rate that is estimated, and what else "auto" chooses."""
    rate, momentum = optimizer.current_learning_rate, optimizer.momentum
    parts = ["not known before a step" if rate is None else f"{rate:.3g}"]
    if options.is_on(momentum):
        kind = "Nesterov momentum" if optimizer.nesterov else "momentum"
        parts.append(f"{kind} {float(momentum):g}")
    if optimizer.use_ema:
        warm_up = " with warm-up" if optimizer.ema_warmup else ""
        parts.append(f"EMA of the weights {float(optimizer.ema_momentum):g}{warm_up}")
    lines = [f"Estimated learning rate: {'; '.join(parts)}."]
    pairs = zip(names, optimizer._trainable_variables, strict=True)
    if tables := [name for name, v in pairs if is_apart(optimizer, v)]:
        head = "Tables, without momentum, at a rate that does not decay: "
        lines += _lines(head, tables)
    return lines


def _way(update: Update, steps: Steps, *, xla: bool) -> Way:
    optimizer: Any = steps.optimizer
    if own := steps.own() & hooks.OWN_UPDATE:
        names = " and ".join(f"`{name}`" for name in sorted(own))
        return Way(f"by its own {names}", "as Keras would")
    if update.slots.velocity is None:
        return Way("replaced by its gradient", "as of float8 training")
    why = steps.why_all_rows(update.variable)
    if why and optimizer._var_key(update.variable) in optimizer._clocks.sparse:
        return Way("by all rows", f"sparse gradients, but {why}")
    way = backend.way(update, steps.constants(0.0), xla=xla)
    clock = update.rows.clock if update.rows is not None else None
    if clock is not None and optimizer.use_ema and clock.average.shared:
        also = "its average by all, as another optimizer updates the table, too"
        way = way._replace(why=f"{way.why}; {also}")
    return way


def _state(
    updates: Sequence[Update], names: Sequence[str], optimizer: Any
) -> list[str]:
    """Return the dtype of the slots; where they differ, that of each variable."""
    slots = [update.slots for update in updates]
    if any(map(codecs.are_in_blocks, slots)):
        whys = [codec_of(optimizer, update.variable)[1] for update in updates]
        ways = [
            Way(*codecs.explained(*given)) for given in zip(slots, whys, strict=True)
        ]
        return explained({"State": ways}, names)
    kept = [slot.velocity for slot in slots if slot.velocity is not None]
    dtypes = sorted({keras.backend.standardize_dtype(v.dtype) for v in kept})
    return [f"State: {', '.join(dtypes)}."] if dtypes else []


def explained(
    kinds: Mapping[str, Sequence[Way]], variables: Sequence[str]
) -> list[str]:
    r"""Return the lines for each kind of step, or one for kinds that do the same.

    Args:
        kinds: For each kind of step, described in words, the way of each variable.
        variables: The names of the variables.

    Example:
        >>> alone, together = Way("on its own", "large"), Way("concatenated", "small")
        >>> ways = [alone, together, together]
        >>> print("\n".join(explained({"Eager": ways, "In `fit`": ways}, "abc")))
        Eager. In `fit`:
          1 on its own (large): a
          2 concatenated (small): b, c
    """
    texts: dict[tuple[Way, ...], list[str]] = {}
    for text, ways in kinds.items():
        texts.setdefault((*ways,), []).append(text)
    lines = []
    for each, heads in texts.items():
        lines += textwrap.wrap(f"{'. '.join(heads)}:", WIDTH)
        for way in dict.fromkeys(each):
            names = [v for v, w in zip(variables, each, strict=True) if w == way]
            lines += _lines(f"  {len(names)} {way.name} ({way.why}): ", names)
    return lines


def _lines(head: str, names: Sequence[str]) -> list[str]:
    """Return a line with as many names as fit; more lines if not even one does."""
    for count in range(len(names), 0, -1):
        more = f" and {len(names) - count} more" if count < len(names) else ""
        line = head + ", ".join(names[:count]) + more
        if len(line) <= WIDTH:
            return [line]
    return textwrap.wrap(
        line.strip(), WIDTH, initial_indent="  ", subsequent_indent="    "
    )
