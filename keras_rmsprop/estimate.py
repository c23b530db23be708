r"""The automatic learning rate: an estimate of how far the weights must travel.

It is the distance estimate of Prodigy, with RMSprop's steps. The weights $x$ began at
$x_0$ and have gradients $g$. The distance is $d$, a factor on it is $f$ (a schedule's,
say), and $b = \sqrt{0.999}$. Before the weights change, step $t = 1, 2, \dots$ does:

$$\begin{aligned}
  \lambda &= f d^2 / d_0, \qquad
  r \leftarrow b r + \lambda \sum \langle g, x_0 - x \rangle, \qquad
  s \leftarrow b s + \lambda g \\
  d &\leftarrow \max(d_0,\; d \sqrt{(t + 99) / (t + 100)},\; c\, r / \sum |s|) \\
  q &\leftarrow 0.9\, q - 0.1 \sum g m \,/ \sum |g m| \\
  h &= 1 - 0.005 \max(0,\; 4 q - 3) + 0.02 \max(0,\; -q), \qquad
  k \leftarrow \min(1,\; \max(d_0 / d,\; h k))
\end{aligned}$$

If the way down the gradients leads back to where the weights began, the weights went
too far, and $r$ is small. If it leads on, $r / \sum |s|$ says how far there is to go.
The steps are those of RMSprop with the learning rate $f k d$. The scale of the loss
cancels.

Steps that are too long for a loss without noise go back and forth: nearly all gradients
point back along the momentum buffer $m$, and $q$ is near 1. Then the brake $k$ makes
them shorter. It is released when gradients agree. With noise $q$ is near 0.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_rmsprop.backends import current as backend
from keras_rmsprop.folding import total
from keras_rmsprop.sampling import Sample

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    from keras_rmsprop import sparse
    from keras_rmsprop.kernel import rows as kernel_rows

FORGETTING = 0.999**0.5
"""b, the decay rate of the sums: they remember some 2000 steps."""
TINY = 1e-30
"""Added to sums that may be 0."""
LASTING = 100
"""For so many steps a distance found at the start lasts, before it fades."""
MOST = 1e4
"""No distance is larger: on a slope without end it would grow to infinity."""
BACK = 0.75
"""From this q on, the brake makes steps shorter."""
FALL, RISE = 0.005, 0.02
"""By this share per step if q is 1; by that they grow again if q is -1."""
TURNING = 0.9
"""The decay rate of q."""
SAME = 1e-3
"""Weights are those of the end of `fit` if `reach` has changed by a smaller share."""


JOINED = 8
"""So many small variables XLA sees end to end; with 300 it compiles for 20 s, not 7."""


class Estimate(NamedTuple):
    """What is known so far: eight numbers, kept in one variable."""

    distance: Any
    """d; the learning rate is this times the factor, and the brake."""
    gain: Any
    """r."""
    steps: Any
    """t, the number of steps so far."""
    path: Any
    """The sum of the learning rates so far."""
    reach: Any
    """How far the farthest weight was from its first value when `fit` ended; else 0.

    Less than 0: the search begins again, and the next step forgets the last one.
    """
    longest: Any = 0.0
    """The largest distance so far."""
    back: Any = 0.0
    """q, how far gradients point back along the last steps: -1 to 1."""
    brake: Any = 1.0
    """k, what it makes of the distance: 0 to 1."""

    @property
    def braked(self) -> Any:
        """Return k d, which the factor makes the learning rate."""
        return self.brake * self.distance

    @classmethod
    def at_first(cls, initial: float, *, again: bool = False) -> "Estimate":
        """Return what is known before the first step, of a new search or one again."""
        return cls(initial, 0.0, 0.0, 0.0, -1.0 if again else 0.0, initial)

    @classmethod
    def of(cls, kept: Any) -> "Estimate":
        """Return what a variable keeps, as scalar tensors."""
        return cls(*ops.unstack(ops.convert_to_tensor(kept), len(cls._fields)))


class Sampled(NamedTuple):
    """A variable in the estimate, of which a sample of elements is looked at."""

    variable: Any
    gradient: Any
    """A tensor of the variable's shape, or of its rows'; None: it has no step now."""
    first: Any
    """Keeps its first weights, of the elements that are looked at."""
    sums: Any
    """Keeps s, of the same elements."""
    sample: Sample
    """Which elements are looked at."""
    rows: Any = None
    """The rows of a table (`sparse.Rows`); None: it has no clock."""
    momentum: Any = None
    """Keeps m, of all elements, in the dtype of s; None: there is none."""


class Sums(NamedTuple):
    """What a step sums up, of one variable or of several."""

    gain: Any
    """Of <g, x0 - x>; here and below None is 0."""
    length: Any
    """Of |s|."""
    ahead: Any = None
    """Of g m."""
    both: Any = None
    """Of |g m|."""

    def times(self, n: float) -> "Sums":
        """Return sums in float32, in which each element stands for so many."""
        found = (x if x is None else ops.cast(x, "float32") for x in self)
        return Sums(*(x if n == 1 or x is None else n * x for x in found))


def numbers(options: Any) -> tuple[float, ...]:
    """Return how to search, as the kernel takes it: see `Search` in `search.h`.

    Args:
        options: An `AutoLearningRate`.
    """
    mine = options.initial, options.coefficient, options.growth
    return *mine, FORGETTING, TINY, LASTING, MOST, SAME, BACK, FALL, RISE, TURNING


def find(
    parts: Sequence[Sampled],
    kept: Any,
    factor: Any,
    options: Any,
    *,
    sign: int = 1,
    fold: bool = False,
    scale: Any = None,
    kernel: Any = None,
    momentums: Sequence[Any] = (),
) -> Any:
    """Update the estimate with this step's gradients; return k d, a scalar.

    Args:
        parts: All variables, before the step.
        kept: The variable that keeps the `Estimate`.
        factor: f, a scalar.
        options: How to look: an `AutoLearningRate`.
        sign: -1 if the step goes up the gradient.
        fold: Whether XLA compiles it; see `folding`.
        scale: What gradients are to be multiplied by; None: 1.
        kernel: Where there is one, the native kernel, which follows most variables.
        momentums: Momentum buffers that hold learning rates: they begin again, too.
    """
    _begin_again(parts, kept, options.initial)
    old = Estimate.of(kept)
    _begin(parts, momentums, old)
    factor = ops.cast(factor, "float32")
    weight = factor * old.distance**2 / options.initial
    weight = weight if scale is None else weight * ops.cast(scale, "float32")
    each, small = list[Sums](), dict[tuple[str, bool], list[Sampled]]()
    if kernel is not None:
        found, parts = kernel.follow(parts, weight, FORGETTING)
        each += [Sums(*sums).times(1) for sums in found]
    # End to end, parts of variables that are spread over devices would have to travel.
    may_join = keras.distribution.distribution() is None
    for part in parts:
        stands_for = part.sample.stands_for
        if part.gradient is None:
            each.append(Sums(None, _without_gradient(part, fold)).times(stands_for))
        elif part.rows is not None:
            each.append(_follow_rows(part, weight, fold, kernel).times(stands_for))
        elif part.sample.is_small and may_join:
            kind = part.sums.dtype, part.momentum is not None
            small.setdefault(kind, []).append(part)
        else:
            each.append(_follow(part, weight, fold).times(stands_for))
    for several in small.values():
        most = JOINED if fold else len(several)
        for start in range(0, len(several), most):
            joined = several[start : start + most]
            each.append(_follow_end_to_end(joined, weight).times(1))
    gain, length, ahead, both = (
        sum(x[k] for x in each if x[k] is not None) for k in range(len(Sums._fields))
    )
    back = TURNING * old.back - (1 - TURNING) * sign * ahead / (both + TINY)
    fall = FALL * ops.maximum(0.0, (back - BACK) / (1 - BACK))
    brake = old.brake * (1 - fall + RISE * ops.maximum(0.0, -back))
    gain = FORGETTING * old.gain + sign * weight * gain
    steps = old.steps + 1
    fading = old.distance * ops.sqrt((old.steps + LASTING) / (steps + LASTING))
    found = options.coefficient * gain / (length + TINY)
    distance = ops.maximum(ops.maximum(found, fading), options.initial)
    distance = ops.minimum(distance, MOST)
    if not math.isinf(options.growth):
        distance = ops.minimum(distance, options.growth * old.distance)
    brake = ops.minimum(ops.maximum(brake, options.initial / distance), 1.0)
    path = old.path + factor * distance
    longest = ops.maximum(old.longest, distance)
    now = Estimate(distance, gain, steps, path, 0.0, longest, back, brake)
    kept.assign(ops.stack(now))
    return now.braked


def farthest(parts: Sequence[Sampled]) -> Any:
    """Return how far the farthest weight is from its first value, a float32 scalar."""
    found = [ops.zeros((), "float32")]
    for part in parts:
        if math.prod(part.first.shape):
            weights = part.sample.of(ops.convert_to_tensor(part.variable))
            way = ops.cast(weights, part.first.dtype) - part.first
            found.append(ops.cast(ops.max(ops.absolute(way)), "float32"))
    return ops.stop_gradient(ops.max(ops.stack(found)))


def _begin_again(parts: Sequence[Sampled], kept: Any, initial: float) -> None:
    """Begin another search, if one is asked for or the weights are others.

    They are if they are not those with which the last `fit` ended. A step looks at them
    only if `fit` has ended since the last one.
    """
    so_far = ops.convert_to_tensor(kept)
    reach = so_far[Estimate._fields.index("reach")]

    def look() -> None:
        is_other = ops.absolute(farthest(parts) - reach) > SAME * ops.absolute(reach)
        is_other = ops.logical_or(is_other, reach < 0)
        at_first = [*Estimate.at_first(initial, again=True)]
        at_first = ops.convert_to_tensor(at_first, so_far.dtype)
        kept.assign(ops.where(is_other, at_first, so_far))

    backend.either(ops.equal(reach, 0), lambda: None, look, [kept])


def _begin(parts: Sequence[Sampled], momentums: Sequence[Any], old: Estimate) -> None:
    """Keep the first weights and forget all sums, if this is the first step.

    Other weights may have been loaded since the optimizer was built. If another search
    begins, steps of the old rate are forgotten, too: in a momentum buffer they would go
    on for a while.
    """
    clocks = [part.rows.clock for part in parts if part.rows is not None]
    sums = [*(part.sums for part in parts), *(clock.sum for clock in clocks)]
    firsts = [part.first for part in parts]

    def begin() -> None:
        for part in parts:
            weights = part.sample.of(ops.convert_to_tensor(part.variable))
            part.first.assign(ops.cast(weights, part.first.dtype))
        for variable in sums:
            variable.assign(ops.zeros_like(ops.convert_to_tensor(variable)))
        for variable in momentums:
            m = ops.convert_to_tensor(variable)
            variable.assign(ops.where(old.reach < 0, ops.zeros_like(m), m))

    state = [*firsts, *sums, *momentums]
    backend.either(ops.not_equal(old.steps, 0), lambda: None, begin, state)


def _follow(part: Sampled, weight: Any, fold: bool) -> Sums:
    """Return the sums of a variable; keep s."""
    dtype = part.sums.dtype
    g, x = (
        ops.cast(part.sample.of(ops.convert_to_tensor(tensor)), dtype)
        for tensor in (part.gradient, part.variable)
    )
    old = FORGETTING * ops.convert_to_tensor(part.sums)
    new = old + ops.cast(weight, dtype) * g
    part.sums.assign(new)
    way = ops.convert_to_tensor(part.first) - x
    products = [g * way, ops.absolute(new)]
    if part.momentum is not None:
        ahead = g * part.sample.of(ops.convert_to_tensor(part.momentum))
        products += [ahead, ops.absolute(ahead)]
    return Sums(*(total(product, fold=fold) for product in products))


def _follow_end_to_end(parts: Sequence[Sampled], weight: Any) -> Sums:
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
    sums = [ops.sum(g * (first - x)), ops.sum(ops.absolute(new))]
    if parts[0].momentum is not None:
        momentum = (ops.convert_to_tensor(part.momentum) for part in parts)
        ahead = g * end_to_end(momentum)
        sums += [ops.sum(ahead), ops.sum(ops.absolute(ahead))]
    return Sums(*sums)


def _follow_rows(part: Sampled, weight: Any, fold: bool, kernel: Any) -> Sums:
    """Do the same from the rows of a table that a step updates."""
    before = _without_gradient(part, fold)
    clock, ids = part.rows
    by_kernel = None
    if kernel is not None and ids is not None:
        by_kernel = kernel_rows.follow_rows(part, weight, FORGETTING)
    if by_kernel is None:
        gain, sum_ = _rows_followed(part, weight, before)
    else:
        gain, more = by_kernel
        sum_ = FORGETTING * ops.cast(before, more.dtype) + more
    sum_ = ops.maximum(sum_, 0)  # rounding takes it below
    clock.sum.assign(ops.cast(sum_, clock.sum.dtype))
    return Sums(gain, sum_)


def _rows_followed(part: Sampled, weight: Any, before: Any) -> tuple[Any, Any]:
    """Return the sums of `_follow_rows`, given that of |s| before; keep s."""
    rows, positions, g, x = _rows_seen(part)
    g, x = (ops.cast(tensor, part.sums.dtype) for tensor in (g, x))
    first = sparse.read(part.first, positions)
    old = FORGETTING * sparse.faded(sparse.read(part.sums, positions), rows, FORGETTING)
    new = old + ops.cast(weight, g.dtype) * g
    written = positions if positions is None else sparse.after(positions, before)
    sparse.write(part.sums, new, written)
    sum_ = ops.sum(ops.absolute(new))
    if positions is not None:
        sum_ += FORGETTING * ops.cast(before, g.dtype) - ops.sum(ops.absolute(old))
    return ops.sum(g * (first - x)), sum_


def _rows_seen(part: Sampled) -> tuple[Any, Any, Any, Any]:
    """Return which rows of a step are looked at, and what they have.

    Returns:
        The rows, as `sparse.Rows`; where their s is among all that are kept; and their
        elements that are looked at, of gradient and weights.
    """
    clock, ids = part.rows
    sample, step, g = part.sample, part.sample.row_step, part.gradient
    if ids is None or step == 1:
        x = sparse.read(part.variable, ids)
        rows = _all_seen(clock, sample) if ids is None else part.rows
        return rows, ids, sample.of(g), sample.of(x)
    is_seen = tf.equal(ids % step, 0)
    if sparse.inside_xla():  # which wants to know how many they are
        outside = tf.cast(sample.shape[0], ids.dtype)
        positions = tf.where(is_seen, ids // step, outside)
        is_seen = tf.reshape(is_seen, [-1] + [1] * (len(g.shape) - 1))
        g = tf.where(is_seen, g, tf.zeros_like(g))
    else:
        g, ids = tf.boolean_mask(g, is_seen), tf.boolean_mask(ids, is_seen)
        positions = ids // step
    return sparse.Rows(clock, ids), positions, g, sparse.read(part.variable, ids)


def _all_seen(clock: Any, sample: Sample) -> Any:
    """Return all rows of a table that are looked at."""
    step = sample.row_step
    return sparse.Rows(clock, None if step == 1 else tf.range(0, clock.shape[0], step))


def _without_gradient(part: Sampled, fold: bool) -> Any:
    """Return the current sum of |s| of a variable; for a table, its clock knows it."""

    def whole() -> Any:
        sums = ops.absolute(ops.convert_to_tensor(part.sums))
        return ops.cast(total(sums, fold=fold), "float32")

    if part.rows is None:
        return whole()
    clock = part.rows.clock
    return ops.cond(clock.updates > 0, lambda: ops.convert_to_tensor(clock.sum), whole)


def catch_up(sums: Any, clock: Any, sample: Sample) -> None:
    """Bring the s of all rows of a table up to date, before its clock is reset.

    Args:
        sums: The variable that keeps s.
        clock: The table's clock.
        sample: Which elements of the table are looked at.
    """
    rows = _all_seen(clock, sample)
    sparse.write(sums, sparse.faded(sparse.read(sums, None), rows, FORGETTING), None)
