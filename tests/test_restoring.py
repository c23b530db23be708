"""What a file holds is taken over wherever it fits, and never stops a training.

The oracle is the built-in on each weight alone (`OneBuiltInEach`): what was known of a
weight goes on, what was not starts fresh.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_models import (
    JIT,
    OneBuiltInEach,
    assert_same_bits,
    dense_model,
    numbers,
    save,
    take_steps,
    user_warnings,
)

from keras_rmsprop import RMSprop

BUILT_IN = keras.optimizers.RMSprop

on_files = pytest.mark.parametrize("file", ["m.keras", "m.weights.h5"])
on_files_before_and_after_building = pytest.mark.parametrize(
    ("file", "built"), [("m.keras", True), ("m.weights.h5", False)]
)


def build(model):
    model.optimizer.build(model.trainable_variables)


def loaded(model, path, built, **options):
    """Load a file into a model that took no step; it has its state from now on."""
    if built:
        build(model)
    model.load_weights(path, **options)
    if not built:
        build(model)
    return model


@on_files_before_and_after_building
class TestOtherLayersAreTrained:
    """The model that is loaded into trains other layers than the one of the file."""

    @pytest.mark.slow
    @pytest.mark.one_in(9)
    @pytest.mark.parametrize(
        "options", [{}, {"momentum": 0.5, "centered": True, "epsilon": 0.1}], ids=repr
    )
    @pytest.mark.parametrize(
        ("before", "after", "units"),
        [
            (["body"], [], (3, 3)),
            ([], ["body"], (3, 3)),
            ([], ["head"], (3, 3)),
            (["body"], ["head"], (4, 2)),
        ],
    )
    def test_frozen_and_unfrozen(
        self, tmp_path, file, built, before, after, units, options
    ):
        options = {"learning_rate": 0.02, **options}
        model = dense_model(RMSprop(**options), units, frozen=before)
        oracle = OneBuiltInEach(model, **options)
        take_steps(model, range(3))
        oracle.take_steps(model, range(3))
        save(model, tmp_path / file)
        other = dense_model(RMSprop(**options), units, frozen=after)
        with user_warnings() as warned:
            loaded(other, tmp_path / file, built)
            take_steps(other, range(3, 6))
        assert len(warned) == 1
        something_fits = (before, after) != (["body"], ["head"])
        assert int(other.optimizer.iterations) == (6 if something_fits else 3)
        oracle.take_steps(other, range(3, 6))
        oracle.assert_equals(other)

    @pytest.mark.one_in(3)
    @pytest.mark.parametrize(("before", "after"), [(["a"], []), ([], ["b"])])
    def test_layers_with_other_names_are_found_by_their_shapes(
        self, tmp_path, file, built, before, after
    ):
        model = dense_model(RMSprop(0.02), (4, 2), ("a", "c"), frozen=before)
        oracle = OneBuiltInEach(model, learning_rate=0.02)
        take_steps(model, range(3))
        oracle.take_steps(model, range(3))
        save(model, tmp_path / file)
        other = dense_model(RMSprop(0.02), (4, 2), ("b", "d"), frozen=after)
        with user_warnings() as warned:
            loaded(other, tmp_path / file, built)
            take_steps(other, range(3, 6))
        assert len(warned) == 1
        oracle.take_steps(other, range(3, 6))
        oracle.assert_equals(other)

    @pytest.mark.one_in(13)
    @pytest.mark.parametrize(
        ("units", "names"),
        [
            ((3, 5), ("body", "head")),
            ((3, 5), ("body", "new_head")),
            ((3, 7, 5), ("body", "new_layer", "new_head")),
        ],
        ids=["another head", "with another name", "a layer more"],
    )
    def test_another_head(self, tmp_path, file, built, units, names):
        model = dense_model(RMSprop(0.02), (3, 2))
        oracle = OneBuiltInEach(model, learning_rate=0.02)
        take_steps(model, range(3))
        oracle.take_steps(model, range(3))
        save(model, tmp_path / file)
        other = dense_model(RMSprop(0.02), units, names)
        with user_warnings() as warned:
            loaded(other, tmp_path / file, built, skip_mismatch=True)
            oracle.weights += [None] * (len(other.weights) - len(oracle.weights))
            for position in range(2, len(other.weights)):
                oracle.start_anew(other, position)
            take_steps(other, range(3, 6))
        assert len(warned) == 1
        oracle.take_steps(other, range(3, 6))
        oracle.assert_equals(other)

    @pytest.mark.one_in(40)
    @pytest.mark.parametrize(
        ("before", "after"), [(["body"], []), ([], ["other_body"])]
    )
    def test_fit_goes_on_with_other_names(self, tmp_path, file, built, before, after):
        model = dense_model(RMSprop(0.02), frozen=before)
        model.fit(*numbers(model), epochs=3, verbose=0)
        save(model, tmp_path / file)
        names = "other_body", "other_head"
        other = dense_model(RMSprop(0.02), names=names, frozen=after)
        with user_warnings() as warned:
            if built:
                build(other)
            other.load_weights(tmp_path / file)
            losses = other.fit(*numbers(other), epochs=5, verbose=0).history["loss"]
        assert len(warned) == 1
        assert losses[-1] < losses[0]
        assert int(other.optimizer.iterations) == 8


class TestUnfrozenInTheMiddle:
    """After unfreezing the variables stand in the model's order, so the files, too."""

    def unfrozen(self, **options):
        model = dense_model(RMSprop(0.02, **options), frozen=["body"])
        take_steps(model, range(3))
        model.layers[0].trainable = True
        model.compile(model.optimizer, "mse", jit_compile=JIT)
        take_steps(model, range(3, 5))
        return model

    @pytest.mark.one_in(3)
    @on_files
    @pytest.mark.parametrize(
        "options", [{}, {"momentum": 0.5, "centered": True, "use_ema": True}], ids=repr
    )
    def test_the_built_in_reads_the_file(self, tmp_path, file, options):
        model = self.unfrozen(**options)
        expected = model.optimizer.get_state()
        save(model, tmp_path / file)
        other = dense_model(BUILT_IN(0.02, **options))
        with user_warnings() as warned:
            loaded(other, tmp_path / file, built=True)
        assert not warned
        ours, theirs = (
            {
                # Without the name of the model, of which there are two.
                v.path.split("/")[-1].removeprefix(each.name): v.numpy()
                for v in each.optimizer.variables
            }
            for each in (model, other)
        )
        assert [*ours] == [*theirs]
        for key, value in ours.items():
            np.testing.assert_array_equal(theirs[key], value)
        for path, slots in zip(expected.paths, expected.slots, strict=True):
            name = "_".join(["", *path.split("/")[-2:]])
            np.testing.assert_array_equal(theirs[f"{name}_velocity"], slots.velocity)

    @on_files_before_and_after_building
    def test_a_run_resumes(self, tmp_path, file, built):
        model = self.unfrozen(momentum=0.5)
        save(model, tmp_path / file)
        other = dense_model(RMSprop(0.02, momentum=0.5))
        with user_warnings() as warned:
            loaded(other, tmp_path / file, built)
        assert not warned
        take_steps(model, range(5, 8))
        take_steps(other, range(5, 8))
        assert_same_bits(other, model)


def model_of_twins(optimizer, first_made):
    """Return a model of two layers of one shape, with Keras' names for them."""
    keras.utils.clear_session(free_memory=False)
    made = [keras.layers.Dense(3), keras.layers.Dense(3)]
    if first_made == "last":
        made.reverse()
    model = keras.Sequential([keras.Input((3,)), *made])
    model.compile(optimizer, "mse", jit_compile=JIT)
    return model


@on_files_before_and_after_building
def test_layers_made_in_another_order_keep_their_state(tmp_path, file, built):
    model = model_of_twins(RMSprop(0.02), "first")
    oracle = OneBuiltInEach(model, learning_rate=0.02)
    take_steps(model, range(3))
    oracle.take_steps(model, range(3))
    save(model, tmp_path / file)
    other = model_of_twins(RMSprop(0.02), "last")
    assert {layer.name for layer in other.layers} == {
        layer.name for layer in model.layers
    }
    loaded(other, tmp_path / file, built)
    take_steps(other, range(3, 6))
    oracle.take_steps(other, range(3, 6))
    oracle.assert_equals(other)


class TestSavedBeforeAnyStep:
    """A state that was loaded and waits for its variables is part of what is saved."""

    OPTIONS = {"learning_rate": 0.02, "momentum": 0.5, "use_ema": True}  # noqa: RUF012

    def trained(self):
        model = dense_model(RMSprop(**self.OPTIONS))
        take_steps(model, range(3))
        return model

    def save_and_load(self, path, model, last=RMSprop):
        """Return another model with what a model saves."""
        save(model, path)
        with user_warnings() as warned:
            other = loaded(dense_model(last(**self.OPTIONS)), path, built=True)
        assert not warned
        return other

    @pytest.mark.one_in(3)
    @pytest.mark.parametrize(
        ("file", "again"), [("m.keras", "n.weights.h5"), ("m.weights.h5", "n.keras")]
    )
    @pytest.mark.parametrize("last", [RMSprop, BUILT_IN], ids=["own", "built-in"])
    def test_load_and_save(self, tmp_path, file, again, last):
        model = self.trained()
        save(model, tmp_path / file)
        between = dense_model(RMSprop(**self.OPTIONS))
        between.load_weights(tmp_path / file)
        other = self.save_and_load(tmp_path / again, between, last)
        assert_same_bits(other, model)

    @on_files
    def test_a_loaded_model(self, tmp_path, file):
        model = self.trained()
        save(model, tmp_path / file)
        between = dense_model(RMSprop(**self.OPTIONS))
        between.load_weights(tmp_path / file)
        between.save(tmp_path / "n.keras")
        with user_warnings() as warned:
            other = keras.models.load_model(tmp_path / "n.keras")
        assert not warned
        assert_same_bits(other, model)

    def test_the_learning_rate_is_that_of_the_moment(self, tmp_path):
        save(self.trained(), tmp_path / "m.weights.h5")
        between = dense_model(RMSprop(**self.OPTIONS))
        between.load_weights(tmp_path / "m.weights.h5")
        between.optimizer.learning_rate = 0.25
        other = self.save_and_load(tmp_path / "n.weights.h5", between)
        assert float(other.optimizer.learning_rate) == 0.25
        assert int(other.optimizer.iterations) == 3

    def test_saving_does_not_use_the_state_up(self, tmp_path):
        model = self.trained()
        save(model, tmp_path / "m.weights.h5")
        other = dense_model(RMSprop(**self.OPTIONS))
        other.load_weights(tmp_path / "m.weights.h5")
        save(other, tmp_path / "n.weights.h5")
        for each in (model, other):
            take_steps(each, range(3, 6))
        assert_same_bits(other, model)


def one_kernel(optimizer):
    """Return a model with one variable: the states of many optimizers look alike."""
    keras.utils.set_random_seed(0)
    layer = keras.layers.Dense(3, use_bias=False)
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile(optimizer, "mse", jit_compile=JIT)
    return model


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("file", "state"),
    [
        ("m.keras", "built"),
        ("m.keras", "trained"),
        ("m.weights.h5", "unbuilt"),
        ("m.weights.h5", "trained"),
    ],
)
@pytest.mark.parametrize(
    ("theirs", "options"),
    [
        (keras.optimizers.SGD(0.5, momentum=0.9), {}),
        (keras.optimizers.Lion(0.5), {}),
        (keras.optimizers.Adam(0.5), {"momentum": 0.5}),
    ],
    ids=["SGD", "Lion", "Adam"],
)
def test_the_state_of_another_optimizer_is_refused(
    tmp_path, file, state, theirs, options
):
    theirs = theirs.from_config(theirs.get_config())  # a new one for each case
    model = one_kernel(theirs)
    take_steps(model, range(3))
    assert any((v.numpy() < 0).any() for v in theirs.variables)
    save(model, tmp_path / file)
    ours, twin = (
        one_kernel(RMSprop(0.02, **options)),
        one_kernel(BUILT_IN(0.02, **options)),
    )
    if state == "trained":
        take_steps(ours, range(10, 12))
        take_steps(twin, range(10, 12))
    with user_warnings() as warned:
        loaded(ours, tmp_path / file, built=state != "unbuilt")
    assert len(warned) == 1
    assert float(ours.optimizer.learning_rate) == np.float32(0.02)
    # The weights are loaded; the state goes on as if there had been no file.
    twin.set_weights(model.get_weights())
    take_steps(ours, range(20, 23))
    take_steps(twin, range(20, 23))
    for got, want in zip(ours.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_allclose(got, want, 1e-5, 1e-6)
    assert int(ours.optimizer.iterations) == int(twin.optimizer.iterations)


@on_files_before_and_after_building
def test_the_state_of_the_built_in_is_not_refused(tmp_path, file, built):
    model = one_kernel(BUILT_IN(0.02, momentum=0.5))
    take_steps(model, range(3))
    save(model, tmp_path / file)
    other = one_kernel(RMSprop(0.02, momentum=0.5))
    with user_warnings() as warned:
        loaded(other, tmp_path / file, built)
    assert not warned
    assert_same_bits(other, model)


def trained_three_times(folder, kind=RMSprop):
    """Return a model, and a file of it after one of its epochs."""
    model = dense_model(kind(0.1))
    model.fit(*numbers(model), verbose=0)
    save(model, folder / "first.weights.h5")
    model.fit(*numbers(model), epochs=2, verbose=0)
    return model, folder / "first.weights.h5"


@pytest.mark.tensorflow("`tf.train.Checkpoint`")
def test_a_checkpoint_restored_after_a_file_was_loaded_wins(tmp_path):
    model, first = trained_three_times(tmp_path)
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(
        str(tmp_path / "checkpoint")
    )
    other = dense_model(RMSprop(0.1))
    other.load_weights(first)
    tf.train.Checkpoint(model=other, optimizer=other.optimizer).restore(path)
    build(other)
    assert_same_bits(other, model)


class WithNorms(RMSprop):
    """Has a variable of its own for each of the model's, all of one name."""

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self.norms = [self.add_variable((), name="norm") for _ in variables]

    def update_step(self, gradient, variable, learning_rate):
        norm = self.norms[self._get_variable_index(variable)]
        norm.assign_add(keras.ops.sum(gradient))
        super().update_step(gradient, variable, learning_rate)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("built", [True, False])
def test_the_last_of_two_files_wins_and_variables_of_one_name_are_apart(
    tmp_path, built
):
    model, first = trained_three_times(tmp_path, WithNorms)
    save(model, tmp_path / "last.weights.h5")
    other = dense_model(WithNorms(0.1))
    other.load_weights(first)
    if built:
        build(other)
    other.load_weights(tmp_path / "last.weights.h5")
    build(other)
    assert len({float(norm.numpy()) for norm in model.optimizer.norms}) > 1
    assert_same_bits(other, model)


def test_a_file_saved_before_any_step_has_the_learning_rate(tmp_path):
    path = tmp_path / "m.weights.h5"
    save(dense_model(RMSprop(0.5)), path)
    model = dense_model(RMSprop(0.25))
    with user_warnings() as warned:
        model.load_weights(path)
        build(model)
    assert not warned
    assert model.optimizer.learning_rate.numpy() == 0.5
