"""Bad input is an error that says what was expected and received, and changes nothing.

XLA cannot fail: inside a function that it compiles, rows outside a table are dropped
(see `test_rows.py`).
"""

import functools
import warnings
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import BACKEND, WAYS, assert_close, tensor

from keras_rmsprop import RMSprop
from keras_rmsprop.rule import Slots

NAN, INF = float("nan"), float("inf")


def out_of_range(name, value, expected):
    return {name: value}, ValueError, f"`{name}` must be {expected}. Received: {name}="


def no_number(name, value):
    return {name: value}, TypeError, f"`{name}` must be a number.* Received: {name}="


ARGUMENTS = [
    *(out_of_range("rho", x, r"in \[0, 1\)") for x in (1.5, 1, -0.1, NAN)),
    *(out_of_range("momentum", x, r"in \[0, 1\)") for x in (1.0, -1)),
    *(out_of_range("epsilon", x, "finite and > 0") for x in (0, -1, INF)),
    *(
        out_of_range(name, x, "finite and >= 0")
        for name in (
            "learning_rate",
            "weight_decay",
            "clipnorm",
            "clipvalue",
            "global_clipnorm",
            "initial_accumulator_value",
        )
        for x in (-0.1, INF, NAN)
    ),
    *(out_of_range("loss_scale_factor", x, "finite and > 0") for x in (0, -1.0, NAN)),
    out_of_range("ema_momentum", 1.5, r"in \[0, 1\]"),
    *(
        out_of_range("gradient_accumulation_steps", x, "an integer >= 2")
        for x in (1, -2, 2.5, "3", True)
    ),
    out_of_range("gradient_accumulation_steps", 2**80, "an integer <= 2147483647"),
    *(
        out_of_range("ema_overwrite_frequency", x, "an integer >= 1")
        for x in (-3, 1.5, True)
    ),
    *(
        no_number(name, x)
        for name in ("rho", "momentum", "epsilon", "learning_rate")
        for x in ("0.9", True)
    ),
    no_number("rho", None),
    no_number("learning_rate", None),
    *(
        no_number(name, "1")
        for name in ("weight_decay", "clipnorm", "loss_scale_factor", "ema_momentum")
    ),
    ({"learning_rate": [0.1]}, ValueError, r"should be float, .* learning_rate=\[0.1"),
    ({"centered": "no"}, TypeError, "must be True or False. Received: centered='no'"),
    out_of_range("jit_compile", "no", '"auto", True or False'),
    out_of_range("sparse_update", "x", '"exact" or "lazy"'),
    *(
        ({"slot_dtype": x}, ValueError, f"`slot_dtype` must be None, .*={x!r}")
        for x in ("float16", "int8", 3)
    ),
    ({"name": 3}, ValueError, "must be a string .* name=3"),
    ({"clipnorm": 1.0, "clipvalue": 1.0}, ValueError, "Only one of"),
    ({"slot_dtype": "int8"}, ValueError, 'Did you mean "uint8"'),
    ({"rh0": 0.9}, ValueError, "not recognized: {'rh0': 0.9}. Did you mean `rho`"),
    ({"momentun": 0.9}, ValueError, "Did you mean `momentum`"),
    ({"xyz": 1, "clip_norm": 1.0}, ValueError, "1.0}. Did you mean `clipnorm`"),
    *(
        ({name: 0.9}, ValueError, f"call `{ours}`: .* see `keras_rmsprop.dialects`")
        for name, ours in {"alpha": "rho", "eps": "epsilon"}.items()
    ),
    ({"lr": 0.1, "learning_rate": 0.2}, ValueError, "give one of them"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ARGUMENTS, ids=repr)
def test_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        RMSprop(**arguments)


@pytest.mark.parametrize("value", [-1.0, NAN, "0.1", None, [0.1, 0.2]])
def test_a_learning_rate_assigned_later(value):
    optimizer = RMSprop(0.25)
    with pytest.raises((ValueError, TypeError), match=r"must be|must match"):
        optimizer.learning_rate = value
    assert optimizer.learning_rate.numpy() == 0.25


def ones(*shape, dtype="float32"):
    return keras.ops.ones(shape, dtype)


def rows(values, ids, shape=None):
    return tf.IndexedSlices(values, tf.constant(ids), shape)


def good_rows():
    """Return the sum of two rows of a table: as slices, where there are any."""
    if BACKEND == "tensorflow":
        return rows(ones(2, 3), [1, 1])
    return tensor(np.float32([[0.0] * 3, [2.0] * 3, [0.0] * 3, [0.0] * 3]))


SHAPE = "must have the shape of its variable. Received: shape"
DTYPE = "must be of floating point numbers. Received: "
ROWS = "must have int32 or int64 indices, and for each a row as wide .* Received: "
INDEX = r"An index of a sparse gradient is not in \[0, 4\)"
# For a vector of 2 and a table of 4 rows of 3.
GRADIENTS = {
    "too few": ([ones(2)], ValueError, "1 gradients for 2 variables"),
    "too many": ([ones(2)] * 3, ValueError, "3 gradients for 2 variables"),
    "all None": ([None, None], ValueError, "No gradients provided"),
    "longer": ([ones(3), None], ValueError, SHAPE),
    "to broadcast": ([ones(1), None], ValueError, SHAPE),
    "a scalar": ([1.0, None], ValueError, SHAPE),
    "transposed": ([None, ones(3, 4)], ValueError, SHAPE),
    "ragged": (
        [[[1.0], [1.0, 2.0]], None],
        ValueError,
        "non-rectangular|inhomogeneous|of length",
    ),
    "no tensor": ([object(), None], (TypeError, ValueError), "'?object'?"),
    "text": (
        [["a", "b"], None],
        (TypeError, ValueError),
        "'a'|could not convert|'str'",
    ),
    "int": ([ones(2, dtype="int32"), None], TypeError, DTYPE + "int32"),
    "bool": ([ones(2, dtype="bool"), None], TypeError, DTYPE + "bool"),
    "complex": ([ones(2, dtype="complex64"), None], TypeError, DTYPE + "complex64"),
    "complex NumPy": ([np.array([1j, 2j]), None], TypeError, DTYPE + "complex128"),
}
if BACKEND == "tensorflow":
    GRADIENTS |= {
        "a tensor of text": (
            [tf.constant(["a", "b"]), None],
            TypeError,
            DTYPE + "string",
        ),
        "narrow rows": ([ones(2), rows(ones(1, 2), [1])], ValueError, ROWS),
        "flat rows": ([ones(2), rows(ones(3), [1])], ValueError, ROWS),
        "too few rows": ([ones(2), rows(ones(1, 3), [1, 2])], ValueError, ROWS),
        "too many rows": ([ones(2), rows(ones(2, 3), [1])], ValueError, ROWS),
        "a matrix of indices": ([ones(2), rows(ones(1, 3), [[1]])], ValueError, ROWS),
        "float indices": ([ones(2), rows(ones(1, 3), [1.0])], ValueError, ROWS),
        "another table's": (
            [ones(2), rows(ones(1, 3), [1], [9, 3])],
            ValueError,
            SHAPE,
        ),
        "rows of int": (
            [ones(2), rows(ones(1, 3, dtype="int32"), [1])],
            TypeError,
            DTYPE + "int32",
        ),
        "rows of complex": (
            [ones(2), rows(ones(1, 3, dtype="complex64"), [1])],
            TypeError,
            DTYPE + "complex64",
        ),
        "rows of text": (
            [ones(2), rows(tf.fill([1, 3], "a"), [1])],
            TypeError,
            DTYPE + "string",
        ),
        # Known when the step runs, so TensorFlow's error and no ValueError.
        "an index too large": (
            [ones(2), rows(ones(2, 3), [1, 4])],
            tf.errors.InvalidArgumentError,
            INDEX,
        ),
        "an index below 0": (
            [ones(2), rows(ones(2, 3), [-1, 1])],
            tf.errors.InvalidArgumentError,
            INDEX,
        ),
    }
HOW = {"eager": "auto", "op by op": False}
if BACKEND == "tensorflow":
    HOW["tf.function"] = "auto"


@functools.cache
def trained(how):
    """Return an optimizer with a clock: one for all cases, as none may change it."""
    variables = [
        keras.Variable(np.ones((2,), "float32")),
        keras.Variable(np.ones((4, 3), "float32")),
    ]
    optimizer = RMSprop(0.1, centered=True, jit_compile=HOW[how])
    good_step(optimizer, variables)
    return optimizer, variables


def good_step(optimizer, variables):
    optimizer.apply([ones(2), good_rows()], variables)


def everything(optimizer, variables):
    clocks = [optimizer._clocks[i] for i in optimizer._clocks]
    clocks = [v for clock in clocks for v in (clock.updates, clock.last)]
    return [v.numpy() for v in [*variables, *optimizer.variables, *clocks]]


def assert_same(got, want):
    assert len(got) == len(want)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.one_in(6)
@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients(case, how):
    gradients, error, message = GRADIENTS[case]
    optimizer, variables = trained(how)
    before = everything(optimizer, variables)
    step = functools.partial(optimizer.apply, gradients, variables)
    with pytest.raises(error, match=message):
        tf.function(step)() if how == "tf.function" else step()
    assert_same(everything(optimizer, variables), before)


@pytest.mark.parametrize("how", HOW)
def test_after_all_these_errors_a_step_is_what_it_was(how):
    optimizer, variables = trained(how)
    # Without the clock that only RMSprop has: the built-in on dense gradients.
    twins = [keras.Variable(np.ones(v.shape, "float32")) for v in variables]
    built_in = keras.optimizers.RMSprop(0.1, centered=True)
    dense = np.zeros((4, 3), "float32")
    dense[1] = 2
    good_step(optimizer, variables)
    for _ in range(int(optimizer.iterations.numpy())):
        built_in.apply([ones(2), tensor(dense)], twins)
    assert_close([v.numpy() for v in variables], [v.numpy() for v in twins], rtol=1e-6)


@pytest.mark.parametrize("case", [c for c in GRADIENTS if c != "all None"])
def test_nothing_is_made_for_gradients_that_do_not_fit(case):
    gradients, error, message = GRADIENTS[case]
    vector, table = keras.Variable(np.ones(2)), keras.Variable(np.ones((4, 3)))
    optimizer = RMSprop()
    with pytest.raises(error, match=message):
        optimizer.apply(gradients, [vector, table])
    if error is not tf.errors.InvalidArgumentError:
        assert not optimizer.built
    assert not list(optimizer._clocks)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("value", "error"), [("x", TypeError), (None, TypeError), (NAN, ValueError)]
)
def test_what_a_callable_learning_rate_returns(value, error, way):
    variable = keras.Variable([1.0])
    optimizer = RMSprop(lambda: value)
    optimizer.build([variable])
    before = everything(optimizer, [variable])
    with pytest.raises(error, match=r"`learning_rate` must be .* Received"):
        WAYS[way](optimizer)([ones(1)])
    assert_same(everything(optimizer, [variable]), before)


class TestVariables:
    def test_not_built(self):
        with pytest.raises(ValueError, match="must already be built"):
            RMSprop().apply([ones(1)])
        with pytest.raises(ValueError, match="must be built"):
            RMSprop().get_state()

    @pytest.mark.parametrize("way", WAYS if BACKEND == "tensorflow" else ["eager"])
    def test_of_another_model(self, way):
        variable, foreign = keras.Variable([1.0]), keras.Variable([2.0])
        optimizer = RMSprop()
        optimizer.build([variable])
        before = everything(optimizer, [variable, foreign])
        step = functools.partial(optimizer.apply, [ones(1)], [foreign])
        if way != "eager":
            step = tf.function(step, jit_compile=way == "XLA")
        with pytest.raises(ValueError, match="Unknown variable"):
            step()
        assert_same(everything(optimizer, [variable, foreign]), before)

    @pytest.mark.skipif(BACKEND == "jax", reason="there `fit` goes by position")
    def test_of_another_model_in_fit(self):
        models = [
            keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
            for _ in range(2)
        ]
        optimizer = RMSprop()
        optimizer.build(models[0].trainable_variables)
        models[1].compile(optimizer, "mse")
        before = everything(optimizer, models[1].variables)
        with pytest.raises(ValueError, match="Unknown variable"):
            models[1].fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
        assert_same(everything(optimizer, models[1].variables), before)

    def test_in_the_place_of_gradients(self):
        variable = keras.Variable([1.0])
        optimizer = RMSprop()
        with pytest.raises(TypeError, match=r"come with variables. Received: "):
            optimizer.apply_gradients([(variable, ones(1))])
        assert not optimizer.built


STATES = {
    "no state": (lambda s: None, TypeError, "must be a `State`.* Received: None"),
    "too short": (
        lambda s: s._replace(slots=s.slots[:1]),
        ValueError,
        "slots for 2 variables. Received: slots for 1",
    ),
    "transposed": (
        lambda s: with_velocity(s, np.ones((3, 4))),
        ValueError,
        r"expected shape \(4, 3\), received \(3, 4\)",
    ),
    "a slot missing": (
        lambda s: with_velocity(s, None),
        ValueError,
        r"expected shape \(4, 3\), received None",
    ),
    "a slot too many": (
        lambda s: s._replace(slots=[Slots(*s.slots[0][:1], ones(2)), s.slots[1]]),
        ValueError,
        r"`momentum` .* expected shape None, received \(2,\)",
    ),
    "complex": (
        lambda s: with_velocity(s, np.full((4, 3), 1j)),
        ValueError,
        "expected real numbers, received complex128",
    ),
    "text": (
        lambda s: with_velocity(s, np.full((4, 3), "x")),
        ValueError,
        "expected real numbers, received <U1",
    ),
    **{
        f"iterations {n}": (
            lambda s, n=n: s._replace(iterations=n),
            ValueError,
            "`iterations` must be an integer >= 0. Received: iterations=",
        )
        for n in (-1, 1.5, "x", None)
    },
}


def with_velocity(state, velocity):
    first, second = state.slots
    return state._replace(
        slots=[
            first._replace(velocity=first.velocity + 1),
            Slots(velocity, *second[1:]),
        ]
    )


@pytest.mark.parametrize("case", STATES)
def test_set_state(case):
    change, error, message = STATES[case]
    optimizer, variables = trained("eager")
    before = everything(optimizer, variables)
    with pytest.raises(error, match=message):
        optimizer.set_state(change(optimizer.get_state()))
    assert_same(everything(optimizer, variables), before)


def model(units=3, fit=True):
    keras.utils.set_random_seed(0)
    made = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(units, name="dense")]
    )
    made.compile(RMSprop(0.125 if fit else 0.25), "mse")
    if fit:
        made.fit(np.ones((8, 4)), np.ones((8, units)), verbose=0)
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder of files that are no good."""
    folder = tmp_path_factory.mktemp("files")
    model(units=5).save(folder / "wide.keras")
    model(units=5).save_weights(folder / "wide.weights.h5")
    for kind in ("keras", "weights.h5"):
        content = (folder / f"wide.{kind}").read_bytes()
        (folder / f"cut.{kind}").write_bytes(content[: len(content) // 2])
        (folder / f"empty.{kind}").write_bytes(b"")
        (folder / f"text.{kind}").write_text("no file of Keras\n" * 100)
    return folder


UNREADABLE = (OSError, zipfile.BadZipFile)  # h5py's and Python's own


@pytest.mark.one_in(17)
@pytest.mark.parametrize("built", [True, False], ids=["built", "not built"])
@pytest.mark.parametrize("kind", ["keras", "weights.h5"])
@pytest.mark.parametrize(
    ("file", "error", "message"),
    [
        ("cut", UNREADABLE, "truncated|not a zip file"),
        ("empty", UNREADABLE, "signature|not a zip file"),
        ("text", UNREADABLE, "signature|not a zip file"),
        ("missing", (ValueError, FileNotFoundError), "File not found|No such file"),
        (
            "wide",
            ValueError,
            r"\(4, 3\), Received: value.shape=\(4, 5\)|objects could not be loaded",
        ),
    ],
)
def test_files(files, file, error, message, kind, built):
    mine = model(fit=built)
    optimizer = mine.optimizer
    before = everything(optimizer, mine.variables)
    with pytest.raises(error, match=message):
        mine.load_weights(files / f"{file}.{kind}")
    if not built and file == "wide":
        # What the file says of slots can only be judged now, and then is forgotten.
        with pytest.warns(UserWarning, match=r"shape \(4, 3\), received \(4, 5\)"):
            optimizer.build(mine.trainable_variables)
        assert [v.numpy() for v in optimizer.variables[:2]] == [0, 0.25]
        assert not any(v.numpy().any() for v in optimizer.variables[2:])
    else:
        assert_same(everything(optimizer, mine.variables), before)
    if not built:  # it trains as if there had been no file
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            mine.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0)
        assert optimizer.iterations.numpy() == 1


def test_a_file_with_text_for_numbers():
    optimizer, variables = trained("eager")
    store = {}
    optimizer.save_own_variables(store)
    store["3"] = np.full(store["3"].shape, "x")
    store["0"] = store["0"] + 1
    before = everything(optimizer, variables)
    with pytest.raises(ValueError, match=r"does not fit. .* received \(4, 3\) of <U1"):
        optimizer.load_own_variables(store)
    assert_same(everything(optimizer, variables), before)
