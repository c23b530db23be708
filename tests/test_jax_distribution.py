"""On JAX, `keras.distribution`: eight devices give what one gives, in less memory.

Each test is a process of its own: how many devices there are is settled on import.
"""

import re
from pathlib import Path

import pytest
from stepping import python

PAGE = Path(__file__).parent.parent / "docs/backends.md"
EIGHT = {
    "KERAS_BACKEND": "jax",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
}

MODEL = '''
import contextlib, jax, keras, numpy as np, random
from keras.distribution import DataParallel, DeviceMesh, LayoutMap, ModelParallel
from keras_rmsprop import RMSprop

X = np.random.default_rng(0).normal(size=(64, 64)).astype("float32")
OWN = ("velocity", "momentum", "average_gradient", "average", "gradient_accumulator")
ON_A_SAMPLE = ("first_weight", "gradient_sum")


def model_parallel(data, model):
    layouts = LayoutMap(DeviceMesh((data, model), ["data", "model"]))
    # Which elements "auto" looks at depends on the shape. The last pattern matches the
    # paths of slots, too: layouts of their own they must not get.
    layouts[".*wide.*kernel"] = None, "model"
    layouts[".*wide.*bias"] = ("model",)
    layouts[".*tall.*kernel.*"] = "model", None
    return ModelParallel(layout_map=layouts, batch_dim_name="data")


DISTRIBUTIONS = {
    "one device": contextlib.nullcontext,
    "data": lambda: DataParallel().scope(),
    "model": lambda: model_parallel(1, 8).scope(),
    "both": lambda: model_parallel(2, 4).scope(),
}


def new_model(options):
    random.seed(0)  # where random rounding starts
    layers = [
        keras.layers.Dense(
            units,
            "tanh",
            name=name,
            # `keras.utils.set_random_seed` would import TensorFlow.
            kernel_initializer=keras.initializers.GlorotUniform(seed=units),
        )
        for name, units in {"wide": 128, "tall": 64, "head": 2}.items()
    ]
    model = keras.Sequential([keras.Input((64,)), *layers])
    model.compile(RMSprop(**options), "mse")
    return model


def trained(options, epochs=2):
    model = new_model(options)
    fit = {"batch_size": 16, "shuffle": False, "verbose": 0}
    model.fit(X, X[:, :2], epochs=epochs, **fit)
    return model


def bytes_a_device(variables):
    """Return how many bytes each device holds of variables."""
    held = dict.fromkeys(jax.devices(), 0)
    for variable in variables:
        for shard in variable.value.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return [n for n in held.values() if n]


def slots(optimizer):
    """Return the optimizer's variables by kind, each with the variable it is of."""
    found = {}
    for variable in optimizer._trainable_variables:
        start = variable.path.replace("/", "_") + "_"
        for own in optimizer.variables:
            _, _, kind = own.path.rpartition("/")[2].partition(start)
            if kind:
                found.setdefault(kind, []).append((own, variable))
    return found
'''


@pytest.mark.rest
@pytest.mark.slow
def test_slots_are_laid_out_as_their_variables():
    out = python(
        MODEL
        + """
OPTIONS = [
    {"momentum": 0.5, "centered": True, "use_ema": True,
     "gradient_accumulation_steps": 2},
    {"learning_rate": "auto", "slot_dtype": "bfloat16", "skip_nonfinite": True},
]

def check(model, parts):
    optimizer = model.optimizer
    seen = slots(optimizer)
    for kind, pairs in seen.items():
        for own, variable in pairs:
            layout, its = own.value.sharding, variable.value.sharding
            where = f"{name}, {own.path}: {layout} and not {its}"
            if kind in OWN or own.shape == variable.shape:
                assert layout.is_equivalent_to(its, own.ndim), where
            else:
                assert layout.spec == its.spec, where
            # All devices hold the same share of it.
            held = bytes_a_device([own])
            share = bytes_a_device([variable])[0] / variable.value.nbytes
            assert held == [own.value.nbytes * share] * len(held), where
    whole = sum(own.value.nbytes for pairs in seen.values() for own, _ in pairs)
    held = bytes_a_device([own for pairs in seen.values() for own, _ in pairs])
    # The head, on all devices, is 2 % of the model.
    assert max(held) == min(held) <= whole * (1 / parts + 0.03), (name, held, whole)
    assert sum(held) >= whole
    return {*seen}

kinds = set()
for name, parts in {"data": 1, "model": 8, "both": 4}.items():
    with DISTRIBUTIONS[name]():
        for options in OPTIONS:
            model = new_model(options)
            model.optimizer.build(model.trainable_variables)
            kinds |= check(model, parts)
            model = trained(options, epochs=1)
            kinds |= check(model, parts)
            assert model.optimizer.iterations == 4 // options.get(
                "gradient_accumulation_steps", 1
            )
assert kinds == {*OWN, *ON_A_SAMPLE}, kinds
print("as their variables")
""",
        **EIGHT,
    )
    assert out == "as their variables"


@pytest.mark.rest
def test_eight_devices_train_as_one_does():
    out = python(
        MODEL
        + """
OPTIONS = [
    {"momentum": 0.5, "centered": True, "epsilon": 1e-3, "use_ema": True,
     "ema_overwrite_frequency": 3, "weight_decay": 0.01},
    {"gradient_accumulation_steps": 2, "clipnorm": 0.1, "bias_correction": True},
    {"momentum": 0.5, "cautious": True, "global_clipnorm": 0.1, "nesterov": True},
    {"learning_rate": "auto", "use_ema": True, "skip_nonfinite": True},
    {"slot_dtype": "bfloat16", "momentum": 0.5},
]
for options in OPTIONS:
    found = {}
    for name, scope in DISTRIBUTIONS.items():
        with scope():
            found[name] = trained({"learning_rate": 0.001} | options).get_weights()
    want = found.pop("one device")
    for name, got in found.items():
        for x, y in zip(got, want, strict=True):
            # In bfloat16 what differs in the last bit is rounded to the other side.
            tolerance = 1e-4 if "slot_dtype" in options else 1e-6
            np.testing.assert_allclose(
                x, y, rtol=1e-6, atol=tolerance, err_msg=f"{name}, {options}"
            )
print("the same")
""",
        **EIGHT,
    )
    assert out == "the same"


@pytest.mark.rest
def test_saved_and_loaded_it_is_laid_out_again_and_goes_on(tmp_path):
    out = python(
        MODEL
        + """
options = {"learning_rate": 0.001, "momentum": 0.5, "use_ema": True}
fit = {"batch_size": 16, "shuffle": False, "verbose": 0}
with DISTRIBUTIONS["model"]():
    model = trained(options)
    model.save("m.keras")
    model.fit(X, X[:, :2], **fit)
for name, scope in DISTRIBUTIONS.items():
    with scope():
        again = keras.models.load_model("m.keras")
        # Before a first step, too.
        for own, variable in sum(slots(again.optimizer).values(), []):
            layout = own.value.sharding
            assert layout.is_equivalent_to(variable.value.sharding, own.ndim), name
        again.fit(X, X[:, :2], **fit)
        for x, y in zip(again.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * np.abs(y).max())
print("goes on")
""",
        cwd=tmp_path,
        PYTHONPATH=str(PAGE.parent.parent),
        **EIGHT,
    )
    assert out == "goes on"


COUNTED = '''
import math, re

SIZES = {"pred": 1, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
MOVES = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"


def moved(compiled):
    """Return the bytes of what devices exchange in a program, by kind of operation."""
    found = {}
    operation = rf"= (.*?) ({MOVES})(?:-start)?\\("
    for shapes, kind in re.findall(operation, compiled.as_text()):
        for dtype, shape in re.findall(r"(\\w+)\\[([\\d,]*)\\]", shapes):
            size = math.prod(int(n) for n in shape.split(",") if n)
            found[kind] = found.get(kind, 0) + SIZES[dtype] * size
    return found
'''


@pytest.mark.slow
def test_the_page_has_the_bytes_that_are_counted():
    out = python(
        MODEL
        + COUNTED
        + """
UNITS, BATCH = 1024, 32

def spread(devices, kind):
    mesh = (devices, 1) if kind == "data" else (1, devices)
    some = keras.distribution.list_devices()[:devices]
    layouts = LayoutMap(DeviceMesh(mesh, ["data", "model"], some))
    if kind == "model":
        layouts[".*kernel"], layouts[".*bias"] = (None, "model"), ("model",)
    return ModelParallel(layout_map=layouts, batch_dim_name="data")

def counted(devices, kind):
    with spread(devices, kind).scope() as scope:
        layers = [keras.layers.Dense(UNITS, "relu") for _ in range(3)]
        model = keras.Sequential([keras.Input((UNITS,)), *layers])
        optimizer = RMSprop(0.001, momentum=0.9)
        optimizer.build(model.trainable_variables)

        def loss(weights, x):
            return keras.ops.mean(model.stateless_call(weights, [], x)[0] ** 2)

        def step(weights, state, x):
            gradients = jax.grad(loss)(weights, x)
            return optimizer.stateless_apply(state, gradients, weights)

        given = [[v.value for v in vs] for vs in (model.weights, optimizer.variables)]
        layouts = tuple([x.sharding for x in xs] for xs in given)
        layout = keras.distribution.distribution().get_data_layout((BATCH, UNITS))
        x = jax.device_put(np.ones((BATCH, UNITS), "float32"), layout.backend_layout)
        step = jax.jit(step, donate_argnums=(0, 1), out_shardings=layouts)
        found = moved(step.lower(*given, x).compile())
        return bytes_a_device([*model.weights, *optimizer.variables])[0], found

def shown(n):
    return f"{n / 1e6:.3g} MB"

print("| Devices | `DataParallel`: state per device | exchanged per step "
      "| `ModelParallel`: state per device | exchanged per step |")
print("| --: | --: | --: | --: | --: |")
for devices in 1, 2, 4, 8:
    cells = []
    for kind in "data", "model":
        state, found = counted(devices, kind)
        cells += [shown(state), shown(sum(found.values()))]
    print("|", devices, "|", " | ".join(cells), "|")
""",
        **EIGHT,
    )
    shown = re.search(
        r"<!-- counted by test_jax_distribution.py -->\n(.*?)\n<!-- end -->",
        PAGE.read_text(),
        re.DOTALL,
    )
    assert shown[1].strip() == out


@pytest.mark.rest
@pytest.mark.slow
def test_an_update_moves_scalars_at_most():
    """Where weights and slots are spread over devices, each updates its own part."""
    out = python(
        MODEL
        + COUNTED
        + """
rate = {"learning_rate": 0.001}
for options, most in (
    ({"momentum": 0.5, "centered": True, "use_ema": True, "weight_decay": 0.1}, 0),
    ({"gradient_accumulation_steps": 2, "momentum": 0.5}, 0),
    ({"clipvalue": 1.0}, 0),
    ({"slot_dtype": "bfloat16"}, 0),
    ({"global_clipnorm": 1.0}, 64),
    ({"momentum": 0.5, "cautious": True}, 64),
    ({"skip_nonfinite": True}, 64),
    ({"learning_rate": "auto"}, 64),
):
    for name in ("model", "both"):
        with DISTRIBUTIONS[name]():
            model = new_model(rate | options)
            optimizer = model.optimizer
            optimizer.build(model.trainable_variables)
            state = [v.value for v in optimizer.variables]
            weights = [v.value for v in model.trainable_variables]
            layouts = tuple([x.sharding for x in xs] for xs in (weights, state))
            step = jax.jit(optimizer.stateless_apply, out_shardings=layouts)
            found = moved(step.lower(state, weights, weights).compile())
            assert sum(found.values()) <= most, (name, options, found)
            assert (most > 0) == (len(found) > 0), (name, options, found)
print("at most scalars")
""",
        **EIGHT,
    )
    assert out == "at most scalars"
