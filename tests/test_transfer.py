"""Optimizer state from other frameworks and back; runs that go on elsewhere."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import arrays, assert_close, loop, tensor
from test_dialects import peer, timm_rmsprop

from keras_rmsprop import RMSprop, dialects, transfer
from keras_rmsprop.rule import Slots

LR, BATCHES = 0.01, 600


def batch(n):
    rng = np.random.default_rng(n)
    x = rng.normal(size=(16, 8)).astype("float32")
    return x, np.sin(x.sum(1, keepdims=True)).astype("float32")


def keras_model():
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(16, "tanh"), keras.layers.Dense(1)]
    )
    start = arrays([v.shape for v in model.trainable_variables], seed=7)
    model.set_weights([0.3 * a for a in start])
    return model


def train(model, optimizer, steps):
    """Train in a loop of one's own; return the loss of each step."""
    step = loop(model, optimizer)
    return [float(step(*batch(n))) for n in steps]


class Torch:
    """The same model in PyTorch."""

    MAPPING = ((0, transfer.LINEAR), 1, (2, transfer.LINEAR), 3)

    def __init__(self, model, **options):
        self.torch = peer("torch")
        nn = self.torch.nn
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        self.optimizer = self.torch.optim.RMSprop(
            self.model.parameters(), LR, **options
        )
        self.set_weights(model)

    def set_weights(self, model):
        with self.torch.no_grad():
            for p, w in zip(self.model.parameters(), model.get_weights(), strict=True):
                p.copy_(self.torch.tensor(w.T))

    def give_weights(self, model):
        model.set_weights([p.detach().numpy().T for p in self.model.parameters()])

    def train(self, steps):
        losses = []
        for n in steps:
            x, y = map(self.torch.tensor, batch(n))
            self.optimizer.zero_grad()
            loss = ((self.model(x) - y) ** 2).mean()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses


OPTIONS = {
    "defaults": {},
    "all slots": {"momentum": 0.5, "centered": True, "eps": 1e-3},
}
FIRST, SECOND = range(BATCHES // 2), range(BATCHES // 2, BATCHES)


@pytest.mark.peers
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_run_goes_on_from_torch_and_back(options):
    expected = Torch(keras_model(), **options).train(range(BATCHES))
    theirs, mine = Torch(keras_model(), **options), keras_model()
    theirs.train(FIRST)
    theirs.give_weights(mine)
    optimizer = dialects.torch(LR, **options)
    optimizer.build(mine.trainable_variables)
    state_dict = theirs.optimizer.state_dict()
    transfer.from_torch(optimizer, state_dict, Torch.MAPPING)
    assert optimizer.iterations.numpy() == len(FIRST)
    half = SECOND[: len(SECOND) // 2]
    losses = train(mine, optimizer, half)
    # And back, into a new PyTorch optimizer.
    again = Torch(mine, **options)
    again.optimizer.load_state_dict(
        transfer.to_torch(optimizer, again.optimizer.state_dict(), Torch.MAPPING)
    )
    losses += again.train(SECOND[len(half) :])
    np.testing.assert_allclose(losses, expected[len(FIRST) :], rtol=1e-4)


@pytest.mark.peers
def test_a_sum_of_updates_without_the_learning_rate_becomes_one_with_it():
    options = {"momentum": 0.5, "alpha": 0.9, "eps": 1e-3}
    theirs, mine = Torch(keras_model(), **options), keras_model()
    theirs.train(FIRST)
    theirs.give_weights(mine)
    optimizer = RMSprop(
        LR, rho=0.9, momentum=0.5, epsilon=1e-3, epsilon_inside_sqrt=False
    )
    optimizer.build(mine.trainable_variables)
    transfer.from_torch(optimizer, theirs.optimizer.state_dict(), Torch.MAPPING)
    losses = train(mine, optimizer, SECOND)
    np.testing.assert_allclose(losses, theirs.train(SECOND), rtol=1e-4)


@pytest.mark.peers
def test_names_of_torch_parameters():
    theirs, mine = Torch(keras_model()), keras_model()
    named = theirs.torch.optim.RMSprop(theirs.model.named_parameters(), LR)
    theirs.optimizer = named
    theirs.train(range(3))
    optimizer = dialects.torch(LR)
    optimizer.build(mine.trainable_variables)
    mapping = [
        ("0.weight", transfer.LINEAR),
        "0.bias",
        ("2.weight", transfer.LINEAR),
        "2.bias",
    ]
    transfer.from_torch(optimizer, named.state_dict(), mapping)
    [*parameters] = theirs.model.parameters()
    expected = named.state[parameters[0]]["square_avg"].numpy().T
    np.testing.assert_array_equal(optimizer.get_state().slots[0].velocity, expected)


@pytest.mark.peers
@pytest.mark.parametrize("layout", ["list", "dict"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_run_goes_on_from_optax(nesterov, layout):
    jax, optax = peer("jax"), peer("optax")
    options = {"momentum": 0.5, "bias_correction": True, "centered": True, "eps": 1e-3}
    their_optimizer = optax.rmsprop(LR, **options, nesterov=nesterov)
    mine = keras_model()
    w = [jax.numpy.asarray(x) for x in mine.get_weights()]
    mapping = None
    if layout == "dict":
        w = {"a": {"kernel": w[0], "bias": w[1]}, "b": {"kernel": w[2], "bias": w[3]}}
        mapping = ["a/kernel", "a/bias", "b/kernel", "b/bias"]

    def flat(w):
        if isinstance(w, list):
            return w
        return [w[i][j] for i in ("a", "b") for j in ("kernel", "bias")]

    @jax.jit
    def step(w, state, x, y):
        def loss(w):
            a, b, c, d = flat(w)
            return ((jax.numpy.tanh(x @ a + b) @ c + d - y) ** 2).mean()

        value, gradients = jax.value_and_grad(loss)(w)
        updates, state = their_optimizer.update(gradients, state)
        return optax.apply_updates(w, updates), state, value

    state, expected = their_optimizer.init(w), []
    for n in range(BATCHES):
        if n == len(FIRST):
            mine.set_weights([np.asarray(x) for x in flat(w)])
            optimizer = dialects.optax(LR, **options, nesterov=nesterov)
            optimizer.build(mine.trainable_variables)
            transfer.from_optax(optimizer, state, mapping)
        w, state, loss = step(w, state, *batch(n))
        expected.append(float(loss))
    assert optimizer.iterations.numpy() == len(FIRST)
    losses = train(mine, optimizer, SECOND)
    np.testing.assert_allclose(losses, expected[len(FIRST) :], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.5, "centered": True, "epsilon": 1e-3}], ids=repr
)
def test_a_run_goes_on_from_the_builtin_and_back(options):
    def builtin():
        return keras.optimizers.RMSprop(LR, **options)

    model = keras_model()
    expected = train(model, builtin(), range(BATCHES))
    model, theirs = keras_model(), builtin()
    train(model, theirs, FIRST)
    optimizer = RMSprop(LR, **options)
    optimizer.build(model.trainable_variables)
    transfer.from_keras(optimizer, theirs)
    half = SECOND[: len(SECOND) // 2]
    losses = train(model, optimizer, half)
    theirs = builtin()
    theirs.build(model.trainable_variables)
    transfer.to_keras(optimizer, theirs)
    assert theirs.iterations.numpy() == len(FIRST) + len(half)
    losses += train(model, theirs, SECOND[len(half) :])
    np.testing.assert_allclose(losses, expected[len(FIRST) :], rtol=1e-4)


@pytest.mark.peers
def test_a_state_of_timm_and_back():
    # timm's sum of updates has the learning rate in it, and says so in its groups.
    theirs, mine = Torch(keras_model()), keras_model()
    options = {"momentum": 0.5, "alpha": 0.9, "eps": 1e-3}
    theirs.optimizer = timm_rmsprop()(theirs.model.parameters(), LR, **options)
    theirs.train(FIRST)
    theirs.give_weights(mine)
    optimizer = dialects.timm(LR, **options)
    optimizer.build(mine.trainable_variables)
    before = theirs.optimizer.state_dict()
    transfer.from_torch(optimizer, before, Torch.MAPPING)
    after = transfer.to_torch(optimizer, before, Torch.MAPPING)
    for number, state in before["state"].items():
        for name in ("square_avg", "momentum_buffer"):
            got, want = after["state"][number][name], state[name]
            np.testing.assert_array_equal(got.numpy(), want.numpy())
    losses = train(mine, optimizer, SECOND)
    np.testing.assert_allclose(losses, theirs.train(SECOND), rtol=1e-4)


@pytest.mark.peers
def test_optax_without_momentum_and_what_is_not_rmsprop():
    optax, jax = peer("optax"), peer("jax")
    weights = [jax.numpy.ones(s) for s in ((3, 2), (2,))]
    state = optax.rmsprop(LR, momentum=0.0).init(weights)
    transfer.from_optax(built(), state)
    with pytest.raises(ValueError, match="must be the state of `optax"):
        transfer.from_optax(built(centered=True), optax.adam(LR).init(weights))


def test_a_sum_of_updates_is_converted_at_the_learning_rate_of_its_step():
    variables = [keras.Variable(a) for a in arrays([(3, 2), (2,)])]
    theirs = keras.optimizers.RMSprop(0.5, momentum=0.5)
    for seed in range(3):
        theirs.apply([*map(tensor, arrays([(3, 2), (2,)], seed=seed))], variables)
    optimizer = built(learning_rate=0.25, momentum=0.5, lr_in_momentum=False)
    transfer.from_keras(optimizer, theirs)
    got = optimizer.get_state().slots[0].momentum
    np.testing.assert_allclose(got, theirs.variables[4].numpy() / 0.5, rtol=1e-6)
    again = keras.optimizers.RMSprop(0.5, momentum=0.5)
    again.build(variables)
    transfer.to_keras(optimizer, again)
    for a, b in zip(again.variables, theirs.variables, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-6)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_from_a_tensorflow_v1_checkpoint(tmp_path, momentum, centered):
    shapes, options = [(4, 3), (5,)], {"momentum": momentum, "centered": centered}
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        theirs = [
            tf.compat.v1.get_variable(name, initializer=a)
            for name, a in zip(
                ["dense/kernel", "dense/bias"], arrays(shapes), strict=True
            )
        ]
        step = tf.compat.v1.train.get_or_create_global_step()
        slots = tf.compat.v1.train.RMSPropOptimizer(LR, epsilon=1e-3, **options)
        gradients = [tf.compat.v1.placeholder("float32", s) for s in shapes]
        update = slots.apply_gradients(zip(gradients, theirs, strict=True), step)
        session.run(tf.compat.v1.global_variables_initializer())

        def run(seeds):
            for seed in seeds:
                feed = zip(gradients, arrays(shapes, seed=seed), strict=True)
                session.run(update, dict(feed))
            return session.run(theirs)

        middle = run(range(1, 10))
        path = tf.compat.v1.train.Saver().save(session, str(tmp_path / "model.ckpt"))
        expected = run(range(10, 20))
    variables = [
        keras.Variable(w, name=n)
        for w, n in zip(middle, ["kernel", "bias"], strict=True)
    ]
    optimizer = dialects.tensorflow_v1(LR, epsilon=1e-3, **options)
    optimizer.build(variables)
    with pytest.raises(ValueError, match="must be one of"):
        transfer.from_tensorflow_v1(optimizer, path)  # there they have longer names
    transfer.from_tensorflow_v1(optimizer, path, ["dense/kernel", "dense/bias"])
    assert optimizer.iterations.numpy() == 9
    for seed in range(10, 20):
        optimizer.apply([tensor(g) for g in arrays(shapes, seed=seed)])
    assert_close([v.numpy() for v in variables], expected, 1e-5)


def built(shapes=((3, 2), (2,)), **options):
    optimizer = RMSprop(**options)
    optimizer.build([keras.Variable(a) for a in arrays(shapes)])
    return optimizer


def state_dict(shapes=((2, 3), (2,)), **more):
    states = {
        i: {"step": 3, "square_avg": np.ones(shape)} | more
        for i, shape in enumerate(shapes)
    }
    group = {"lr": 0.1, "params": [0, 1], "param_names": ["weight", "bias"]}
    return {"state": states, "param_groups": [group]}


FITS = [("weight", (1, 0)), "bias"]


@pytest.mark.parametrize(
    ("optimizer", "given", "mapping", "message"),
    [
        ({}, {}, ["weight", "bias"], r"expected shape \(3, 2\), received \(2, 3\)"),
        ({}, {}, ["weight"], "an entry for each of the 2 variables"),
        ({}, {}, ["weight", "weight"], "once. Received: 'weight'"),
        ({}, {}, [("kernel", (1, 0)), "bias"], "must be one of"),
        ({}, {}, [("weight", (0, 2)), "bias"], "must be those of an array of shape"),
        ({"momentum": 0.5}, {}, FITS, "`momentum` of .* received None"),
        ({}, {"grad_avg": np.ones(2)}, FITS, "`average_gradient` of .* shape None"),
        ({"learning_rate": 0.1}, {"shapes": [(2, 3), (3,)]}, FITS, r"received \(3,\)"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_changed(
    optimizer, given, mapping, message
):
    optimizer = built(**optimizer)
    before = [v.numpy() for v in optimizer.variables]
    if "grad_avg" in given:
        theirs = state_dict()
        theirs["state"][1] |= given
    else:
        theirs = state_dict(**given)
    with pytest.raises(ValueError, match=message):
        transfer.from_torch(optimizer, theirs, mapping)
    for variable, value in zip(optimizer.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_a_parameter_left_out_is_named():
    optimizer = built([(3, 2)])
    with pytest.raises(ValueError, match="It leaves out: 'bias'"):
        transfer.from_torch(optimizer, state_dict(), [("weight", (1, 0))])


def test_a_parameter_that_had_no_step_starts_fresh():
    optimizer = built(initial_accumulator_value=0.5)
    theirs = state_dict()
    del theirs["state"][1]
    transfer.from_torch(optimizer, theirs, FITS)
    v = [s.velocity for s in optimizer.get_state().slots]
    np.testing.assert_array_equal(v[0], np.ones((3, 2)))
    np.testing.assert_array_equal(v[1], [0.5, 0.5])


def test_an_optimizer_must_be_built():
    with pytest.raises(ValueError, match="must be built"):
        transfer.from_torch(RMSprop(), state_dict(), FITS)


def test_a_builtin_of_another_kind_is_refused():
    theirs = keras.optimizers.RMSprop(momentum=0.5)
    theirs.build([keras.Variable(a) for a in arrays([(3, 2), (2,)])])
    with pytest.raises(ValueError, match="`momentum` of"):
        transfer.to_keras(built(), theirs)
    theirs.variables[4].assign(np.ones((3, 2)))
    with pytest.raises(ValueError, match="`momentum` of"):
        transfer.from_keras(built(), theirs)
    with pytest.raises(ValueError, match="`builtin` must be"):
        transfer.from_keras(built(), keras.optimizers.Adam())


def test_a_checkpoint_that_is_none_is_refused(tmp_path):
    (tmp_path / "junk.index").write_bytes(b"junk")
    for name in ["missing", "junk"]:
        with pytest.raises(ValueError, match="must be the path of a TensorFlow"):
            transfer.from_tensorflow_v1(built(), str(tmp_path / name))


def test_a_state_of_something_else_is_refused():
    pytest.importorskip("jax")
    with pytest.raises(ValueError, match="must be the state of `optax"):
        transfer.from_optax(built(), ({"count": 1},))


class TestState:
    @pytest.mark.tensorflow("`tf.Variable`")
    def test_of_tensorflow_variables(self):
        optimizer = RMSprop()
        optimizer.apply([tensor([1.0])], [tf.Variable([1.0], name="w")])
        state = optimizer.get_state()
        assert state.paths == ["w:0"]
        optimizer.set_state(state)

    @pytest.mark.tensorflow("`tf.distribute`")
    def test_under_a_strategy(self):
        strategy = tf.distribute.MirroredStrategy(["cpu:0"])
        with strategy.scope():
            optimizer = built()
        assert optimizer.get_state().iterations == 0

    def test_what_is_no_number_changes_nothing(self):
        optimizer = built()
        state = optimizer.get_state()
        wrong = [Slots(s.velocity + 1) for s in state.slots[:1]]
        wrong += [Slots(np.full(2, "x"))]
        with pytest.raises(ValueError, match="expected real numbers, received <U1"):
            optimizer.set_state(state._replace(slots=wrong))
        for now, before in zip(optimizer.get_state().slots, state.slots, strict=True):
            np.testing.assert_array_equal(now.velocity, before.velocity)

    def test_slots_in_bfloat16_are_float32_in_it(self):
        optimizer = built(slot_dtype="bfloat16")
        state = optimizer.get_state()
        assert {s.velocity.dtype for s in state.slots} == {np.dtype("float32")}
        optimizer.set_state(state)

    @pytest.mark.tensorflow("sparse gradients")
    def test_silent_rows_are_up_to_date_in_it(self):
        table = keras.Variable(np.ones((3, 2), "float32"))
        optimizer, twin = RMSprop(rho=0.5), keras.optimizers.RMSprop(rho=0.5)
        dense = keras.Variable(np.ones((3, 2), "float32"))
        for row in [0, 1, 1, 2]:
            slices = tf.IndexedSlices([[1.0, 2.0]], [row], [3, 2])
            optimizer.apply([slices], [table])
            twin.apply([tf.convert_to_tensor(slices)], [dense])
        velocity = optimizer.get_state().slots[0].velocity
        assert_close([velocity], [twin.variables[2].numpy()], 1e-6)

    @pytest.mark.tensorflow("sparse gradients")
    def test_taken_over_it_resets_the_clocks(self):
        table = keras.Variable(np.ones((3, 1), "float32"))
        optimizer = RMSprop(rho=0.5)
        for row in [0, 1, 1]:
            optimizer.apply([tf.IndexedSlices([[1.0]], [row])], [table])
        state = optimizer.get_state()
        optimizer.set_state(state)
        for got, want in zip(optimizer.get_state().slots, state.slots, strict=True):
            np.testing.assert_array_equal(got.velocity, want.velocity)
        assert optimizer._clocks[0].updates.numpy() == 0

    def test_accumulation_begins_anew(self):
        options = {"gradient_accumulation_steps": 2, "learning_rate": 0.1}
        variable, optimizer = keras.Variable([1.0]), RMSprop(**options)
        for _ in range(3):
            optimizer.apply([tensor([1.0])], [variable])
        state = optimizer.get_state()
        assert state.iterations == 1
        optimizer.set_state(state._replace(iterations=5))
        assert int(optimizer.iterations) == 5
        before = variable.numpy()
        optimizer.apply([tensor([1.0])])
        np.testing.assert_array_equal(variable.numpy(), before)
        v = state.slots[0].velocity
        optimizer.apply([tensor([3.0])])
        expected = 0.9 * v + 0.1 * 2.0**2
        np.testing.assert_allclose(
            optimizer.get_state().slots[0].velocity, expected, rtol=1e-6
        )

    def test_slots_of_another_number_of_variables(self):
        optimizer = built()
        state = optimizer.get_state()
        with pytest.raises(ValueError, match=r"slots for 2 variables\. Received: .* 3"):
            optimizer.set_state(state._replace(slots=[*state.slots, Slots(1.0)]))
