"""The updates that are measured: of one competitor, on a set of variables.

A competitor is a function of a `Case`. It returns what takes a step, and how many bytes
of state it keeps.
"""

import math
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import harness
import numpy as np

Shape = tuple[int, ...]
Arrays = list[Any]
Step = Callable[[], Any]
"""Takes a step, and comes back when it is done."""


class Case(NamedTuple):
    """What is updated, and how."""

    values: Arrays
    """Of the variables."""
    gradients: Arrays
    options: dict[str, Any]
    """Of the optimizer."""
    wait: bool = True
    """Whether a step is to come back when it is done, not as soon as it can."""


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
MOMENTUM = {"momentum": {"momentum": 0.9}}
"""Of the updates whose slots differ."""
OF_KERAS = {"Keras": "RMSprop", "Adam": "Adam", "Adafactor": "Adafactor"}
SLOT_DTYPES = "bfloat16", "uint8"
LR, RHO, EPSILON, WARM_UP = 0.001, 0.9, 1e-7, 3


def numbers(set_name: str) -> int:
    """Return how many numbers there are in a set of variables."""
    return sum(map(math.prod, SETS[set_name]))


def with_keras(module: str, way: str, case: Case) -> tuple[Step, int]:
    """Prepare a Keras optimizer: this, as the module's name says, or one of Keras."""
    import keras
    import tensorflow as tf

    import keras_rmsprop

    options = case.options
    made: Any = keras_rmsprop.RMSprop
    if module in OF_KERAS:
        made = getattr(keras.optimizers, OF_KERAS[module])
    slot_dtype = module.split()[-1]
    if slot_dtype in SLOT_DTYPES:
        options = {**options, "slot_dtype": slot_dtype}
    variables = [keras.Variable(v) for v in case.values]
    given = [tf.constant(g) for g in case.gradients]
    optimizer = made("auto" if module == "auto" else LR, **options)
    optimizer.build(variables)

    def step(grads: Arrays) -> None:
        optimizer.apply(grads)

    compiled = tf.function(step, jit_compile=way == "XLA")
    taken = step if way == "eager" else compiled
    slots = (v.value for v in optimizer.variables if v.shape)
    state = sum(v.dtype.size * v.shape.num_elements() for v in slots)
    return lambda: taken(given), state


def with_keras_on_torch(module: str, case: Case) -> tuple[Step, int]:
    """Prepare this or the built-in on Keras' PyTorch backend, for eager steps."""
    import keras
    import torch

    import keras_rmsprop

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    made = keras.optimizers.RMSprop if module == "Keras" else keras_rmsprop.RMSprop
    variables = [keras.Variable(v) for v in case.values]
    given = [torch.as_tensor(g).clone() for g in case.gradients]
    optimizer = made(LR, **case.options)
    optimizer.build(variables)
    state = sum(v.value.nbytes for v in optimizer.variables if v.shape)
    return lambda: optimizer.apply(given, variables), state


def with_raw_op(case: Case) -> tuple[Step, int]:
    """Prepare TensorFlow's own fused update."""
    import tensorflow as tf

    options = case.options
    variables = [tf.Variable(v) for v in case.values]
    given = [tf.constant(g) for g in case.gradients]
    names = ("ms", "mom", "mg") if options else ("ms", "mom")
    slots = [{n: tf.Variable(np.zeros_like(v)) for n in names} for v in case.values]
    shared = {"lr": LR, "rho": RHO, "epsilon": EPSILON}
    shared["momentum"] = options.get("momentum", 0.0)
    ops = tf.raw_ops
    apply = ops.ResourceApplyCenteredRMSProp if options else ops.ResourceApplyRMSProp

    def step(grads: Arrays) -> None:
        if options:
            grads, _ = tf.clip_by_global_norm(grads, options["global_clipnorm"])
            for v in variables:
                v.assign_sub(v * (LR * options["weight_decay"]))
        for variable, grad, of_one in zip(variables, grads, slots, strict=True):
            handles = {name: slot.handle for name, slot in of_one.items()}
            apply(var=variable.handle, grad=grad, **handles, **shared)

    graph = tf.function(step, autograph=False)
    return lambda: graph(given), len(names) * sum(v.nbytes for v in case.values)


def with_torch(way: str, case: Case) -> tuple[Step, int]:
    """Prepare `torch.optim.RMSprop`: plain, foreach, capturable or compiled."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch._dynamo.reset()
    parameters = [torch.nn.Parameter(torch.as_tensor(v).clone()) for v in case.values]
    for parameter, gradient in zip(parameters, case.gradients, strict=True):
        parameter.grad = torch.as_tensor(gradient).clone()
    foreach = way != "plain"
    options = {**case.options, "capturable": way == "capturable"}
    clip = options.pop("global_clipnorm", None)
    optimizer = torch.optim.RMSprop(
        parameters, LR, RHO, EPSILON, foreach=foreach, **options
    )

    def step() -> None:
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip, foreach=foreach)
        optimizer.step()

    slots = 3 if case.options else 1
    taken = torch.compile(step) if way == "compiled" else step
    return taken, slots * sum(v.nbytes for v in case.values)


def with_optax(case: Case) -> tuple[Step, int]:
    """Prepare optax' RMSprop, jitted, with its arrays donated."""
    import jax
    import jax.numpy as jnp
    import optax

    options = {**case.options}
    clip, decay = (options.pop(n, 0) for n in ("global_clipnorm", "weight_decay"))
    optimizer = optax.rmsprop(LR, RHO, EPSILON, eps_in_sqrt=True, **options)
    if options:
        optimizer = optax.chain(
            optax.clip_by_global_norm(clip),
            optimizer,
            optax.add_decayed_weights(-LR * decay),
        )

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    given = [jnp.asarray(g) for g in case.gradients]
    params = [jnp.array(v) for v in case.values]
    kept = [params, optimizer.init(params)]
    state = sum(x.nbytes for x in jax.tree.leaves(kept[1]) if x.shape)

    def step() -> Any:
        kept[:] = update(*kept, given)
        return jax.block_until_ready(kept) if case.wait else kept

    return step, state


def limit(case: Case) -> tuple[Step, int]:
    """Prepare the update as one loop over all numbers, of all variables in a row."""
    import numba

    lr, rho, rest, eps = map(np.float32, (LR, RHO, 1 - RHO, EPSILON))
    one, names = np.float32(1), ("momentum", "global_clipnorm", "weight_decay")
    mu, clip, decay = (np.float32(case.options.get(name, 0)) for name in names)

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
            w[i] = (one - lr * decay) * w[i] - m[i]

    w, g = (np.concatenate([x.ravel() for x in xs]) for xs in case[:2])
    slots = [np.zeros_like(w) for _ in range(3 if case.options else 1)]
    fused = numba.njit(parallel=True, fastmath=True)
    loop = fused(everything if case.options else plain)
    return lambda: loop(w, g, *slots), len(slots) * w.nbytes


COMPETITORS: dict[str, Callable[[Case], tuple[Step, int]]] = {
    **{
        f"{module}, {way}": partial(with_keras, module, way)
        for way in ("eager", "tf.function", "XLA")
        for module in ("this", harness.PORTABLE, "auto", "Keras")
        if (module, way) != (harness.PORTABLE, "XLA")  # which has no kernel
    },
    "ResourceApplyRMSProp": with_raw_op,
    **{
        f"{module}{harness.ON_TORCH}": partial(with_keras_on_torch, module)
        for module in ("this", "Keras")
    },
    "torch, plain": partial(with_torch, "plain"),
    "torch, foreach": partial(with_torch, "foreach"),
    "torch, compiled": partial(with_torch, "compiled"),
    "optax, jit": with_optax,
    "limit": limit,
}


KEEPERS: dict[str, Callable[[Case], tuple[Step, int]]] = {
    f"{module}, eager": partial(with_keras, module, "eager")
    for module in (
        *("this", *SLOT_DTYPES, harness.PORTABLE, f"{harness.PORTABLE} uint8"),
        *("Adam", "Adafactor"),
    )
}
"""Those whose state differs in bytes."""


def setup(who: str, what: str, how: str) -> harness.Ready:
    """Make a set of variables with fixed gradients, and warm up.

    Args:
        who: One of `COMPETITORS` or `KEEPERS`.
        what: One of `SETS`.
        how: One of `OPTIONS` or `MOMENTUM`.
    """
    rng = np.random.default_rng(0)
    values, gradients = (
        [rng.standard_normal(shape, "float32") for shape in SETS[what]] for _ in "wg"
    )
    options = (OPTIONS | MOMENTUM)[how]
    step, state = (COMPETITORS | KEEPERS)[who](Case(values, gradients, options))
    [first] = harness.milliseconds(step, seconds=0, least=1)
    harness.milliseconds(step, seconds=0, least=WARM_UP)

    def time(seconds: float) -> float:
        return statistics.median(harness.milliseconds(step, seconds, WARM_UP))

    def peak(seconds: float) -> float | None:
        memory = harness.Memory()
        memory.forget_peak()
        step()
        return memory.peak()

    return harness.Ready(
        {"first": first / 1e3, "state": state / numbers(what)},
        {"time": time, "peak": peak},
    )


if __name__ == "__main__":
    harness.serve(setup)
