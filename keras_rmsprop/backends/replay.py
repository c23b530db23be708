"""A short program, replayed one operation after the other.

To call a function, TensorFlow takes as long as for a handful of operations, and for
each tensor as long again as an operation does. So a program of only a few operations,
such as the step of the kernel, is faster as these operations. Only one of them may
change variables: so Ctrl-C comes before the step or after it, and never in between.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from keras_rmsprop.kernel import tensorflow as kernel

READS = ("ReadVariableOp", "ResourceGather")
"""The operations that use variables and change none."""
MOST_OPERATIONS = 8
"""A program of more operations is called as a function."""


class _Operation(NamedTuple):
    """An operation: what to call with what is known of its arguments, and inputs."""

    function: Callable[..., Any]
    known: Mapping[str, Any]
    inputs: Mapping[str, int | list[int]]
    """For each of the other arguments, where among the values it is, or they are."""
    writes: bool
    """Whether it changes a variable."""


class Replay:
    """Some operations, as a function of a list of tensors; it returns nothing."""

    def __init__(self, operations: list[_Operation]) -> None:
        self._operations = operations

    def __call__(self, tensors: list[Any]) -> None:
        """Run the operations."""
        values = [*tensors]
        for function, known, inputs, _ in self._operations:
            others = {
                name: (
                    values[place]
                    if isinstance(place, int)
                    else [values[i] for i in place]
                )
                for name, place in inputs.items()
            }
            values.append(function(**known, **others))


def replayed(concrete: Any) -> Replay | None:
    """Return a traced function as its operations, if there are only a few.

    What depends on constants alone is computed now.

    Args:
        concrete: The `tf.types.experimental.ConcreteFunction`; its result is not used.

    Returns:
        None if it is no short program, or one whose operations cannot be called alone.
    """
    graph, captured = concrete.graph, concrete.captured_inputs
    count = len(graph.inputs) - len(captured)
    known = {x.name: y for x, y in zip(graph.inputs[count:], captured, strict=True)}
    places = {x.name: i for i, x in enumerate(graph.inputs[:count])}
    operations: list[_Operation] = []
    for operation in graph.get_operations():
        if operation.type in ("Placeholder", "NoOp"):
            continue
        if operation.type == "Const":
            [x] = operation.outputs
            known[x.name] = tf.constant(tf.get_static_value(x), x.dtype)
            continue
        function, arguments = _callable(operation)
        if function is None or len(operation.outputs) > 1:
            return None
        fixed, inputs = dict(arguments), {}
        for name, given in _inputs(operation).items():
            several = given if isinstance(given, list) else [given]
            if all(x.name in known for x in several):
                values = [known[x.name] for x in several]
                takes_group = operation.type in kernel.TAKE_GROUPS
                takes_group = takes_group and name not in kernel.SINGLE
                if takes_group and [*{x.dtype for x in values}] == [tf.resource]:
                    values = [kernel.group(values)]
                fixed[name] = values if isinstance(given, list) else values[0]
            elif not all(x.name in places for x in several):
                return None  # known and unknown ones in a list
            else:
                found = [places[x.name] for x in several]
                inputs[name] = found if isinstance(given, list) else found[0]
        writes = operation.op_def.is_stateful and operation.type not in READS
        if writes and any(x.writes for x in operations):
            return None
        if not inputs and not operation.op_def.is_stateful:
            known[operation.outputs[0].name] = function(**fixed)
            continue
        for x in operation.outputs:
            places[x.name] = count + len(operations)
        operations.append(_Operation(function, fixed, inputs, writes))
        if len(operations) > MOST_OPERATIONS:
            return None
    return Replay(operations)


def _callable(operation: Any) -> tuple[Callable[..., Any] | None, dict[str, Any]]:
    """Return the function that runs an operation, and its attributes; or None."""
    definition = operation.op_def
    function = getattr(tf.raw_ops, operation.type, None)
    function = function or getattr(kernel.ops(), operation.type, None)
    of_inputs = {
        name
        for x in definition.input_arg
        for name in (x.type_attr, x.number_attr, x.type_list_attr)
    }
    attributes = [x for x in definition.attr if x.name not in of_inputs]
    if function is None or any("func" in x.type for x in attributes):
        return None, {}
    names = {x.name for x in attributes} | {x.name for x in definition.input_arg}
    if not names <= {*inspect.signature(function).parameters}:
        return None, {}
    return function, {x.name: operation.get_attr(x.name) for x in attributes}


def _inputs(operation: Any) -> dict[str, Any]:
    """Return the input tensors of an operation, or lists of them, by their names."""
    tensors, found = iter(operation.inputs), {}
    for x in operation.op_def.input_arg:
        if x.number_attr:
            length = operation.get_attr(x.number_attr)
        elif x.type_list_attr:
            length = len(operation.get_attr(x.type_list_attr))
        else:
            found[x.name] = next(tensors)
            continue
        found[x.name] = [next(tensors) for _ in range(length)]
    return found
