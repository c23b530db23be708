r"""A learning rate found while training: how far the weights must travel, estimated.

It is the distance estimate of Prodigy, with RMSprop's steps. The weights $x$ began at
$x_0$ and have gradients $g$. The distance is $d$, a factor on it is $f$ (a schedule's,
say), and $b = \sqrt{0.999}$. Before the weights change, step $t = 1, 2, \dots$ does:

$$\begin{aligned}
  \lambda &= f d^2 / d_0 \\
  r &\leftarrow b r + \lambda \sum \langle g, x_0 - x \rangle, \qquad
  s \leftarrow b s + \lambda g \\
  d &\leftarrow \max(d_0,\; d \sqrt{(t + 99) / (t + 100)},\; c\, r / \sum |s|)
\end{aligned}$$

If the way down the gradients leads back to where the weights began, the weights went
too far, and $r$ is small. If it leads on, $r / \sum |s|$ says how far there is to go.
The steps are those of RMSprop with the learning rate $f d$. The scale of the loss
cancels.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_rmsprop import checks
from keras_rmsprop.folding import total
from keras_rmsprop.slots import FIRST_WEIGHT, GRADIENT_SUM, RATE_ESTIMATE
from keras_rmsprop.state import as_array

if keras.backend.backend() == "tensorflow":
    from keras_rmsprop import sparse

FORGETTING = 0.999**0.5
"""b, the decay rate of the sums: they remember some 2000 steps."""
EPSILON = 1e-30
"""Used instead of the default 1e-7, beside which small gradients would not count."""
STUCK_STEPS, RUNAWAY_DISTANCE = 100, 10.0
"""The rate must have grown after so many steps; a larger distance is too large."""
LARGE_INITIAL = 1e-3
"""A larger initial rate may exceed the right one, which is then not found."""
LASTING = 100
"""For so many steps a distance found at the start lasts, before it fades."""
MOST = 1e4
"""No distance is larger: on a slope without end it would grow to infinity."""
SAMPLED_ELEMENTS = 2**12
"""From this size on, only a sample of a variable's elements is looked at."""
INITIAL = checks.Range(lambda x: 1e-12 <= x <= 1, "in [1e-12, 1]")
COEFFICIENT = checks.Range(lambda x: 0 < x <= 1000, "in (0, 1000]")
LONGEST_STEP = 100.0
"""No step moves a weight farther than so many learning rates."""


@keras.saving.register_keras_serializable(package="keras_rmsprop")
class AutoLearningRate:
    r"""How to find a learning rate while training.

    `RMSprop(learning_rate="auto")` is short for
    `RMSprop(learning_rate=AutoLearningRate())`. Few need more.

    Args:
        initial: $d_0$ in [1e-12, 1], the rate of the first step, in units of the
            weights. It should be smaller than any rate that could be right. Defaults
            to `1e-5`.
        coefficient: $c$ in (0, 1000]; the distance found is multiplied by it.
            Defaults to `1`.
        growth: The factor > 1 by which the rate may grow in a step: 1.02 is a slow
            warm-up. Defaults to infinity.
        one_in: In each variable with 4096 elements or more, the estimate looks at one
            element in so many. It needs memory and time for these alone: two numbers
            each. Defaults to `4`.
        factor: The rate found is multiplied by it: a number or anything else that may
            be a learning rate, such as a
            `keras.optimizers.schedules.LearningRateSchedule`. It becomes
            `optimizer.learning_rate`. Defaults to `1`.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: An argument is not of its type.

    Example:
        >>> import keras
        >>> from keras_rmsprop import AutoLearningRate, RMSprop
        >>> decay = keras.optimizers.schedules.CosineDecay(1.0, 200)
        >>> optimizer = RMSprop(AutoLearningRate(growth=1.1, factor=decay))
        >>> weight = keras.Variable(1.0)
        >>> for _ in range(200):
        ...     optimizer.apply([weight.numpy()], [weight])  # of weight^2 / 2
        >>> bool(abs(weight.numpy()) < 1e-6)
        True

    Reference:
        - [Mishchenko and Defazio, 2023](https://arxiv.org/abs/2306.06101), Prodigy.
          There $d$ never shrinks, and $v$ and $\epsilon$ are scaled by it.
    """

    def __init__(
        self,
        initial: float = 1e-5,
        coefficient: float = 1.0,
        growth: float = math.inf,
        one_in: int = 4,
        factor: Any = 1.0,
    ) -> None:
        self.initial = checks.number("initial", initial, INITIAL)
        self.coefficient = checks.number("coefficient", coefficient, COEFFICIENT)
        self.growth = checks.number("growth", growth, checks.ABOVE_ONE)
        self.one_in = checks.integer("one_in", one_in, 1)
        self.factor = checks.learning_rate(factor)

    def sample(self, shape: Sequence[int]) -> "Sample":
        """Return which elements of a variable with this shape are looked at."""
        return Sample(shape, self.one_in)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments to make an equal one with."""
        return {
            "initial": self.initial,
            "coefficient": self.coefficient,
            # JSON knows no infinity.
            "growth": None if math.isinf(self.growth) else self.growth,
            "one_in": self.one_in,
            "factor": keras.saving.serialize_keras_object(self.factor),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "AutoLearningRate":
        """Return one made from what `get_config` returned."""
        given = {**config}
        if given.get("growth", 0) is None:
            given["growth"] = math.inf
        if "factor" in given:
            given["factor"] = keras.saving.deserialize_keras_object(given["factor"])
        return cls(**given)

    def looks_like(self, other: "AutoLearningRate") -> bool:
        """Whether another one is the same except for the factor."""
        same = "initial", "coefficient", "growth", "one_in"
        return all(getattr(self, name) == getattr(other, name) for name in same)


class Estimate(NamedTuple):
    """What is known so far: four numbers, kept in one variable."""

    distance: Any
    """d; the learning rate is this times the factor."""
    gain: Any
    """r."""
    steps: Any
    """t, the number of steps so far."""
    path: Any
    """The sum of the learning rates so far: how far a weight can have come."""


class Part(NamedTuple):
    """A variable in the estimate."""

    variable: Any
    gradient: Any
    """A tensor of the variable's shape, or of its rows'; None: it has no step now."""
    first: Any
    """Keeps its first weights, of the elements that are looked at."""
    sums: Any
    """Keeps s, of the same elements."""
    sample: "Sample"
    """Which elements are looked at."""
    rows: Any = None
    """The rows of a table (`sparse.Rows`); None: it has no clock."""


def asked_for(learning_rate: Any) -> AutoLearningRate | None:
    """Return how to find a learning rate; None if it is given."""
    if isinstance(learning_rate, str) and learning_rate == "auto":
        return AutoLearningRate()
    return learning_rate if isinstance(learning_rate, AutoLearningRate) else None


class Sample:
    """Which elements of a variable are looked at: all of a small one, else one in n.

    The shorter side is thinned. So in a large table each row can be followed on its
    own, and in a square kernel whole lines of memory are left out.

    Args:
        shape: The variable's shape.
        one_in: n.

    Attributes:
        is_small: Whether all are looked at, whatever `one_in` is.
        shape: The shape of these elements.
        whole_rows: Whether they are all elements of some rows.
        stands_for: How many elements of the variable one of these stands for.
        places: Where they are: they come in runs. In memory a run has so many elements,
            the next run begins so many elements later, and so does the next element.

    Example:
        >>> import numpy as np
        >>> sample = Sample((2000, 5), 4)
        >>> sample.of(np.arange(10_000).reshape(2000, 5))[:2]
        array([[0, 4],
               [5, 9]])
        >>> sample.shape, sample.stands_for
        ((2000, 2), 2.5)
        >>> sample.places
        (2, 5, 4)
    """

    def __init__(self, shape: Sequence[int], one_in: int) -> None:
        size, self._last = math.prod(shape), shape[-1] if len(shape) else 1
        rows = size // max(self._last, 1)
        self.is_small = size < SAMPLED_ELEMENTS
        self._step = 1 if self.is_small else one_in
        self.whole_rows = 1 < self._step <= rows <= self._last
        self.shape = tuple(shape)
        if self.whole_rows:
            self.shape = -(-rows // self._step), self._last
        elif self._step > 1:
            self.shape = *shape[:-1], -(-self._last // self._step)
        self.stands_for = size / max(math.prod(self.shape), 1)
        self.places = max(math.prod(self.shape), 1), max(size, 1), 1
        if self.whole_rows:
            self.places = self._last, self._step * self._last, 1
        elif self._step > 1:
            self.places = self.shape[-1], self._last, self._step

    def of(self, x: Any) -> Any:
        """Return these elements of a tensor of the variable's shape, or of its rows."""
        if self.whole_rows:
            return ops.reshape(x, (-1, self._last))[:: self._step]
        return x if self._step == 1 else x[..., :: self._step]

    def layout(self, whole: Any) -> Any:
        """Return how to spread these elements over devices: like the variable's.

        Args:
            whole: The `keras.distribution.TensorLayout` of the variable. An axis of it
                that does not divide the elements evenly is not used.
        """
        axes = whole.axes
        if self.whole_rows:
            axes = (axes[0] if len(axes) == 2 else None), axes[-1]
        mesh = whole.device_mesh
        parts = dict(zip(mesh.axis_names, mesh.shape, strict=True))
        axes = [
            axis if n % parts.get(axis, 1) == 0 else None
            for axis, n in zip(axes, self.shape, strict=True)
        ]
        return keras.distribution.TensorLayout(axes, mesh)


class Search:
    """The search for a learning rate: how it goes, and the variables that it needs.

    Args:
        options: How to look.

    Attributes:
        options: The same.
        firsts: For each of the model's variables, what keeps its first weights.
        sums: For each, what keeps s.
        estimate: Keeps the `Estimate`.
    """

    def __init__(self, options: AutoLearningRate) -> None:
        self.options = options
        self.firsts: list[Any] = []
        self.sums: list[Any] = []
        self.estimate: Any = None

    def build(
        self, add_slots: Callable[[str], list[Any]], add: Callable[..., Any]
    ) -> None:
        """Make the variables.

        Args:
            add_slots: Makes a slot of a kind for each of the model's variables.
            add: Keras' `add_variable`.
        """
        self.firsts, self.sums = add_slots(FIRST_WEIGHT), add_slots(GRADIENT_SUM)
        begin = keras.initializers.Constant([self.options.initial, 0.0, 0.0, 0.0])
        self.estimate = add((4,), begin, "float32", name=RATE_ESTIMATE)

    def distance(
        self,
        variables: Sequence[Any],
        gradients: Sequence[tuple[int, Any]],
        rows: Callable[[int], Any],
        factor: Any,
        *,
        sign: int,
        fold: bool,
        scale: Any = None,
        kernel: Any = None,
    ) -> Any:
        """Update the estimate of how far the weights must travel; see `find`.

        Args:
            variables: The model's variables.
            gradients: The indices of those that have one in this step, and these.
            rows: Returns the rows of a table that the step takes, by its index.
            factor: See `find`.
            sign: See `find`.
            fold: See `find`.
            scale: See `find`.
            kernel: See `find`.
        """
        given: dict[int, Any] = {}
        for i, gradient in gradients:
            given[i] = gradient + given[i] if i in given else gradient
        quads = zip(
            range(len(variables)), variables, self.firsts, self.sums, strict=True
        )
        options = self.options
        parts = [
            Part(v, given.get(i), first, sums, options.sample(v.shape), rows(i))
            for i, v, first, sums in quads
            if first is not None
        ]
        kept = self.estimate
        return find(
            parts,
            kept,
            factor,
            options,
            sign=sign,
            fold=fold,
            scale=scale,
            kernel=kernel,
        )

    def known(self) -> Estimate:
        """Return the estimate, as numbers."""
        if self.estimate is None:
            return Estimate(self.options.initial, 0.0, 0.0, 0.0)
        return Estimate(*as_array(self.estimate).tolist())

    def complaint(self, variables: Sequence[Any] = ()) -> str:
        """Return what a user should know about the estimate; see `complaint`.

        Args:
            variables: The model's variables, to see how far they have come; or none.
        """
        way = None
        if variables:
            pairs = zip(variables, self.firsts, strict=True)
            free = [(v, x) for v, x in pairs if x is not None and v.constraint is None]
            way = farthest(free, self.options)
        return complaint(self.known(), self.options, way)


def find(
    parts: Sequence[Part],
    kept: Any,
    factor: Any,
    options: AutoLearningRate,
    *,
    sign: int = 1,
    fold: bool = False,
    scale: Any = None,
    kernel: Any = None,
) -> Any:
    """Update the estimate with this step's gradients; return the distance, a scalar.

    Args:
        parts: All variables, before the step.
        kept: The variable that keeps the `Estimate`.
        factor: f, a scalar.
        options: How to look.
        sign: -1 if the step goes up the gradient.
        fold: Whether XLA compiles it; see `folding`.
        scale: What gradients are to be multiplied by; None: 1.
        kernel: Where there is one, the native kernel, which follows most variables.
    """
    old = Estimate(*ops.unstack(ops.convert_to_tensor(kept), 4))
    factor = ops.cast(factor, "float32")
    weight = factor * old.distance**2 / options.initial
    weight = weight if scale is None else weight * ops.cast(scale, "float32")
    is_first = ops.equal(old.steps, 0)
    gains, sums = [], []
    small: dict[str, list[Part]] = {}
    if kernel is not None:
        found, parts = kernel.follow(parts, weight, is_first, FORGETTING)
        for gain, sum_ in found:
            gains.append(ops.cast(gain, "float32"))
            sums.append(ops.cast(sum_, "float32"))
    _begin(parts, is_first)
    # End to end, parts of variables that are spread over devices would have to travel.
    may_join = keras.distribution.distribution() is None
    for part in parts:
        stands_for = part.sample.stands_for
        if part.gradient is None:
            sums.append(stands_for * _silent(part, fold))
        elif part.rows is None and part.sample.is_small and may_join:
            small.setdefault(part.sums.dtype, []).append(part)
        else:
            follow = _follow if part.rows is None else _follow_rows
            gain, sum_ = follow(part, weight, fold)
            gains.append(stands_for * ops.cast(gain, "float32"))
            sums.append(stands_for * ops.cast(sum_, "float32"))
    for several in small.values():
        gain, sum_ = _follow_end_to_end(several, weight)
        gains.append(ops.cast(gain, "float32"))
        sums.append(ops.cast(sum_, "float32"))
    gain = FORGETTING * old.gain + sign * weight * sum(gains)
    steps = old.steps + 1
    fading = old.distance * ops.sqrt((old.steps + LASTING) / (steps + LASTING))
    found = options.coefficient * gain / (sum(sums) + EPSILON)
    distance = ops.maximum(ops.maximum(found, fading), options.initial)
    distance = ops.minimum(distance, MOST)
    if not math.isinf(options.growth):
        distance = ops.minimum(distance, options.growth * old.distance)
    path = old.path + factor * distance
    kept.assign(ops.stack(Estimate(distance, gain, steps, path)))
    return distance


def _begin(parts: Sequence[Part], is_first: Any) -> None:
    """Keep the first weights, if this is the first step.

    Other weights may have been loaded since the optimizer was built.
    """
    if not parts:
        return

    def begin() -> None:
        for part in parts:
            weights = part.sample.of(ops.convert_to_tensor(part.variable))
            part.first.assign(ops.cast(weights, part.first.dtype))

    if keras.backend.backend() != "jax":
        ops.cond(is_first, begin, lambda: None)
        return
    # There a branch has no side effects.
    before = [ops.convert_to_tensor(part.first) for part in parts]
    begin()
    for part, first in zip(parts, before, strict=True):
        part.first.assign(ops.where(is_first, ops.convert_to_tensor(part.first), first))


def _follow(part: Part, weight: Any, fold: bool) -> tuple[Any, Any]:
    """Return <g, x0 - x> and the sum of |s| of a variable; keep s."""
    dtype = part.sums.dtype
    g, x = (
        ops.cast(part.sample.of(ops.convert_to_tensor(tensor)), dtype)
        for tensor in (part.gradient, part.variable)
    )
    new = FORGETTING * ops.convert_to_tensor(part.sums) + ops.cast(weight, dtype) * g
    part.sums.assign(new)
    way = ops.convert_to_tensor(part.first) - x
    return total(g * way, fold=fold), total(ops.absolute(new), fold=fold)


def _follow_end_to_end(parts: Sequence[Part], weight: Any) -> tuple[Any, Any]:
    """Do the same for small variables, where operations cost more than numbers."""
    dtype = parts[0].sums.dtype

    def shaped(x: Any, shape: Sequence[int]) -> Any:
        # Most are vectors, and an operation that does nothing costs as much as others.
        return x if len(x.shape) == len(shape) == 1 else ops.reshape(x, shape)

    def end_to_end(tensors: Iterable[Any]) -> Any:
        return ops.concatenate([shaped(ops.cast(x, dtype), (-1,)) for x in tensors])

    g = end_to_end(part.gradient for part in parts)
    x = end_to_end(ops.convert_to_tensor(part.variable) for part in parts)
    first = end_to_end(ops.convert_to_tensor(part.first) for part in parts)
    old = end_to_end(ops.convert_to_tensor(part.sums) for part in parts)
    new = FORGETTING * old + ops.cast(weight, dtype) * g
    ends = [*itertools.accumulate(math.prod(part.sums.shape) for part in parts)]
    pieces = ops.split(new, ends[:-1]) if len(parts) > 1 else [new]
    for part, piece in zip(parts, pieces, strict=True):
        part.sums.assign(shaped(piece, part.sums.shape))
    return ops.sum(g * (first - x)), ops.sum(ops.absolute(new))


def _follow_rows(part: Part, weight: Any, fold: bool) -> tuple[Any, Any]:
    """Do the same from the rows of a table that a step updates."""
    clock, ids = part.rows

    def seen(x: Any) -> Any:
        return ops.cast(part.sample.of(x), part.sums.dtype)

    before = _silent(part, fold)
    g, x = seen(part.gradient), seen(sparse.read(part.variable, ids))
    first = sparse.read(part.first, ids)
    old = FORGETTING * sparse.faded(sparse.read(part.sums, ids), part.rows, FORGETTING)
    new = old + ops.cast(weight, g.dtype) * g
    sparse.write(part.sums, new, ids)
    sum_ = ops.sum(ops.absolute(new))
    if ids is not None:
        sum_ += FORGETTING * ops.cast(before, g.dtype) - ops.sum(ops.absolute(old))
    sum_ = ops.maximum(sum_, 0)  # rounding takes it below
    clock.sum.assign(ops.cast(sum_, clock.sum.dtype))
    return ops.sum(g * (first - x)), sum_


def _silent(part: Part, fold: bool) -> Any:
    """Return the current sum of |s| of a variable; for a table, its clock knows it."""

    def whole() -> Any:
        sums = ops.absolute(ops.convert_to_tensor(part.sums))
        return ops.cast(total(sums, fold=fold), "float32")

    if part.rows is None:
        return whole()
    clock = part.rows.clock
    return ops.cond(clock.updates > 0, lambda: ops.convert_to_tensor(clock.sum), whole)


def catch_up(sums: Any, clock: Any) -> None:
    """Bring the s of all rows of a table up to date, before its clock is reset.

    Args:
        sums: The variable that keeps s.
        clock: The table's clock.
    """
    rows = sparse.Rows(clock)
    sparse.write(sums, sparse.faded(sparse.read(sums, None), rows, FORGETTING), None)


def farthest(pairs: Sequence[tuple[Any, Any]], options: AutoLearningRate) -> float:
    """Return how far the farthest weight is from where it began.

    Args:
        pairs: Variables, and what keeps their first weights.
        options: How these are looked at.
    """
    ways = [
        ops.stop_gradient(options.sample(x.shape).of(ops.convert_to_tensor(x)) - first)
        for x, first in pairs
        if math.prod(first.shape)
    ]
    return max((float(ops.max(ops.absolute(way))) for way in ways), default=0.0)


def complaint(
    estimate: Estimate, options: AutoLearningRate, farthest: float | None = None
) -> str:
    """Return what a user should know about an estimate, with the remedy; or nothing.

    Args:
        estimate: The estimate, as numbers.
        options: How it was looked for.
        farthest: How far the farthest weight is from where it began, if known.
    """
    distance, _, steps, path = estimate
    if steps >= STUCK_STEPS and distance <= options.initial:
        is_large = options.initial > LARGE_INITIAL
        why = "it may be too large" if is_large else "the gradients do not agree"
        other = 1e-5 if is_large else 100 * options.initial
        return (
            f"The learning rate is still at its initial value of {options.initial:g} "
            f"after {steps:.0f} steps: {why}. If the loss does not fall, use "
            f"`AutoLearningRate(initial={other:g})`"
        )
    if not distance <= RUNAWAY_DISTANCE:  # NaN, too
        return (
            f"The learning rate found, {distance:.3g}, is larger than weights should "
            "move in a step. If the loss does not fall, use "
            "`AutoLearningRate(coefficient=0.5, growth=1.02)`, or clip gradients"
        )
    if farthest is not None and farthest > LONGEST_STEP * path:
        return (
            f"A weight is {farthest:.3g} from where it began, farther than steps have "
            "taken it. If weights were replaced while training, make a new optimizer, "
            "which begins from them"
        )
    return ""
