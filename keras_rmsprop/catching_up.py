"""Tables brought up to date: all rows, all at once or not at all.

Imported only on the TensorFlow backend.
"""

from collections.abc import Hashable
from typing import Any

import tensorflow as tf

from keras_rmsprop import estimate, sparse
from keras_rmsprop.clocks import Clock
from keras_rmsprop.codecs import Draw
from keras_rmsprop.row_averages import Table
from keras_rmsprop.rule import Slots
from keras_rmsprop.sampling import Sample


def catch_up(
    clock: Clock,
    slots: Slots,
    rho: Any,
    draw: Draw,
    *,
    gradient_sums: Any = None,
    sample: Sample | None = None,
    average: Table | None = None,
) -> None:
    """Bring all rows of a table up to date: of slots, search and average.

    To Python that is one operation: after Ctrl-C all is done, or nothing.

    Args:
        clock: The table's clock.
        slots: The table's slots.
        rho: Decay rate of the averages.
        draw: What random rounding depends on.
        gradient_sums: Keeps the s of the search for a learning rate, or None.
        sample: Which elements of the table the search looks at.
        average: The average of the weights of which rows may be behind, or None.
    """
    is_behind = average_is_behind = True
    if tf.executing_eagerly():
        is_behind = clock.is_behind()
        average_is_behind = average is not None and average.clock.is_behind()

    def change() -> None:
        if is_behind:
            if gradient_sums is not None and sample is not None:
                estimate.catch_up(gradient_sums, clock, sample)
            sparse.catch_up(slots, clock, rho, draw)
        if average is not None and average_is_behind:
            average.catch_up()

    clock.mark_all_pending()  # what is written to the sums comes in another way
    if is_behind or average_is_behind:
        key = average.key if average is not None and average_is_behind else None
        parts = is_behind, rho, *slots, *draw, gradient_sums, key
        clock.at_once(change, tuple(map(_key, parts)))


def _key(x: Any) -> Hashable:
    """Return something equal for the same: for a number or a key, what is equal."""
    return x if isinstance(x, int | float | tuple | None) else id(x)
