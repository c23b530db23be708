"""What a user should know about an estimated learning rate, and what to change."""

from typing import Any

from keras_rmsprop.estimate import Estimate
from keras_rmsprop.options import has_value

STUCK_STEPS, RUNAWAY_DISTANCE = 100, 10.0
"""The rate must have grown after so many steps; a larger distance is too large."""
SMALL_FACTOR, GROWN = 0.1, 30.0
"""With a smaller factor, now and on average, it is no wonder that the rate has not
grown to so many times its initial value."""
EARLY_STEPS, TINY_FACTOR = 10, 2e-3
"""After so few steps, a factor as small as that is a rate which is meant for steps."""
LIKE_A_RATE, LARGEST_DROP = 1e-2, 1 / 50
"""A number assigned is no factor if it is no larger, and such a part of the last."""
LARGE_INITIAL = 1e-3
"""Such an initial rate may exceed the right one, which is then not found."""
AGREE = -0.9
"""Below this q gradients point the way that the weights should have gone."""


def complaint(
    estimate: Estimate, initial: float, factor: float, *, stopped: bool = False
) -> str:
    """Return what a user should know about an estimate, with the remedy; or nothing.

    Args:
        estimate: The estimate, as numbers.
        initial: The rate of the first step.
        factor: The current factor on the estimate; NaN: unknown.
        stopped: Whether a callback has just stopped the training.
    """
    distance, _, steps, path, *_ = estimate
    rate = estimate.braked
    if not rate <= RUNAWAY_DISTANCE:  # NaN, too
        return (
            f"The estimated learning rate, {rate:.3g}, is larger than weights should "
            "move in a step. If the loss does not fall, use "
            "`AutoLearningRate(coefficient=0.5, growth=1.02)`, or clip gradients"
        )
    # A rate that has grown may have fallen that far again.
    longest = max(distance, estimate.longest)
    if not steps or longest > initial * GROWN:
        return ""
    mean = path / (steps * distance)
    small = SMALL_FACTOR if steps >= STUCK_STEPS else TINY_FACTOR
    if steps >= EARLY_STEPS and 0 < mean < small and not factor >= small:
        return _no_factor(mean)
    if stopped and steps < STUCK_STEPS:
        return (
            f"Training was stopped after {steps:.0f} steps, while the learning rate "
            f"still grew from its initial value of {initial:g}. Let `EarlyStopping` "
            "wait for a hundred steps, or give a rate, as in `RMSprop(0.001)`"
        )
    if steps < STUCK_STEPS or longest > initial * (1 + 1e-6):  # float32
        return ""
    other = 100 * initial
    if estimate.back < AGREE:
        why = "gradients agree, but weights round such steps away"
    elif initial >= LARGE_INITIAL:
        why, other = "it may be too large", 1e-5
    else:
        why = "the gradients do not agree"
    return (
        f"The learning rate is still at its initial value of {initial:g} "
        f"after {steps:.0f} steps: {why}. If the loss does not fall, use "
        f"`AutoLearningRate(initial={other:g})`"
    )


def complaint_of_factor(new: Any, old: Any) -> str:
    """Return what a user should know about a factor, when it is assigned; or nothing.

    Args:
        new: The factor.
        old: The one so far.
    """
    if not isinstance(new, float) or not has_value(old):
        return ""
    is_rate = 0 < new <= LIKE_A_RATE and new <= LARGEST_DROP * float(old)
    return _no_factor(new) if is_rate else ""


def _no_factor(factor: float) -> str:
    return (
        f"`learning_rate` is {factor:.3g}, but it is a factor on the estimated "
        "learning rate: steps are that much shorter, too short to estimate it. Set "
        "`optimizer.learning_rate = 1.0`, or remove the callback that sets it; one "
        "that lets the rate decay must start from 1, as "
        "`LearningRateScheduler(lambda epoch: 0.9**epoch)` does, and "
        "`ReduceLROnPlateau` must wait for a hundred steps"
    )
