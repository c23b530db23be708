"""Hyperparameters and slots survive every way to save them."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_models import no_fit_of_other_layers
from stepping import python, tensor

from keras_rmsprop import RMSprop

OPTIONS = {"learning_rate": 0.02, "rho": 0.8, "momentum": 0.5, "centered": True}


def trained(optimizer, steps=3):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="dense")])
    model.compile(optimizer, loss="mse")
    if steps:
        model.fit(*data(), epochs=steps, verbose=0)
    else:
        optimizer.build(model.trainable_variables)
    return model


def data():
    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    return x, x[:, :2]


def state(model):
    return [v.numpy() for v in model.variables + model.optimizer.variables]


def assert_same_state(model, expected):
    for got, want in zip(state(model), state(expected), strict=True):
        np.testing.assert_array_equal(got, want)


def hyperparameters(optimizer):
    shared = set(keras.optimizers.RMSprop().get_config()) - {"name"}
    return {k: v for k, v in optimizer.get_config().items() if k in shared}


def test_config_round_trip():
    optimizer = RMSprop(**OPTIONS, epsilon=1e-3, clipnorm=2.0, jit_compile=False)
    config = optimizer.get_config()
    assert RMSprop.from_config(config).get_config() == config
    serialized = keras.optimizers.serialize(optimizer)
    assert serialized["registered_name"] == "keras_rmsprop>RMSprop"
    copy = keras.optimizers.deserialize(serialized)
    assert type(copy) is RMSprop
    assert copy.get_config() == config


def test_config_round_trip_with_a_schedule():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 100)
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(RMSprop(schedule)))
    assert float(copy.learning_rate) == np.float32(0.1)


def test_keras_file(tmp_path):
    model = trained(RMSprop(**OPTIONS))
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert type(loaded.optimizer) is RMSprop
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert_same_state(loaded, model)
    for each in (model, loaded):
        each.fit(*data(), shuffle=False, verbose=0)
    assert_same_state(loaded, model)


@pytest.mark.slow
def test_keras_file_in_a_fresh_process(tmp_path):
    model = trained(RMSprop(**OPTIONS))
    model.save(tmp_path / "m.keras")
    out = python(f"""
        import keras, keras_rmsprop
        model = keras.models.load_model({str(tmp_path / "m.keras")!r})
        print(type(model.optimizer) is keras_rmsprop.RMSprop)
        print(float(sum(abs(v.numpy()).sum() for v in model.optimizer.variables)))
    """).split()
    assert out[0] == "True"
    total = sum(np.abs(v.numpy()).sum() for v in model.optimizer.variables)
    assert float(out[1]) == pytest.approx(float(total), rel=1e-6)


def test_weights_file(tmp_path):
    model = trained(RMSprop(**OPTIONS))
    model.save_weights(tmp_path / "m.weights.h5")
    other = trained(RMSprop(**OPTIONS), steps=1)
    other.load_weights(tmp_path / "m.weights.h5")
    for got, want in zip(other.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (RMSprop, RMSprop),
        (RMSprop, keras.optimizers.RMSprop),
        (keras.optimizers.RMSprop, RMSprop),
    ],
    ids=["own", "to the built-in", "from the built-in"],
)
class TestStateMoves:
    @pytest.mark.one_in(3)
    def test_in_a_keras_file(self, tmp_path, source, target):
        model = trained(source(**OPTIONS))
        model.save(tmp_path / "m.keras")
        other = trained(target(**OPTIONS), steps=0)
        other.load_weights(tmp_path / "m.keras")
        assert_same_state(other, model)

    @pytest.mark.one_in(6)
    @pytest.mark.tensorflow("`tf.train.Checkpoint`")
    def test_in_a_checkpoint(self, tmp_path, source, target):
        model = trained(source(**OPTIONS))
        path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(
            str(tmp_path / "ckpt")
        )
        other = trained(target(**OPTIONS), steps=int(target is RMSprop))
        checkpoint = tf.train.Checkpoint(model=other, optimizer=other.optimizer)
        checkpoint.restore(path).assert_existing_objects_matched()
        assert_same_state(other, model)
        assert other.optimizer.iterations.numpy() == 3

    @pytest.mark.one_in(9)
    def test_as_a_loaded_model_compiled_anew(self, tmp_path, source, target):
        model = trained(source(**OPTIONS))
        model.save(tmp_path / "m.keras")
        loaded = keras.models.load_model(tmp_path / "m.keras")
        optimizer = target(**OPTIONS)
        optimizer.build(loaded.trainable_variables)
        optimizer.set_weights([v.numpy() for v in loaded.optimizer.variables])
        loaded.compile(optimizer, loss="mse")
        assert_same_state(loaded, model)
        assert hyperparameters(optimizer) == hyperparameters(model.optimizer)


@pytest.mark.tensorflow("`tf.train.Checkpoint`")
def test_checkpoint_restored_before_the_slots_exist(tmp_path):
    model = trained(RMSprop(**OPTIONS))
    path = tf.train.Checkpoint(optimizer=model.optimizer).save(str(tmp_path / "ckpt"))
    optimizer = RMSprop(**OPTIONS)
    tf.train.Checkpoint(optimizer=optimizer).restore(path)
    optimizer.build(model.trainable_variables)
    for got, want in zip(optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(got.numpy(), want.numpy())


@pytest.mark.tensorflow("`tf.train.Checkpoint`")
def test_traced_programs_are_no_part_of_a_checkpoint(tmp_path):
    variable = keras.Variable([1.0])
    optimizer = RMSprop()
    optimizer.apply([tensor([1.0])], [variable])
    names = [
        n
        for n, _ in tf.train.list_variables(
            tf.train.Checkpoint(optimizer=optimizer).save(str(tmp_path / "ckpt"))
        )
    ]
    assert not [n for n in names if "program" in n]


def two_layers(optimizer, units=(3, 2), freeze=False, name=""):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(units[0], name=f"{name}body"),
            keras.layers.Dense(units[1], name=f"{name}head"),
        ]
    )
    model.layers[0].trainable = not freeze
    model.compile(optimizer, loss="mse")
    return model


SAVED = {"learning_rate": 0.02, "momentum": 0.5, "use_ema": True}
FILES = ["m.keras", "m.weights.h5"]


def save(model, path):
    (model.save if path.suffix == ".keras" else model.save_weights)(path)


class TestRestoring:
    """What Keras' optimizers lose."""

    @pytest.mark.one_in(13)
    @pytest.mark.parametrize("file", FILES)
    @pytest.mark.parametrize("source", [RMSprop, keras.optimizers.RMSprop])
    def test_compile_then_load_weights(self, tmp_path, file, source):
        model = two_layers(source(**SAVED))
        model.fit(*data(), epochs=3, verbose=0)
        save(model, tmp_path / file)
        other = two_layers(RMSprop(**SAVED))
        other.load_weights(tmp_path / file)
        if source is RMSprop:
            assert other.optimizer.iterations.numpy() == 3
            for optimizer in (model.optimizer, other.optimizer):
                optimizer.learning_rate = 0.01  # between loading and building
        other.optimizer.build(other.trainable_variables)
        assert_same_state(other, model)

    def test_the_file_of_another_optimizer_leaves_the_learning_rate(self, tmp_path):
        model = two_layers(keras.optimizers.SGD(0.5))
        model.fit(*data(), verbose=0)
        save(model, tmp_path / "m.keras")
        other = two_layers(RMSprop(0.25))
        other.load_weights(tmp_path / "m.keras")
        with pytest.warns(UserWarning, match="Skipping variable loading"):
            other.optimizer.build(other.trainable_variables)
        assert other.optimizer.learning_rate.numpy() == 0.25
        assert other.optimizer.iterations.numpy() == 0

    @pytest.mark.slow
    @pytest.mark.one_in(2)
    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_compile_then_load_weights_then_fit(self, tmp_path, jit_compile):
        path = tmp_path / "m.weights.h5"
        model = two_layers(RMSprop(**SAVED))
        model.jit_compile = jit_compile
        model.fit(*data(), epochs=2, verbose=0)
        save(model, path)
        other = two_layers(RMSprop(**SAVED))
        other.jit_compile = jit_compile
        other.load_weights(path)
        for each in (model, other):
            each.fit(*data(), epochs=2, shuffle=False, verbose=0)
        assert_same_state(other, model)

    @pytest.mark.slow
    @pytest.mark.tensorflow("`tf.function`")
    def test_loaded_and_then_built_inside_a_function(self, tmp_path):
        path = tmp_path / "m.weights.h5"
        model = two_layers(RMSprop(**SAVED))
        model.fit(*data(), epochs=2, verbose=0)
        save(model, path)
        other = two_layers(RMSprop(**SAVED))
        other.load_weights(path)
        gradients = [tf.ones(v.shape) for v in other.trainable_variables]

        @tf.function
        def step():
            other.optimizer.apply(gradients, other.trainable_variables)

        for _ in range(2):  # were it loaded in the graph, this would be twice
            step()
            model.optimizer.apply(gradients, model.trainable_variables)
        for got, want in zip(state(other), state(model), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6)

    @pytest.mark.one_in(6)
    @pytest.mark.parametrize(
        ("file", "built"), [("m.keras", True), ("m.weights.h5", False)]
    )
    @pytest.mark.parametrize(
        ("before", "after", "message"),
        [
            ({}, {"momentum": 0.5}, "fresh: 4 `momentum`. Left out: nothing"),
            ({"momentum": 0.5}, {}, "fresh: nothing. Left out: 4 `momentum`"),
            (
                {"momentum": 0.5},
                {"centered": True},
                "fresh: 4 `average_gradient`. Left out: 4 `momentum`",
            ),
            ({}, {"use_ema": True}, "fresh: 4 `average`. Left out: nothing"),
            ({"use_ema": True}, {}, "fresh: nothing. Left out: 4 `average`"),
        ],
    )
    def test_options_switched_on_and_off(
        self, tmp_path, file, built, before, after, message
    ):
        model = two_layers(RMSprop(0.02, **before))
        model.fit(*data(), epochs=3, verbose=0)
        save(model, tmp_path / file)
        other = two_layers(RMSprop(0.01, **after))
        if built:
            other.fit(*data(), epochs=1, verbose=0)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            other.load_weights(tmp_path / file)
            other.optimizer.build(other.trainable_variables)
        found = [str(w.message) for w in warned if w.category is UserWarning]
        assert len(found) == 1
        assert message in found[0]
        ours, theirs = other.optimizer.get_state(), model.optimizer.get_state()
        assert ours.iterations == theirs.iterations == 3
        for got, want in zip(ours.slots, theirs.slots, strict=True):
            np.testing.assert_array_equal(got.velocity, want.velocity)
            for fresh in got[1:]:
                assert fresh is None or not fresh.any()
        if "use_ema" in after:
            averages = other.optimizer._model_variables_moving_average
            for average, v in zip(averages, other.trainable_variables, strict=True):
                np.testing.assert_array_equal(average.numpy(), v.numpy())

    def test_another_instance_of_the_model_is_known_by_its_weights(self, tmp_path):
        model = two_layers(RMSprop(0.02))
        model.fit(*data(), epochs=3, verbose=0)
        save(model, tmp_path / "m.weights.h5")
        other = two_layers(RMSprop(0.02), name="another_")
        other.load_weights(tmp_path / "m.weights.h5")
        other.optimizer.build(other.trainable_variables)
        assert_same_state(other, model)

    def test_with_other_weights_it_is_matched_by_position(self, tmp_path):
        model = two_layers(RMSprop(0.02))
        model.fit(*data(), epochs=3, verbose=0)
        save(model, tmp_path / "m.weights.h5")
        other = two_layers(RMSprop(0.02), name="another_")
        other.load_weights(tmp_path / "m.weights.h5")
        other.set_weights([w + 1 for w in other.get_weights()])
        with pytest.warns(UserWarning, match="matched by their positions"):
            other.optimizer.build(other.trainable_variables)
        for got, want in zip(
            other.optimizer.variables, model.optimizer.variables, strict=True
        ):
            np.testing.assert_array_equal(got.numpy(), want.numpy())

    def test_layers_in_another_order_are_matched_by_path(self):
        a, b = (keras.Variable(np.ones(2, "float32"), name=n) for n in "ab")
        optimizer, other = RMSprop(), RMSprop()
        optimizer.build([a, b])
        other.build([b, a])
        optimizer.apply([tensor([1.0, 1]), tensor([2.0, 2])])
        other.set_state(optimizer.get_state())
        v = [s.velocity[0] for s in other.get_state().slots]
        np.testing.assert_allclose(v, [0.4, 0.1], rtol=1e-6)

    def test_a_state_of_other_shapes_changes_nothing(self, tmp_path):
        model = two_layers(RMSprop(0.02), units=(5, 2))
        model.fit(*data(), verbose=0)
        optimizer, store = two_layers(RMSprop(0.02)).optimizer, {}
        optimizer.build([keras.Variable(np.ones((4, 3), "float32"))] * 1)
        other = RMSprop(0.02)
        other.build([keras.Variable(np.ones((4, 5), "float32"))])
        other.apply([np.ones((4, 5), "float32")])
        other.save_own_variables(store)
        with pytest.warns(UserWarning, match=r"shape \(4, 3\), received \(4, 5\)"):
            optimizer.load_own_variables(store)
        assert not optimizer.variables[2].numpy().any()

    @no_fit_of_other_layers
    @pytest.mark.one_in(3)
    @pytest.mark.parametrize("jit_compile", [False, True])
    @pytest.mark.parametrize(
        "options", [{}, {"momentum": 0.5, "centered": True, "use_ema": True}], ids=repr
    )
    def test_unfreezing(self, tmp_path, options, jit_compile):
        optimizer = RMSprop(0.02, **options)
        model = two_layers(optimizer, freeze=True)
        model.fit(*data(), epochs=3, verbose=0)
        before = optimizer.get_state()
        model.layers[0].trainable = True
        model.compile(optimizer, loss="mse", jit_compile=jit_compile)
        x, y = data()
        optimizer.learning_rate = 0.0
        weights = model.get_weights()
        model.fit(x, y, epochs=1, verbose=0)
        after = optimizer.get_state()
        assert after.iterations == 4
        assert len(after.slots) == 4
        assert after.paths[2:] == before.paths  # in the model's order
        # The slots of those known went on from where they were: v decays to 0.9 of it.
        for old, new in zip(before.slots, after.slots[2:], strict=True):
            assert (new.velocity >= 0.9 * old.velocity * (1 - 1e-6)).all()
        for got, want in zip(model.get_weights(), weights, strict=True):
            if not options:
                np.testing.assert_array_equal(got, want)
        model.save(tmp_path / "m.keras")
        loaded = keras.models.load_model(tmp_path / "m.keras")
        got, want = loaded.optimizer.get_state(), optimizer.get_state()
        assert [p.split("/")[-2] for p in got.paths] == [*["body"] * 2, *["head"] * 2]
        for slots, expected in zip(got.slots, want.slots, strict=True):
            np.testing.assert_array_equal(slots.velocity, expected.velocity)

    def test_a_step_after_unfreezing_is_that_of_both(self):
        # Against two built-in optimizers, one for each variable.
        a, b = keras.Variable([1.0, 2.0]), keras.Variable([3.0])
        optimizer = RMSprop(0.1, momentum=0.5)
        twins = [keras.Variable(v.numpy()) for v in (a, b)]
        builtins = [keras.optimizers.RMSprop(0.1, momentum=0.5) for _ in twins]
        for n in range(4):
            gradients = [tensor([1.0 + n, -1.0]), tensor([0.5 * n])]
            known = 1 if n < 2 else 2
            optimizer.apply(gradients[:known], [a, b][:known])
            for builtin, g, twin in list(zip(builtins, gradients, twins, strict=True))[
                :known
            ]:
                builtin.apply([g], [twin])
        for got, want in zip((a, b), twins, strict=True):
            np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-6)

    @pytest.mark.tensorflow("sparse gradients")
    def test_unfreezing_a_table(self):
        table, bias = keras.Variable(np.ones((3, 1), "float32")), keras.Variable([1.0])
        twin = keras.Variable(table.numpy())
        optimizer, builtin = RMSprop(0.1), keras.optimizers.RMSprop(0.1)
        optimizer.apply([tensor([1.0])], [bias])
        slices = tf.IndexedSlices([[1.0]], [2], [3, 1])
        for _ in range(2):
            optimizer.apply([slices, tensor([1.0])], [table, bias])
            builtin.apply([tf.convert_to_tensor(slices)], [twin])
        np.testing.assert_allclose(table.numpy(), twin.numpy(), rtol=1e-6)


@pytest.mark.tensorflow("`tf.train.Checkpoint`")
def test_checkpoint_restored_before_a_search_has_its_variables(tmp_path):
    model = trained(RMSprop("auto", momentum=0.5))
    path = tf.train.Checkpoint(optimizer=model.optimizer).save(str(tmp_path / "ckpt"))
    optimizer = RMSprop("auto", momentum=0.5)
    tf.train.Checkpoint(optimizer=optimizer).restore(path)
    optimizer.build(model.trainable_variables)
    pairs = zip(optimizer.variables, model.optimizer.variables, strict=True)
    for got, want in pairs:
        np.testing.assert_array_equal(got.numpy(), want.numpy(), err_msg=got.name)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"use_ema": True}])
def test_velocities_of_a_plain_built_in_are_taken_over(tmp_path, options):
    def model(optimizer):
        made = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        made.compile(optimizer, "mse")
        return made

    x, y = np.ones((4, 3)), np.zeros((4, 2))
    source = model(keras.optimizers.RMSprop())
    source.fit(x, y, verbose=0)
    source.save_weights(tmp_path / "m.weights.h5")
    ours = model(RMSprop(**options))
    ours.optimizer.build(ours.trainable_variables)
    with pytest.warns(UserWarning, match="Started fresh: 2 `"):
        ours.load_weights(tmp_path / "m.weights.h5")
    expected = [v.numpy() for v in source.optimizer._velocities]
    for mine, theirs in zip(ours.optimizer._velocities, expected, strict=True):
        np.testing.assert_array_equal(mine.numpy(), theirs)
    assert int(ours.optimizer.iterations) == 1
