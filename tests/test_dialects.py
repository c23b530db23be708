"""Each dialect beside the real thing: 200 steps on random gradients.

`make test-peers` runs these; a peer that is missing is a test skipped.
"""

import importlib
import importlib.util
import inspect
import re
import sys
import types
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import BACKEND, arrays, assert_close, tensor

from keras_rmsprop import RMSprop, dialects, reference

SHAPES = [(4, 3), (5,), ()]
STEPS = 200
RTOL = {"float32": 1e-5, "float64": 1e-12}
LR = 2**-7  # like the other numbers below the same in float32 and float64


def peer(name):
    """Return a package of the `peers` extra, or skip the test."""
    return pytest.importorskip(name, reason=f"{name} comes with `make test-peers`")


def gradients(dtype):
    return [arrays(SHAPES, dtype, seed) for seed in range(1, STEPS + 1)]


def train(optimizer, dtype):
    """Return weights and v after the steps with this package."""
    variables = [keras.Variable(a, dtype=dtype) for a in arrays(SHAPES, dtype)]
    optimizer.build(variables)
    for step in gradients(dtype):
        optimizer.apply([tensor(g) for g in step])
    slots = optimizer.get_state().slots
    return [v.numpy() for v in variables] + [s.velocity for s in slots]


def train_torch(make, dtype):
    torch = peer("torch")
    parameters = [torch.nn.Parameter(torch.tensor(a)) for a in arrays(SHAPES, dtype)]
    optimizer = make(parameters)
    for step in gradients(dtype):
        for parameter, g in zip(parameters, step, strict=True):
            parameter.grad = torch.tensor(g)
        optimizer.step()
    v = [optimizer.state[p]["square_avg"] for p in parameters]
    return [x.detach().numpy() for x in parameters + v]


def train_tensorflow(optimizer, dtype):
    variables = [tf.Variable(a, dtype=dtype) for a in arrays(SHAPES, dtype)]

    @tf.function(reduce_retracing=True)
    def apply(*step):
        optimizer.apply_gradients(zip(step, variables, strict=True))

    for step in gradients(dtype):
        apply(*map(tf.constant, step))
    v = [optimizer.get_slot(x, "rms") for x in variables]
    return [x.numpy() for x in variables + v]


def train_optax(make, dtype):
    optax, jax = peer("optax"), peer("jax")
    with jax.enable_x64(dtype == "float64"):
        optimizer = make()
        weights = [jax.numpy.asarray(a) for a in arrays(SHAPES, dtype)]
        state = optimizer.init(weights)

        @jax.jit
        def step(weights, state, gradients):
            updates, state = optimizer.update(gradients, state, weights)
            return optax.apply_updates(weights, updates), state

        for g in gradients(dtype):
            weights, state = step(weights, state, g)
        return [np.asarray(x) for x in [*weights, *state[0].nu]]


def train_formula(step, dtype):
    weights, states = arrays(SHAPES, "float64"), [{} for _ in SHAPES]
    for gs in gradients(dtype):
        weights = [
            step(w, g.astype("float64"), s)
            for w, g, s in zip(weights, gs, states, strict=True)
        ]
    return weights + [s["v"] for s in states]


def check(optimizer, expected, dtype):
    assert_close(train(optimizer, dtype), expected, RTOL[dtype])


both_dtypes = pytest.mark.parametrize("dtype", RTOL)

EPSILON = 2**-10
TORCH = {
    "defaults": {},
    "alpha, eps": {"alpha": 0.875, "eps": EPSILON},
    "momentum": {"momentum": 0.75},
    "centered": {"centered": True},
    "weight_decay": {"weight_decay": 0.125},
    "all": {
        "alpha": 0.875,
        "eps": EPSILON,
        "momentum": 0.75,
        "centered": True,
        "weight_decay": 0.125,
    },
}


@pytest.mark.peers
@both_dtypes
@pytest.mark.parametrize(
    "options",
    [*TORCH.values(), {"maximize": True, "weight_decay": 0.125}],
    ids=[*TORCH, "maximize"],
)
def test_torch(options, dtype):
    def make(parameters):
        return peer("torch").optim.RMSprop(parameters, lr=LR, **options)

    check(dialects.torch(LR, **options), train_torch(make, dtype), dtype)


def timm_rmsprop():
    """Return timm's class without the rest of timm.

    That imports torchvision, which fails beside a PyTorch of another build.
    """
    peer("torch")
    spec = importlib.util.find_spec("timm")
    if spec is None:
        pytest.skip("timm comes with `make test-peers`")
    package = types.ModuleType("timm_optim")
    package.__path__ = [str(Path(spec.origin).parent / "optim")]
    sys.modules[package.__name__] = package
    return importlib.import_module("timm_optim.rmsprop_tf").RMSpropTF


TIMM = TORCH | {
    "decoupled_decay": {"weight_decay": 0.125, "decoupled_decay": True},
    "lr_in_momentum": {"momentum": 0.75, "lr_in_momentum": False},
    "caution": {"momentum": 0.75, "caution": True},
    "caution, lr_in_momentum": {
        "momentum": 0.75,
        "caution": True,
        "lr_in_momentum": False,
        "weight_decay": 0.125,
    },
}


@pytest.mark.peers
@both_dtypes
@pytest.mark.parametrize("options", TIMM.values(), ids=TIMM)
def test_timm(options, dtype):
    def make(parameters):
        return timm_rmsprop()(parameters, lr=LR, **options)

    check(dialects.timm(LR, **options), train_torch(make, dtype), dtype)


OPTAX = {
    "defaults": {},
    "decay, eps": {"decay": 0.875, "eps": EPSILON},
    "initial_scale": {"initial_scale": 1.0},
    "eps_in_sqrt": {"eps_in_sqrt": False, "eps": EPSILON},
    "centered": {"centered": True, "eps": EPSILON},
    "momentum": {"momentum": 0.75},
    "nesterov": {"momentum": 0.75, "nesterov": True},
    "bias_correction": {"bias_correction": True},
    # In the first step the variance is 0 but for rounding, which a small eps shows.
    "bias_correction, centered": {
        "bias_correction": True,
        "centered": True,
        "eps": 0.25,
    },
    "all": {
        "decay": 0.875,
        "eps": EPSILON,
        "initial_scale": 0.5,
        "eps_in_sqrt": False,
        "centered": True,
        "momentum": 0.75,
        "nesterov": True,
        "bias_correction": True,
    },
}


@pytest.mark.peers
@both_dtypes
@pytest.mark.parametrize("options", OPTAX.values(), ids=OPTAX)
def test_optax(options, dtype):
    def make():
        return peer("optax").rmsprop(LR, **options)

    check(dialects.optax(LR, **options), train_optax(make, dtype), dtype)


TENSORFLOW = {
    "rho 0.875": {"decay": 0.875},
    "momentum": {"decay": 0.875, "momentum": 0.75},
    "centered": {"decay": 0.875, "centered": True},
    "all": {
        "decay": 0.875,
        "momentum": 0.75,
        "epsilon": EPSILON,
        "centered": True,
    },
}


@pytest.mark.peers
@both_dtypes
@pytest.mark.parametrize("options", TENSORFLOW.values(), ids=TENSORFLOW)
def test_tensorflow_v1(options, dtype):
    theirs = tf.compat.v1.train.RMSPropOptimizer(LR, **options)
    expected = train_tensorflow(theirs, dtype)
    check(dialects.tensorflow_v1(LR, **options), expected, dtype)


def check_tf_keras_legacy(dtype, **options):
    if BACKEND != "tensorflow" and dtype == "float64" and "clipnorm" in options:
        pytest.skip("only on TensorFlow Keras clips norms in float64")
    theirs = peer("tf_keras").optimizers.legacy.RMSprop(LR, **options)
    expected = train_tensorflow(theirs, dtype)
    check(dialects.tf_keras_legacy(LR, **options), expected, dtype)


@pytest.mark.peers
@both_dtypes
@pytest.mark.parametrize(
    "options",
    [*TENSORFLOW.values(), {"decay": 0.875, "clipnorm": 0.5}],
    ids=[*TENSORFLOW, "clipnorm"],
)
def test_tf_keras_legacy(options, dtype):
    options = dict(options)
    check_tf_keras_legacy(dtype, rho=options.pop("decay"), **options)


@pytest.mark.peers
def test_tf_keras_legacy_decay_of_the_learning_rate():
    check_tf_keras_legacy("float32", decay=0.25)  # Keras' schedules are float32


@pytest.mark.peers
@both_dtypes
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rho": 0.875, "momentum": 0.75, "epsilon": EPSILON, "centered": True},
        {"weight_decay": 0.125, "clipnorm": 0.5, "use_ema": True},
    ],
    ids=["defaults", "all slots", "the base class"],
)
def test_keras(options, dtype):
    builtin = keras.optimizers.RMSprop(LR, **options)
    variables = [keras.Variable(a, dtype=dtype) for a in arrays(SHAPES, dtype)]
    builtin.build(variables)
    apply = tf.function(builtin.apply) if BACKEND == "tensorflow" else builtin.apply
    for step in gradients(dtype):
        apply([tensor(g) for g in step])
    n = len(SHAPES)
    v = [x for x in builtin.variables if x.name.endswith("velocity")][:n]
    expected = [x.numpy() for x in variables + v]
    check(dialects.keras(LR, **options), expected, dtype)


@pytest.mark.peers
@both_dtypes
@pytest.mark.parametrize("options", [{}, {"rho": 0.875, "epsilon": EPSILON}])
def test_textbook(options, dtype):
    names = {"rho": "beta", "epsilon": "epsilon"}
    given = {"beta": 0.9, "epsilon": 1e-8} | {names[k]: x for k, x in options.items()}

    def step(w, g, state):
        return reference.step(w, g, state, alpha=LR, **given)

    check(dialects.textbook(LR, **options), train_formula(step, dtype), dtype)


@pytest.mark.peers
@both_dtypes
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.75, "weight_decay": 0.125},
        {"alpha": 0.875, "eps": EPSILON, "momentum": 0.75, "centered": True},
    ],
    ids=["defaults", "momentum, weight_decay", "centered"],
)
def test_stable_baselines3(options, dtype):
    o = {"alpha": 0.99, "eps": 1e-8, "weight_decay": 0, "momentum": 0} | options

    def step(w, g, s):  # the published formula: the package wants a whole gym
        g = g + o["weight_decay"] * w
        s["v"] = o["alpha"] * s.get("v", 1.0) + (1 - o["alpha"]) * g**2
        s["a"] = o["alpha"] * s.get("a", 0.0) + (1 - o["alpha"]) * g
        average = s["v"] - (s["a"] ** 2 if o.get("centered") else 0.0)
        s["b"] = o["momentum"] * s.get("b", 0.0) + g / np.sqrt(average + o["eps"])
        return w - LR * s["b"]

    optimizer = dialects.stable_baselines3(LR, **options)
    check(optimizer, train_formula(step, dtype), dtype)


@pytest.mark.peers
@both_dtypes
def test_deepmind_dqn(dtype):
    def step(w, g, s):  # as in their NeuralQLearner, where g2 is v
        s["g"] = 0.95 * s.get("g", 0.0) + 0.05 * g
        s["v"] = 0.95 * s.get("v", 0.0) + 0.05 * g * g
        return w - LR * g / np.sqrt(s["v"] - s["g"] ** 2 + 0.01)

    check(dialects.deepmind_dqn(LR), train_formula(step, dtype), dtype)


PEERS = {
    "torch": lambda: peer("torch").optim.RMSprop,
    "timm": lambda: timm_rmsprop(),
    "optax": lambda: peer("optax").rmsprop,
    "tf_keras_legacy": lambda: peer("tf_keras").optimizers.legacy.RMSprop,
    "tensorflow_v1": lambda: tf.compat.v1.train.RMSPropOptimizer,
    "keras": lambda: keras.optimizers.RMSprop,
}


@pytest.mark.peers
@pytest.mark.parametrize("name", PEERS)
def test_names_order_and_defaults_are_the_peers(name):
    def parameters(function):
        found = inspect.signature(function).parameters.values()
        left_out = ("self", "params", "args", "kwargs")
        return {p.name: p for p in found if p.name not in left_out}

    theirs = parameters(PEERS[name]())
    ours = parameters(RMSprop if name == "keras" else getattr(dialects, name))
    shared = [ours[n] for n in theirs if n in ours]
    if name != "tf_keras_legacy":  # whose `decay` hides in its kwargs
        assert name == "keras" or {p.name for p in shared} == set(ours)
    # Where the default depends on "auto", the signature has None.
    in_force = RMSprop().get_config() if name == "keras" else {}
    for p in shared:
        same = p.default == theirs[p.name].default
        assert same or in_force[p.name] == theirs[p.name].default, p
    positional = [p.name for p in shared if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert [*theirs][: len(positional)] == positional


@pytest.mark.parametrize(
    ("dialect", "arguments", "message"),
    [
        ("torch", {"foreach": True}, "`foreach` of torch.optim.RMSprop has no"),
        ("torch", {"capturable": False}, "`capturable` of torch.optim.RMSprop"),
        ("torch", {"alpha": 1.5}, r"`rho` must be in \[0, 1\)"),
        ("tensorflow_v1", {"learning_rate": 0.1, "use_locking": True}, "`use_locking`"),
        ("timm", {"corrected_weight_decay": True}, "`corrected_weight_decay` of timm"),
        ("tf_keras_legacy", {"decay": -0.5}, "`decay` must be finite and >= 0"),
        (
            "tf_keras_legacy",
            {"decay": 0.5, "learning_rate": -0.1},
            "`learning_rate` must be finite",
        ),
        ("deepmind_dqn", {"gradient_momentum": 0.9}, "must be the same"),
    ],
)
def test_what_there_is_not_is_named(dialect, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(dialects, dialect)(**arguments)


@pytest.mark.parametrize("dialect", ["torch", "timm", "tf_keras_legacy"])
def test_an_argument_that_no_one_has_is_a_type_error(dialect):
    with pytest.raises(TypeError, match="has no argument `momentun`"):
        getattr(dialects, dialect)(momentun=0.9)


def table():
    """Return {(dialect, argument): cell} of the tables in the documentation."""
    page = Path(__file__).parent.parent / "docs" / "dialects.md"
    cells = {}
    for text in re.findall(r"^\| \| `(?:.*\|\n)+", page.read_text(), re.MULTILINE):
        lines = text.splitlines()
        rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
        names = [name.strip("`") for name in rows[0][1:]]
        cells |= {
            (name, row[0].strip("`")): cell
            for row in rows[2:]
            for name, cell in zip(names, row[1:], strict=True)
        }
    return cells


def shown(value):
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}"


def test_the_documented_table():
    """A cell is the default and, where there is a choice, what the dialect calls it."""
    for (dialect, argument), cell in table().items():
        value, name = re.fullmatch(r"([^ ]+)(?: `(\w+)`)?", cell).groups()
        function = getattr(dialects, dialect)
        given = {"learning_rate": 0.25} if dialect in ("optax", "tensorflow_v1") else {}
        default = function(**given).get_config()[argument]
        # – is where it must be given, or has no effect.
        assert value in (shown(default), "–"), (dialect, argument)
        if name:
            other = not default if isinstance(default, bool) else 0.5
            given[name] = other
            if name == "squared_gradient_momentum":
                given["gradient_momentum"] = other
            assert function(**given).get_config()[argument] == other


def test_what_the_page_says_of_all_dialects():
    for name in {dialect for dialect, _ in table()}:
        given = {"learning_rate": 0.25} if name in ("optax", "tensorflow_v1") else {}
        config = getattr(dialects, name)(**given).get_config()
        assert config["momentum"] == 0
        assert config["weight_decay"] is None
        assert config["centered"] == (name == "deepmind_dqn")


def test_every_dialect_is_in_the_table():
    public = {
        name
        for name, value in vars(dialects).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    assert public == {dialect for dialect, _ in table()}


def test_a_dialect_can_be_extended():
    config = dialects.torch(0.25, alpha=0.875).get_config()
    optimizer = RMSprop.from_config(config | {"global_clipnorm": 0.5})
    assert (optimizer.rho, optimizer.global_clipnorm) == (0.875, 0.5)
