"""On JAX, a step as a function: inside `jax.jit`, and with gradients through it.

Each test is a process of its own: which backend Keras has is settled on import.
"""

import pytest
from stepping import python

STEPS = '''
import jax, keras, numpy as np, random, warnings
from keras_rmsprop import RMSprop, reference

warnings.filterwarnings("error", message="Some donated buffers")
SHAPES, RATE, STEPS = [(), (5,), (3, 3, 2, 4)], 0.01, 12
RNG = np.random.default_rng(0)
START, *GRADIENTS = (
    [RNG.normal(size=s).astype("float32") for s in SHAPES] for _ in range(STEPS + 1)
)


def stateful(optimizer, gradients):
    variables = [keras.Variable(x) for x in START]
    optimizer.build(variables)
    for given in gradients:
        optimizer.apply([jax.numpy.asarray(g) for g in given])
    return [v.numpy() for v in variables], [v.numpy() for v in optimizer.variables]


def stateless(optimizer, gradients):
    variables = [keras.Variable(x) for x in START]
    optimizer.build(variables)
    traces = []

    def step(state, gradients, weights):
        traces.append(1)
        return optimizer.stateless_apply(state, gradients, weights)

    step = jax.jit(step, donate_argnums=(0, 2))
    weights = [v.value for v in variables]
    state = [v.value for v in optimizer.variables]
    for given in gradients:
        old = [*weights, *state]
        weights, state = step(state, [jax.numpy.asarray(g) for g in given], weights)
        assert all(x.is_deleted() for x in old)
    assert len(traces) == 1
    return [np.asarray(x) for x in weights], [np.asarray(x) for x in state]


def clipped(options, gradients):
    gradients = [np.float64(g) for g in gradients]
    norms = [np.linalg.norm(g) for g in gradients]
    most = options.get("clipvalue")
    if most:
        return [np.clip(g, -most, most) for g in gradients]
    if "global_clipnorm" in options:
        norms = [np.linalg.norm(norms)] * len(norms)
    most = options.get("global_clipnorm") or options.get("clipnorm") or np.inf
    return [g * min(1, most / norm) for g, norm in zip(gradients, norms)]


def expected(options, gradients):
    """Return the weights, from the rule in NumPy, and the averages with `use_ema`."""
    known = reference.step.__kwdefaults__
    rule = {"epsilon": 1e-7, "alpha": float(np.float32(RATE))}
    rule |= {k: v for k, v in options.items() if k in known}
    every = options.get("gradient_accumulation_steps", 1)
    weights, states, averages, auto = START, [{} for _ in START], START, {}
    if options.get("learning_rate") == "auto":
        rule |= {"epsilon": 1e-30, "bias_correction": True, "factor": 1.0}
        rule |= {"momentum": 0.9, "nesterov": True}
        del rule["alpha"]
    t, summed = 0, []
    for given in gradients:
        finite = all(np.isfinite(g).all() for g in given)
        if options.get("skip_nonfinite") and not finite:
            continue
        summed.append(given)
        if len(summed) == every:
            mean = [np.mean(gs, axis=0) for gs in zip(*summed)]
            mean, summed = clipped(options, mean), []
            if auto or "alpha" not in rule:
                weights = reference.automatic_step(weights, mean, auto, **rule)
            else:
                weights = [
                    reference.step(w, g, state, **rule)
                    for w, g, state in zip(weights, mean, states)
                ]
        share = options.get("ema_momentum", 0.99) if t // every else 0.0
        if options.get("learning_rate") == "auto":
            share = min(share, (1 + t) / (10 + t))
        averages = [share * a + (1 - share) * w for a, w in zip(averages, weights)]
        overwrites = options.get("ema_overwrite_frequency")
        if overwrites and (t // every + 1) % overwrites == 0:
            weights = averages
        t += 1
    return weights, averages


def close(got, want, tolerance):
    for x, y in zip(got, want, strict=True):
        x, y = np.float64(x), np.float64(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def check(name, options, gradients=GRADIENTS, tolerance=2e-6):
    try:
        given = {"learning_rate": RATE} | options
        random.seed(0)  # where random rounding starts
        weights, state = stateful(RMSprop(**given), gradients)
        random.seed(0)
        optimizer = RMSprop(**given)
        traced_weights, traced_state = stateless(optimizer, gradients)
        # bfloat16: what differs in the last bit may be rounded to the other side.
        close(traced_weights, weights, tolerance)
        close(traced_state, state, max(tolerance, 5e-6))
        want, averages = expected(options, gradients)
        close(weights, want, tolerance)
        if optimizer.use_ema:
            paths = [v.path for v in optimizer.variables]
            got = [x for path, x in zip(paths, state) if path.endswith("_average")]
            close(got, averages, tolerance)
    except Exception as error:
        error.add_note(name)
        raise
'''


@pytest.mark.rest
@pytest.mark.slow
def test_a_jitted_step_is_that_of_the_rule():
    out = python(
        STEPS
        + """
for name, options in {
    "plain": {},
    "momentum": {"momentum": 0.9, "nesterov": True},
    "centered": {"centered": True, "epsilon_inside_sqrt": False, "epsilon": 1e-3},
    "bias_correction": {"bias_correction": True, "initial_accumulator_value": 0.1},
    "weight_decay": {"weight_decay": 0.1},
    "L2": {"weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": True},
    "cautious": {"momentum": 0.9, "cautious": True, "lr_in_momentum": False},
    "global_clipnorm": {"global_clipnorm": 0.5},
}.items():
    check(name, options)
print(keras.backend.backend())
""",
        KERAS_BACKEND="jax",
    )
    assert out == "jax"


@pytest.mark.slow
def test_a_jitted_step_with_all_that_surrounds_the_rule():
    out = python(
        STEPS
        + """
poisoned = [[g.copy() for g in given] for given in GRADIENTS]
poisoned[3][1][2] = np.nan
poisoned[7][2][0, 0, 0, 0] = np.inf
ema = {"use_ema": True, "ema_momentum": 0.9}
check("clipnorm", {"clipnorm": 0.5})
check("clipvalue", {"clipvalue": 0.5})
auto = {"learning_rate": "auto"}
check("auto", auto, tolerance=2e-5)
check("auto, clipped", auto | {"global_clipnorm": 1.0}, tolerance=2e-5)
check("averages", ema | {"momentum": 0.5})
check("averages put in", ema | {"ema_overwrite_frequency": 5})
check("accumulation", {"gradient_accumulation_steps": 3})
check("accumulation, clipped", {"gradient_accumulation_steps": 3, "clipnorm": 0.5})
check("accumulation, averages", ema | {"gradient_accumulation_steps": 2})
check("skipped", {"skip_nonfinite": True}, poisoned)
check("skipped, averages", ema | {"skip_nonfinite": True, "momentum": 0.5}, poisoned)
half = {"slot_dtype": "bfloat16", "momentum": 0.5}
check("bfloat16", half, tolerance=5e-3)
print(keras.backend.backend())
""",
        KERAS_BACKEND="jax",
    )
    assert out == "jax"


@pytest.mark.slow
def test_state_is_updated_in_place():
    """XLA writes the new state where the old one was: no memory for a second one."""
    out = python(
        """
        import jax, keras
        from keras_rmsprop import RMSprop

        for options in ({}, {"momentum": 0.9, "centered": True, "use_ema": True}):
            optimizer = RMSprop(0.01, **options)
            optimizer.build([keras.Variable(jax.numpy.ones((256, 64)))])
            state = [v.value for v in optimizer.variables]
            weights = [v.value for v in optimizer._trainable_variables]
            step = jax.jit(optimizer.stateless_apply, donate_argnums=(0, 2))
            compiled = step.lower(state, weights, weights).compile()
            whole = sum(x.nbytes for x in [*weights, *state])
            assert compiled.memory_analysis().alias_size_in_bytes == whole
        print("in place")
        """,
        KERAS_BACKEND="jax",
    )
    assert out == "in place"


GRADIENT = '''
import jax
jax.config.update("jax_enable_x64", True)
import keras, numpy as np
keras.config.set_floatx("float64")
from keras_rmsprop import RMSprop, reference

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(4, 4)), RNG.normal(size=4)
A, W, RATE = A @ A.T, RNG.normal(size=4), 0.1


def built(**options):
    optimizer = RMSprop(RATE, **options)
    optimizer.build([keras.Variable(W)])
    return optimizer, [v.path for v in optimizer.variables]


def central(function, x, h=1e-7):
    """Return the Jacobian of a function of an array by finite differences."""
    x = np.asarray(x, np.float64)
    columns = []
    for place in np.ndindex(x.shape):
        e = np.zeros_like(x)
        e[place] = h
        columns.append((function(x + e) - function(x - e)) / (2 * h))
    return np.reshape(np.stack(columns, -1), (len(W), *x.shape))
'''


@pytest.mark.slow
def test_gradients_pass_through_steps():
    out = python(
        GRADIENT
        + """
def inner(w, rate, options):
    optimizer, paths = built(**options)
    state = [v.value for v in optimizer.variables]
    state[paths.index("rmsprop/learning_rate")] = rate
    w = [w]
    for _ in range(2):
        w, state = optimizer.stateless_apply(state, [A @ w[0] - B], w)
    return w[0]

def inner_in_numpy(w, rate, options):
    state = {}
    for _ in range(2):
        g = A @ w - B
        if "global_clipnorm" in options:
            g = g * min(1, options["global_clipnorm"] / np.linalg.norm(g))
        rule = {k: v for k, v in options.items() if k in reference.step.__kwdefaults__}
        rule = {"epsilon": 1e-7} | rule
        w = reference.step(w, g, state, alpha=rate, **rule)
    return w

for options in (
    {},
    {"momentum": 0.9, "nesterov": True},
    {"centered": True, "epsilon": 1e-3},
    {"bias_correction": True, "epsilon_inside_sqrt": False},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": False},
    {"momentum": 0.5, "cautious": True},
    {"global_clipnorm": 0.5},
    {"skip_nonfinite": True},
):
    options["name"] = "rmsprop"
    of_weights, of_rate = jax.jit(
        jax.jacobian(lambda w, rate: inner(w, rate, options), argnums=(0, 1))
    )(W, RATE)
    want = central(lambda w: inner_in_numpy(w, RATE, options), W)
    np.testing.assert_allclose(of_weights, want, rtol=1e-6, atol=1e-7, err_msg=options)
    want = central(lambda rate: inner_in_numpy(W, rate, options), RATE)
    np.testing.assert_allclose(of_rate, want, rtol=1e-6, atol=1e-7, err_msg=options)
print(keras.backend.backend())
""",
        KERAS_BACKEND="jax",
    )
    assert out == "jax"


@pytest.mark.rest
@pytest.mark.slow
def test_gradients_where_nothing_has_moved():
    """Without a gradient so far v is 0, and so is g: as of a unit that is dead."""
    out = python(
        GRADIENT
        + """
def derivatives(dtype, **options):
    "Return those of a step by g and by v, for an element with 0 of both; and epsilon."
    keras.config.set_floatx(dtype)
    given = {"learning_rate": RATE} | options
    optimizer = RMSprop(**given)
    optimizer.build([keras.Variable(W, dtype=dtype)])
    place = [v.path.endswith("_velocity") for v in optimizer.variables].index(True)

    def step(g, v):
        state = [x.value for x in optimizer.variables]
        state[place] = v
        weights = [x.value for x in optimizer._trainable_variables]
        return optimizer.stateless_apply(state, [g], weights)[0][0]

    # In the first element; "auto" needs some gradient to begin.
    g, v = (jax.numpy.asarray(x, dtype) for x in ([0, 1, 0, 2], [0, 1, 1, 1]))
    by_g, by_v = jax.jit(jax.jacobian(step, argnums=(0, 1)))(g, v)
    return by_g[0], by_v[0], optimizer.epsilon

for dtype in ("float64", "float32"):
    for options in (
        {},
        {"momentum": 0.9},
        {"bias_correction": True},
        {"centered": True},
        {"learning_rate": "auto"},
        {"skip_nonfinite": True},
    ):
        by_g, by_v, epsilon = derivatives(dtype, **options)
        rate = RATE
        if "learning_rate" in options:  # (1 - mu) d, and Nesterov's 1 + mu
            rate = (1 - 0.9) * 1e-5 * (1 + 0.9)
        np.testing.assert_allclose(
            by_g, [-rate / epsilon**0.5, 0, 0, 0], rtol=1e-5, err_msg=options
        )
        assert np.array_equal(by_v, np.zeros(4)), options
    # The root of v has no finite derivative at 0.
    by_g, _, _ = derivatives(dtype, epsilon_inside_sqrt=False)
    assert np.isnan(by_g[0])

# What is rounded at random is a constant for the next step.
optimizer = RMSprop(RATE, slot_dtype="bfloat16")
optimizer.build([keras.Variable(W)])

def second(g):
    state, w = [v.value for v in optimizer.variables], [jax.numpy.asarray(W)]
    w, state = optimizer.stateless_apply(state, [g], w)
    return optimizer.stateless_apply(state, [jax.numpy.ones(4)], w)[0][0] - w[0]

assert np.array_equal(jax.jacobian(second)(jax.numpy.ones(4)), np.zeros((4, 4)))

# A global norm of nothing has no derivative.
optimizer = RMSprop(RATE, global_clipnorm=1.0)
optimizer.build([keras.Variable(W)])
state = [v.value for v in optimizer.variables]
step = lambda g: optimizer.stateless_apply(state, [g], [jax.numpy.asarray(W)])[0][0]
assert np.isnan(jax.jacobian(step)(jax.numpy.zeros(4))).all()
print(keras.backend.backend())
""",
        KERAS_BACKEND="jax",
    )
    assert out == "jax"


EAGER = """
import io, logging
import jax, keras, numpy as np
from keras_rmsprop import RMSprop

log = io.StringIO()
logging.getLogger("jax").addHandler(logging.StreamHandler(log))
weights = [keras.Variable(np.ones((3, 2))), keras.Variable(np.ones(3))]
grads = [keras.ops.ones(v.shape) for v in weights]
for options in (
    {"use_ema": True, "ema_overwrite_frequency": 3, "clipnorm": 1.0},
    {"gradient_accumulation_steps": 2, "skip_nonfinite": True, "momentum": 0.5},
    {"learning_rate": "auto", "slot_dtype": "uint8"},
):
    optimizer = RMSprop(**options)
    for n in range(12):
        jax.config.update("jax_log_compiles", n > 6)
        optimizer.apply(grads, weights)
    jax.config.update("jax_log_compiles", False)
    print("compiled:", log.getvalue().count("Compiling"))
"""


@pytest.mark.rest
@pytest.mark.slow
def test_later_eager_steps_compile_nothing():
    assert python(EAGER, KERAS_BACKEND="jax").count("compiled: 0") == 3
