"""Gradient clipping: by the value, by the norm of each, or by the norm of all."""

from collections.abc import Sequence
from typing import Any

from keras_rmsprop import hooks
from keras_rmsprop.backends import current as backend
from keras_rmsprop.update import Part


def clipped(
    parts: Sequence[Part], optimizer: Any, own: frozenset[str], *, kernel: bool
) -> tuple[list[Part], Any]:
    """Return parts with clipped gradients, and what is left to multiply them by.

    As Keras does, by the first of `clipnorm`, `global_clipnorm` and `clipvalue` that is
    given, or as a subclass does.

    Args:
        parts: The parts of a step.
        optimizer: The optimizer.
        own: The hooks that it overrides.
        kernel: Whether a native kernel may sum up.

    Returns:
        The parts; and the scale of their gradients, or None: 1. If nobody sees them
        before the update, it multiplies them in its own pass.
    """
    grads = [part.gradient for part in parts]
    norm, global_norm = optimizer.clipnorm, optimizer.global_clipnorm
    if hooks.CLIP not in own:
        if norm or global_norm:
            grads_clipped = backend.clipped_by_norm(grads, norm, global_norm)
            if grads_clipped is not None:
                return _with(parts, grads_clipped), None
        if global_norm and not norm and not own:
            scale = backend.scale_of_global_norm(grads, global_norm, kernel=kernel)
            if scale is not None:
                return [*parts], scale
    return _with(parts, optimizer._clip_gradients(grads)), None


def _with(parts: Sequence[Part], grads: Sequence[Any]) -> list[Part]:
    return [
        part._replace(gradient=gradient)
        for part, gradient in zip(parts, grads, strict=True)
    ]
