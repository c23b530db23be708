"""Rows of TensorFlow's variables, read and written in place.

Imported only on the TensorFlow backend.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import keras
import tensorflow as tf

Function = TypeVar("Function", bound=Callable[..., Any])

CONVERTIBLE: ContextVar[bool] = ContextVar("convertible", default=False)
"""Whether operations that TFLite does not know must not be used."""


def unwrapped(variable: Any) -> Any:
    """Return the TensorFlow variable inside a Keras variable, or the one given."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def without_autograph(function: Function) -> Function:
    """Return a function, marked as one that AutoGraph does not convert.

    `tf.autograph.experimental.do_not_convert` would also keep it from converting what a
    user's constraint or schedule, called from there, gives to `tf.map_fn`. Without the
    private mark it converts this package's code: slower, to the same result.
    """
    vars(function)["autograph_info__"] = {}
    return function


@contextlib.contextmanager
def outside_functions() -> Iterator[None]:
    """Make variables outside all functions that are being traced.

    `tf.init_scope` alone leaves a function's own way to make variables in place, which
    refuses them in all its traces but the first. A strategy in scope has its own, too,
    which is left in place.
    """
    is_traced = not (tf.executing_eagerly() or tf.distribute.has_strategy())
    with tf.init_scope():
        leaves = is_traced and tf.executing_eagerly()
        with tf.variable_creator_scope(_made) if leaves else contextlib.nullcontext():
            yield


def _made(next_creator: Any, **options: Any) -> Any:
    """Make a variable by TensorFlow's private class, or else in the function's way."""
    try:
        from tensorflow.python.ops.resource_variable_ops import ResourceVariable
    except ImportError:
        return next_creator(**options)
    known = inspect.signature(ResourceVariable.__init__).parameters
    return ResourceVariable(**{k: v for k, v in options.items() if k in known})


def read(variable: Any, ids: Any) -> Any:
    """Return some rows of a variable without reading the others; None: all."""
    if ids is None:
        return tf.convert_to_tensor(unwrapped(variable))
    rows = tf.gather(unwrapped(variable), ids)
    _keep_reads_cheap(variable)
    return rows


def write(variable: Any, values: Any, ids: Any) -> None:
    """Set some rows of a variable in place; None: all."""
    if ids is None:
        unwrapped(variable).assign(values)
        return
    unwrapped(variable).scatter_update(tf.IndexedSlices(values, ids))
    _keep_reads_cheap(variable)


def subtract(variable: Any, values: Any, ids: Any, old: Any = None) -> None:
    """Subtract from some rows of a variable in place; None: from all.

    Args:
        variable: The variable.
        values: What to subtract.
        ids: The rows.
        old: The rows as they are, if they were read.
    """
    if old is None and ids is not None and inside_xla():
        tensor = unwrapped(variable)
        tensor.scatter_sub(tf.IndexedSlices(tf.cast(values, tensor.dtype), ids))
        return
    # Else `scatter_sub` takes twice as long, on CPU, as to read and to write.
    old = read(variable, ids) if old is None else old
    write(variable, old - tf.cast(values, old.dtype), ids)


def copy(average: Any, variable: Any) -> None:
    """Let a moving average be as its variable is."""
    write(average, tf.cast(read(variable, None), average.dtype), None)


def mix(average: Any, variable: Any, ids: Any, momentum: Any) -> None:
    """Let some rows of a moving average follow those of its variable."""
    old = read(average, ids)
    new = tf.cast(read(variable, ids), old.dtype)
    write(average, momentum * old + (1 - momentum) * new, ids)


def after(ids: Any, known: Any) -> Any:
    """Return indices that XLA knows only after numbers >= 0 that were read.

    XLA puts a read before a write in place only if what is written depends on what was
    read. Else it copies the whole variable.
    """
    return tf.where(known < 0, tf.zeros_like(ids), ids) if inside_xla() else ids


def _keep_reads_cheap(variable: Any) -> None:
    """Let reads of a whole table share its memory instead of copying it.

    To gather or to scatter rows makes TensorFlow copy the table at each later read, as
    that of an embedding's forward pass. To end that is safe: whoever gathers or
    scatters then copies first if someone still holds what was read. TFLite does not
    know the operation.
    """
    if not (CONVERTIBLE.get() or inside_xla()):
        tf.raw_ops.DisableCopyOnRead(resource=unwrapped(variable).handle)


def inside_xla() -> bool:
    """Whether this is being traced for XLA, which writes in place by itself.

    There is no public way to know. Without the private one the answer is yes: right
    everywhere, but then reads of a table copy it.
    """
    try:
        from tensorflow.python.framework import ops
        from tensorflow.python.ops import control_flow_util

        return bool(
            control_flow_util.GraphOrParentsInXlaContext(ops.get_default_graph())
        )
    except (ImportError, AttributeError):
        return True
