"""State through every door, after any history of trained parts of a model.

The oracle is a twin that was never saved: weights, slots and averages of each variable
must be its, or a warning must say that something started fresh.
"""

import contextlib
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from small_models import JIT, gradient, save, user_warnings
from stepping import BACKEND, examples

from keras_rmsprop import RMSprop

LAYERS = 3
OPTIONS = [{}, {"momentum": 0.5, "use_ema": True, "ema_momentum": 0.5}]
MODELS = ("twins", "nested", "shared", "subclass")


class Subclass(keras.Model):
    """Keras loads its optimizer before its last layer."""

    def __init__(self):
        super().__init__(name="subclass")
        self.a, self.b, self.z = (keras.layers.Dense(3) for _ in range(LAYERS))

    def call(self, x):
        return self.z(self.b(self.a(x)))


def built(kind, options, names=None, reverse=False):
    """Return a model of layers of one shape.

    Args:
        kind: One of `MODELS`.
        options: The optimizer's.
        names: Names for the layers; None: Keras'.
        reverse: Whether the layers are made in another order than they are used.
    """
    names = names or [None] * LAYERS
    keras.utils.set_random_seed(0)
    order = [*range(LAYERS)][:: -1 if reverse else 1]
    made = {i: keras.layers.Dense(3, name=names[i]) for i in order}
    layers = [made[i] for i in range(LAYERS)]
    if kind == "subclass":
        model = Subclass()
        model(np.zeros((1, 3)))
    elif kind == "nested":
        inner = keras.Sequential([keras.Input((3,)), *layers[1:]])
        model = keras.Sequential([keras.Input((3,)), layers[0], inner])
    else:
        last = layers[:1] if kind == "shared" else []
        x = inputs = keras.Input((3,))
        for layer in layers + last:
            x = layer(x)
        model = keras.Model(inputs, x)
    model.compile(RMSprop(0.01, **options), "mse", jit_compile=JIT)
    return model


def parts(model):
    """Return the variables of each layer."""
    variables = model.trainable_variables
    return [variables[2 * i : 2 * i + 2] for i in range(LAYERS)]


def joined(history):
    """Return parts that each have a layer in common with those before."""
    known, found = {*history[0]}, []
    for part in history:
        if known & {*part}:
            found.append(part)
            known |= {*part}
    return found


def train(model, history, start=0):
    """Take a step on the layers of each part, in the model's order or another."""
    for step, part in enumerate(history, start):
        variables = [v for i in part for v in parts(model)[i]]
        grads = [gradient(model, v, step) for v in variables]
        model.optimizer.apply(grads, variables)


def state_of(model):
    """Return what the optimizer has for each of the model's variables, by its place."""
    optimizer = model.optimizer
    state = optimizer.get_state()
    averages = getattr(optimizer, "_weight_averages", None)
    places = {id(v): i for i, v in enumerate(model.trainable_variables)}
    found = {}
    for i, variable in enumerate(optimizer._trainable_variables):
        place = places[id(variable)]
        found[place] = [x for x in state.slots[i] if x is not None]
        if averages:
            found[place].append(averages[i].numpy())
    return found


def through_keras(source, target, folder):
    save(source, folder / "m.keras")
    return keras.models.load_model(folder / "m.keras")


def through_weights(source, target, folder):
    save(source, folder / "m.weights.h5")
    target.load_weights(folder / "m.weights.h5")
    return target


def through_built(source, target, folder):
    target.optimizer.build(target.trainable_variables)
    return through_weights(source, target, folder)


def through_pickle(source, target, folder):
    return pickle.loads(pickle.dumps(source))


def through_state(source, target, folder):
    target.set_weights(source.get_weights())
    target.optimizer.build(target.trainable_variables)
    target.optimizer.set_state(source.optimizer.get_state())
    return target


def through_checkpoint(source, target, folder):
    path = tf.train.Checkpoint(m=source, o=source.optimizer).save(str(folder / "c"))
    target.optimizer.build(target.trainable_variables)
    tf.train.Checkpoint(m=target, o=target.optimizer).restore(path)
    return target


def through_config(source, target, folder):
    target.set_weights(source.get_weights())
    optimizer = RMSprop.from_config(source.optimizer.get_config())
    optimizer.build(target.trainable_variables)
    optimizer.set_weights([v.numpy() for v in source.optimizer.variables])
    target.compile(optimizer, "mse", jit_compile=JIT)
    return target


DOORS = [through_keras, through_weights, through_built, through_pickle, through_state]
EVERY_DAY = [through_keras, through_weights, through_state, through_checkpoint]
BY_POSITION = [through_config]
if BACKEND == "tensorflow":
    BY_POSITION.append(through_checkpoint)
some = st.lists(st.integers(0, LAYERS - 1), min_size=1, max_size=LAYERS, unique=True)
names = st.sampled_from([None, ("a", "b", "c"), ("c", "a", "b")])


@pytest.mark.parametrize(
    "door",
    [
        pytest.param(door, marks=[] if door in EVERY_DAY else [pytest.mark.slow])
        for door in DOORS + BY_POSITION
    ],
    ids=lambda door: door.__name__,
)
@examples(6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_each_state_arrives_or_a_warning_says_so(door, data, tmp_path):
    options = data.draw(st.sampled_from(OPTIONS))
    if door is through_state:
        options = {k: x for k, x in options.items() if "ema" not in k}  # not in it
    kind = data.draw(st.sampled_from(MODELS))
    if kind == "subclass" and door in (through_keras, through_pickle):
        kind = "twins"  # Keras would have to know the class
    history = data.draw(st.lists(some, min_size=1, max_size=4))
    if data.draw(st.booleans()) or door in BY_POSITION:
        history = [sorted(part) for part in history]
    if door in BY_POSITION:
        history.append([*range(LAYERS)])
    history = joined(history)
    keras.utils.clear_session(free_memory=False)
    model = built(kind, options, data.draw(names), data.draw(st.booleans()))
    if data.draw(st.booleans()):
        keras.utils.clear_session(free_memory=False)
    target = built(kind, options, data.draw(names), data.draw(st.booleans()))
    check(door, model, target, built(kind, options), history, tmp_path)


def check(door, model, target, twin, history, folder):
    """Train, save and load; compare with the twin, which is not saved."""
    twin.set_weights(model.get_weights())
    train(twin, history)
    train(model, history)
    known = state_of(twin)
    says_so = contextlib.nullcontext()
    if door is through_state and not (
        len(known) == 2 * LAYERS and twin.optimizer._book.order.is_certain
    ):
        says_so = contextlib.suppress(ValueError)
    loaded = None
    with user_warnings() as warned, says_so:
        loaded = door(model, target, folder)
        loaded.optimizer.build(loaded.trainable_variables)
    if loaded is None:
        return
    found = state_of(loaded)
    for place, state in known.items():
        for x, y in zip(found[place], state, strict=True):
            if not np.array_equal(x, y):
                assert warned, f"the state of variable {place} did not arrive"
                weights = loaded.trainable_variables[place].numpy()
                assert not x.any() or np.array_equal(x, weights)
    if not warned:
        for each in (loaded, twin):
            train(each, [[*range(LAYERS)]], start=9)
        for x, y in zip(loaded.get_weights(), twin.get_weights(), strict=True):
            np.testing.assert_array_equal(x, y)
