"""What `bench.py` runs in a process of its own: the update of one competitor.

    python benchmarks/bench_update.py COMPETITOR

It answers the requests of `harness.Worker`: `prepare` a set of variables with fixed
gradients, `time` steps on it, measure the `peak` of memory in a step.
"""

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import harness
import numpy as np
from embedding_step import Memory

Shape = tuple[int, ...]
WARM_UP = 3


def resnet() -> list[Shape]:
    """Return the shapes of ResNet-50's variables as Keras has them."""
    shapes: list[Shape] = [(7, 7, 3, 64), (64,), (64,)]
    before = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            kernels = [(1, before, width), (3, width, width), (1, width, 4 * width)]
            if block == 0:
                kernels.append((1, before, 4 * width))
            for k, c, f in kernels:
                shapes += [(k, k, c, f), (f,), (f,)]
            before = 4 * width
    return [*shapes, (2048, 1000), (1000,)]


DEPTHWISE: list[Shape] = [(3, 3, 2**n, 1) for n in range(5, 11)]
SETS: dict[str, list[Shape]] = {
    "MNIST network": [(784, 128), (128,), (128, 128), (128,), (128, 10), (10,)],
    "160 small": [(256, 256), (256,)] * 80,
    "ResNet-50": resnet(),
    "depthwise": DEPTHWISE * 10,
    "300 tiny": [(64,)] * 300,
    "4 x 4096 x 4096": [(4096, 4096)] * 4,
    "1 M": [(1024, 1024)],
    "16 M": [(4096, 4096)],
    "axes as they come": [(256, 256, 3, 3)] * 4,
    "axes flattened": [(256 * 256 * 3 * 3,)] * 4,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "momentum": 0.9,
        "centered": True,
        "global_clipnorm": 1.0,
        "weight_decay": 0.004,
    },
}
LR, RHO, EPSILON = 0.001, 0.9, 1e-7


class Ready(NamedTuple):
    """A set of variables, prepared."""

    step: Callable[[], Any]
    """Takes a step, and comes back when it is done."""
    state: int
    """Bytes of state that the optimizer keeps, but for single numbers."""


def keras_way(module: str, way: str) -> Callable[..., Ready]:
    """Return how to prepare a Keras optimizer.

    Args:
        module: Where its `RMSprop` is.
        way: How its step is called: `"eager"`, `"tf.function"` or `"XLA"`.
    """
    import keras
    import tensorflow as tf

    import keras_rmsprop

    made = {"this": keras_rmsprop.RMSprop, "Keras": keras.optimizers.RMSprop}[module]

    def prepare(
        values: list[Any], gradients: list[Any], options: dict[str, Any]
    ) -> Ready:
        variables = [keras.Variable(v) for v in values]
        given = [tf.constant(g) for g in gradients]
        optimizer = made(LR, **options)
        optimizer.build(variables)
        step = optimizer.apply
        if way != "eager":
            step = tf.function(
                lambda grads: optimizer.apply(grads),
                autograph=False,
                jit_compile=way == "XLA",
            )
        state = sum(
            v.value.dtype.size * v.value.shape.num_elements()
            for v in optimizer.variables
            if v.shape
        )
        return Ready(lambda: step(given), state)

    return prepare


def raw_op(values: list[Any], gradients: list[Any], options: dict[str, Any]) -> Ready:
    """Prepare TensorFlow's own fused update."""
    import tensorflow as tf

    variables = [tf.Variable(v) for v in values]
    given = [tf.constant(g) for g in gradients]
    slots = [
        [tf.Variable(np.zeros_like(v)) for v in values]
        for _ in range(3 if options else 2)
    ]
    shared = {
        "lr": LR,
        "rho": RHO,
        "epsilon": EPSILON,
        "momentum": options.get("momentum", 0.0),
    }

    def step(grads: list[Any]) -> None:
        if options:
            grads, _ = tf.clip_by_global_norm(grads, options["global_clipnorm"])
            for v in variables:
                v.assign_sub(v * (LR * options["weight_decay"]))
        for variable, grad, *of_one in zip(variables, grads, *slots, strict=True):
            names = ("ms", "mom", "mg")[: len(of_one)]
            handles = {n: s.handle for n, s in zip(names, of_one, strict=True)}
            apply = (
                tf.raw_ops.ResourceApplyCenteredRMSProp
                if options
                else tf.raw_ops.ResourceApplyRMSProp
            )
            apply(var=variable.handle, grad=grad, **handles, **shared)

    graph = tf.function(step, autograph=False)
    return Ready(lambda: graph(given), 4 * len(slots) * sum(v.size for v in values))


def torch_way(way: str) -> Callable[..., Ready]:
    """Return how to prepare `torch.optim.RMSprop`.

    Args:
        way: `"plain"`, `"foreach"` or `"compiled"`.
    """
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    def prepare(
        values: list[Any], gradients: list[Any], options: dict[str, Any]
    ) -> Ready:
        torch._dynamo.reset()
        parameters = [torch.nn.Parameter(torch.tensor(v)) for v in values]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.tensor(gradient)
        optimizer = torch.optim.RMSprop(
            parameters,
            lr=LR,
            alpha=RHO,
            eps=EPSILON,
            momentum=options.get("momentum", 0.0),
            centered=options.get("centered", False),
            weight_decay=options.get("weight_decay", 0.0),
            foreach=way != "plain",
        )

        def step() -> None:
            if options:
                torch.nn.utils.clip_grad_norm_(
                    parameters, options["global_clipnorm"], foreach=way != "plain"
                )
            optimizer.step()

        taken = torch.compile(step) if way == "compiled" else step
        return Ready(taken, 4 * (3 if options else 1) * sum(v.size for v in values))

    return prepare


def optax_way(
    values: list[Any], gradients: list[Any], options: dict[str, Any]
) -> Ready:
    """Prepare optax' RMSprop, jitted, with its arrays donated."""
    import functools

    import jax
    import jax.numpy as jnp
    import optax

    optimizer = optax.rmsprop(
        LR,
        RHO,
        EPSILON,
        eps_in_sqrt=True,
        momentum=options.get("momentum"),
        centered=options.get("centered", False),
    )
    if options:
        optimizer = optax.chain(
            optax.clip_by_global_norm(options["global_clipnorm"]),
            optimizer,
            optax.add_decayed_weights(-LR * options["weight_decay"]),
        )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    given = [jnp.asarray(g) for g in gradients]
    params = [jnp.array(v) for v in values]
    kept = [params, optimizer.init(params)]
    state = sum(x.nbytes for x in jax.tree.leaves(kept[1]) if x.shape)

    def step() -> None:
        kept[:] = jax.block_until_ready(update(*kept, given))

    return Ready(step, state)


def limit(values: list[Any], gradients: list[Any], options: dict[str, Any]) -> Ready:
    """Prepare the update as one loop over all numbers, of all variables in a row."""
    import numba

    fused = numba.njit(parallel=True, fastmath=True)

    lr, rho, rest, eps = map(np.float32, (LR, RHO, 1 - RHO, EPSILON))
    one = np.float32(1)

    def plain(w: Any, g: Any, v: Any) -> None:
        for i in numba.prange(w.size):
            v[i] = rho * v[i] + rest * g[i] * g[i]
            w[i] -= lr * g[i] / np.sqrt(v[i] + eps)

    def everything(w: Any, g: Any, v: Any, m: Any, a: Any) -> None:
        total = np.float32(0)
        for i in numba.prange(w.size):
            total += g[i] * g[i]
        scale = clip / max(np.sqrt(total), clip)
        for i in numba.prange(w.size):
            x = scale * g[i]
            v[i] = rho * v[i] + rest * x * x
            a[i] = rho * a[i] + rest * x
            spread = max(v[i] - a[i] * a[i], np.float32(0))
            m[i] = mu * m[i] + lr * x / np.sqrt(spread + eps)
            w[i] = (one - decay) * w[i] - m[i]

    w, g = (np.concatenate([x.ravel() for x in xs]) for xs in (values, gradients))
    if not options:
        v = np.zeros_like(w)
        loop = fused(plain)
        return Ready(lambda: loop(w, g, v), v.nbytes)
    mu, clip = np.float32(options["momentum"]), np.float32(options["global_clipnorm"])
    decay = lr * np.float32(options["weight_decay"])
    slots = [np.zeros_like(w) for _ in range(3)]
    loop = fused(everything)
    return Ready(lambda: loop(w, g, *slots), 3 * w.nbytes)


COMPETITORS: dict[str, Callable[[], Callable[..., Ready]]] = {
    **{
        f"{module}, {way}": partial(keras_way, module, way)
        for way in ("eager", "tf.function", "XLA")
        for module in ("this", "Keras")
    },
    "ResourceApplyRMSProp": lambda: raw_op,
    **{
        f"torch, {way}": partial(torch_way, way)
        for way in ("plain", "foreach", "compiled")
    },
    "optax, jit": lambda: optax_way,
    "limit": lambda: limit,
}


class Measuring:
    """What is asked of one competitor."""

    def __init__(self, competitor: str) -> None:
        self._prepare = COMPETITORS[competitor]()
        self._ready: Ready | None = None

    def __call__(self, do: str, **what: Any) -> Any:
        """Answer a request; see `prepare`, `time` and `peak`."""
        return getattr(self, do)(**what)

    def prepare(self, set_name: str, options: str) -> dict[str, float]:
        """Make a set of variables in place of the last, and warm up.

        Returns:
            The seconds of the first step; the bytes of state a parameter.
        """
        self._ready = None
        gc.collect()
        rng = np.random.default_rng(0)
        values, gradients = (
            [rng.standard_normal(s, "float32") for s in SETS[set_name]] for _ in "wg"
        )
        ready = self._prepare(values, gradients, OPTIONS[options])
        start = time.perf_counter()
        ready.step()
        first = time.perf_counter() - start
        for _ in range(WARM_UP):
            ready.step()
        self._ready = ready
        return {"first": first, "state": ready.state / sum(v.size for v in values)}

    def time(self, seconds: float) -> float:
        """Return the median milliseconds of the steps in about so many seconds."""
        assert self._ready
        times: list[float] = []
        while len(times) < 3 or sum(times) < 1e3 * seconds:
            start = time.perf_counter()
            self._ready.step()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    def peak(self) -> float | None:
        """Return by how many bytes memory grows during a step."""
        assert self._ready
        memory = Memory()
        memory.forget_peak()
        self._ready.step()
        return memory.peak


if __name__ == "__main__":
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    harness.serve(Measuring(sys.argv[1]))
