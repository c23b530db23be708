"""The native step on PyTorch: against the rule, and where it must not go."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import BACKEND, arrays, python, tensor
from test_torch import OPTIONS, made, steps

pytestmark = pytest.mark.skipif(BACKEND != "torch", reason="only on PyTorch")

if BACKEND == "torch":
    import keras
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from keras_rmsprop import RMSprop, rule
    from keras_rmsprop.backends import torch as torch_backend
    from keras_rmsprop.codecs import Blockwise, Draw
    from keras_rmsprop.kernel import torch as kernel
    from keras_rmsprop.rule import Slots
    from keras_rmsprop.update import Constants, Update, update_in_turn

    needs_kernel = pytest.mark.skipif(not kernel.library(), reason=kernel.why_not())
    KINDS = kernel.KINDS
else:
    needs_kernel, KINDS = pytest.mark.skip(), [("float32",) * 3]

SIZES = [(), (1,), (0,), (7,), (3, 5), (2, 0, 4), (9001,), (300, 300)]


@pytest.fixture
def calls(monkeypatch):
    """The number of variables in each call of the kernel."""
    calls, update = [], kernel.update
    monkeypatch.setattr(
        kernel, "update", lambda *given: calls.append(len(given[0])) or update(*given)
    )
    return calls


def update_of(shape, kind, options, centered, rng, decay, draw):
    gradient, weights, slots = kind

    def variable(dtype, *, low=False):
        x = rng.normal(size=shape)
        return keras.Variable(np.abs(x) if low else x, dtype=dtype)

    v, m, a = variable(gradient, low=True), None, None
    if options.momentum:
        m = variable(gradient)
    if centered:
        a = variable(gradient)
        a.assign(a * 0.01)
    kept = [v, m, a]
    if slots == "uint8":
        kept = [
            x if x is None else Blockwise().encode(x.value, "uint8", draw, number)
            for number, x in enumerate(kept)
        ]
    kept = [
        x if x is None else keras.Variable(x, dtype=slots, trainable=False)
        for x in kept
    ]
    return Update(
        variable(weights), tensor(rng.normal(size=shape), gradient), Slots(*kept), decay
    )


def copied(updates):
    def copy(v):
        value = v.value.detach().clone()
        return keras.Variable(value, dtype=v.dtype, trainable=v.trainable)

    return [
        one._replace(variable=copy(one.variable), slots=one.slots.map(copy))
        for one in updates
    ]


@needs_kernel
@given(
    kind=st.sampled_from(KINDS),
    shapes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=4),
    rho=st.sampled_from([0.0, 0.9, 0.999]),
    momentum=st.sampled_from([0.0, 0.9]),
    epsilon=st.sampled_from([1e-7, 1.0]),
    flags=st.tuples(*[st.booleans()] * 7),
    decay=st.sampled_from([None, 0.0, 0.01]),
    decoupled=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    share=st.sampled_from([None, 0.0, 0.7]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40)
def test_is_the_rule(
    kind, shapes, rho, momentum, epsilon, flags, decay, decoupled, scale, share, seed
):
    rng = np.random.default_rng(seed)
    *flags, centered = flags
    options = rule.Options(rho, momentum, epsilon, *flags)
    centered = centered and kind[2] != "uint8"
    draw = Draw(tensor(12345, "int32"), tensor(seed % 70_000, "int32"))
    updates = [
        update_of(shape, kind, options, centered, rng, decay, draw) for shape in shapes
    ]
    expected = copied(updates)
    step = Constants(options, 0.01, draw, decoupled, scale, kernel=True)
    followed, old = [], [rng.normal(size=shape) for shape in shapes]
    averages = [keras.Variable(x, dtype=kind[1]) for x in old]
    if share is not None:
        step = step._replace(share=lambda dtype: share)
        both = zip(updates, averages, strict=True)
        updates = [one._replace(average=average) for one, average in both]
    followed, others = torch_backend._update_by_kernel(updates, step)
    assert not others
    update_in_turn(expected, step, in_one_program=False)
    follow = share is not None and kind[0] == kind[1]
    assert list(map(id, followed)) == list(map(id, averages if follow else []))
    for one, average, x in zip(updates, averages, old, strict=True):
        if follow:
            want = share * x + (1 - share) * numbers(one.variable)
            np.testing.assert_allclose(numbers(average), want, rtol=1e-5, atol=1e-6)
    rtol = {"float16": 2e-3, "bfloat16": 2e-2}.get(kind[1], 1e-6)
    rtol = 1e-13 if {*kind} == {"float64"} else rtol

    def assert_near(got, want, rtol):
        # PyTorch's roots are off by a bit, and then numbers are added up.
        atol = rtol * np.abs(want).max(initial=0)
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)

    for mine, theirs in zip(updates, expected, strict=True):
        assert_near(numbers(mine.variable), numbers(theirs.variable), rtol)
        for got, want in zip(mine.slots, theirs.slots, strict=True):
            if got is None:
                continue
            got, want = numbers(got), numbers(want)
            if kind[0] == kind[2]:
                assert_near(got, want, 1e-13 if kind[0] == "float64" else 1e-6)
            else:  # some are rounded to the other side
                assert (got != want).sum() <= 4 + 0.002 * got.size


def numbers(variable):
    return variable.value.detach().double().numpy()


@needs_kernel
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_an_optimizer_that_uses_it_is_as_exact_as_one_that_does_not(
    dtype, options, calls
):
    found = steps(*made(RMSprop, dtype, **options))
    is_left = dtype == "float64" and options.get("slot_dtype") == "bfloat16"
    assert bool(calls) != is_left
    calls.clear()
    expected = steps(*made(RMSprop, dtype, jit_compile=False, **options))
    assert not calls
    # Where arithmetic is off by a bit, 16 or 8 bits may be rounded to the other side.
    is_narrow = dtype == "bfloat16" or "slot_dtype" in options
    for got, want in zip(found, expected, strict=True):
        is_off = np.abs(got - want) > 1e-5 * np.abs(want) + 1e-6
        assert is_off.sum() <= (2 + 0.001 * got.size if is_narrow else 0)


@needs_kernel
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9, "cautious": True, "global_clipnorm": 1.0}],
    ids=str,
)
def test_threads_share_large_ones_and_change_nothing(options):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            shapes = [(1300, 1300), (7,), (2**20,)]
            found.append(steps(*made(RMSprop, shapes=shapes, **options), number=2))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


@needs_kernel
def test_a_graph_that_holds_the_old_weights_says_so():
    [weights], optimizer = made(RMSprop, shapes=[(5,)])
    loss = (weights.value**2).sum()
    optimizer.apply([tensor(np.ones(5))], [weights])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_kernel
def test_a_graph_that_holds_old_slots_or_averages_says_so():
    [weights], optimizer = made(RMSprop, shapes=[(5,)], use_ema=True)
    held = [optimizer._velocities[0], optimizer._model_variables_moving_average[0]]
    for variable in held:
        x = torch.ones(5, requires_grad=True)
        loss = (x * variable.value).sum()
        optimizer.apply([tensor(np.ones(5))], [weights])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@needs_kernel
def test_gradients_come_as_they_like(calls):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 6)).astype("float32")
    ways = {
        "transposed": torch.tensor(x.T.copy()).T,
        "every second": torch.tensor(np.repeat(x, 2, 1))[:, ::2],
        "negated": torch._neg_view(torch.tensor(-x)),
        "with a graph": torch.tensor(x, requires_grad=True) * 1,
        "a parameter": torch.nn.Parameter(torch.tensor(x)),
        "in half": torch.tensor(x, dtype=torch.float16),
        "NumPy": x,
    }
    for name, gradient in ways.items():
        [one], optimizer = made(RMSprop, shapes=[(4, 6)])
        optimizer.apply([gradient], [one])
        [twin], builtin = made(keras.optimizers.RMSprop, shapes=[(4, 6)])
        builtin.apply([torch.tensor(x)], [twin])
        np.testing.assert_allclose(
            numbers(one), numbers(twin), rtol=1e-3 if "half" in name else 1e-6
        )
    assert sum(calls) >= len(ways) - 1


@needs_kernel
@pytest.mark.parametrize("what", ["weights", "slot"])
@pytest.mark.parametrize("how", ["transposed", "expanded", "strided"])
def test_what_does_not_lie_in_a_row_takes_the_other_way(what, how, calls):
    def laid_out(x):
        if how == "transposed":
            return x.T.contiguous().T
        if how == "strided":
            return torch.stack([x, x], -1).reshape(4, 12)[:, ::2]
        return x[:1].clone().expand(4, 6) if what == "slot" else x.T.contiguous().T

    [one], optimizer = made(RMSprop, shapes=[(4, 6)])
    [twin], builtin = made(keras.optimizers.RMSprop, shapes=[(4, 6)])
    place = one if what == "weights" else optimizer.variables[-1]
    place._value.data = laid_out(place._value.data)
    gradient = tensor(arrays([(4, 6)], seed=1)[0])
    if how == "expanded" and what == "slot":
        # As PyTorch says of it itself.
        with pytest.raises(RuntimeError, match="more than one element"):
            optimizer.apply([gradient], [one])
    else:
        optimizer.apply([gradient], [one])
        builtin.apply([gradient], [twin])
        np.testing.assert_allclose(numbers(one), numbers(twin), rtol=1e-6)
    assert not calls


@needs_kernel
def test_a_gradient_of_zeros_without_memory(calls):
    [one], optimizer = made(RMSprop, shapes=[(4, 6)], global_clipnorm=1.0)
    before = numbers(one)
    optimizer.apply([torch._efficientzerotensor(4, 6)], [one])
    np.testing.assert_array_equal(numbers(one), before)
    assert not calls


@needs_kernel
def test_sparse_gradients_are_told_of_by_pytorch(calls):
    [one], optimizer = made(RMSprop, shapes=[(4, 6)], global_clipnorm=1.0)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Ss]parse"):
        optimizer.apply([tensor(np.ones((4, 6))).to_sparse()], [one])
    assert not calls


@needs_kernel
def test_a_place_that_is_too_small_is_not_written_to(calls):
    [one], optimizer = made(RMSprop, shapes=[(4, 6)])
    optimizer.variables[-1]._value.data = torch.zeros(1)
    with pytest.raises(RuntimeError, match="doesn't match"):  # as PyTorch says
        optimizer.apply([tensor(np.ones((4, 6)))], [one])
    assert not calls


@needs_kernel
@pytest.mark.parametrize("shift", [0, 2])
def test_variables_that_overlap_are_stepped_one_after_the_other(shift):
    found = []
    for kind in (RMSprop, keras.optimizers.RMSprop):
        variables, optimizer = made(kind, shapes=[(5,), (5 - shift,)], use_ema=True)
        first, second = variables
        second._value.data = first._value.data[shift:]
        for _ in range(3):
            grads = [np.ones(5), -0.5 * np.ones(5 - shift)]
            optimizer.apply(list(map(tensor, grads)), variables)
        averages = optimizer._model_variables_moving_average
        found.append(np.concatenate([numbers(v) for v in (first, *averages)]))
    np.testing.assert_allclose(*found, rtol=1e-6)


@needs_kernel
def test_who_counts_operations_sees_them(calls):
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    variables, optimizer = made(RMSprop)
    seen = []
    with Names():
        steps(variables, optimizer, number=1)
    assert any("sqrt" in name for name in seen)
    assert not calls


@needs_kernel
def test_while_pytorch_traces_it_sees_operations(calls):
    [one], optimizer = made(RMSprop, shapes=[(3,)])
    one.value.requires_grad_(False)

    def step(gradient):
        optimizer.apply([gradient], [one])
        return gradient * 2

    torch.jit.trace(step, (torch.ones(3),), check_trace=False)
    assert not calls


@needs_kernel
@pytest.mark.parametrize("decoupled", [True, False])
def test_weights_that_are_not_finite(decoupled):
    found = []
    for jit_compile in ("auto", False):
        options = {"weight_decay": 0.1, "decoupled_weight_decay": decoupled}
        variables, optimizer = made(
            RMSprop, shapes=[(3,), (2,)], jit_compile=jit_compile, **options
        )
        optimizer.exclude_from_weight_decay(var_list=variables[1:])
        variables[0].assign([np.inf, np.nan, 1.0])
        optimizer.apply([tensor(np.ones(v.shape)) for v in variables], variables)
        found.append([numbers(v) for v in (*variables, *optimizer._velocities)])
    for got, want in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


@needs_kernel
def test_a_correction_that_tensors_could_compute_is_no_error():
    assert kernel._correction(0.9, 3) == pytest.approx(1 - 0.9**3)
    assert kernel._correction(0.9, -(2.0**31)) == -np.inf
    assert np.isnan(kernel._correction(-0.1, 3))


@needs_kernel
def test_within_a_transform_of_functions_all_is_as_without_it():
    [weights], optimizer = made(RMSprop, shapes=[(3,)])
    state = [v.value for v in optimizer.variables]

    def stepped(gradient):
        [new], _ = optimizer.stateless_apply(state, [gradient], [weights.value])
        return new

    gradients = tensor(arrays([(4, 3)])[0])
    found = torch.func.vmap(stepped)(gradients).detach().numpy()
    for got, gradient in zip(found, gradients, strict=True):
        np.testing.assert_allclose(got, stepped(gradient).detach().numpy(), rtol=1e-6)


@needs_kernel
def test_tensors_of_inference():
    with torch.inference_mode():
        [weights], optimizer = made(RMSprop, shapes=[(3,)])
        before = numbers(weights)
        optimizer.apply([tensor(np.ones(3))], [weights])
        assert not np.array_equal(numbers(weights), before)


@needs_kernel
def test_threads_with_models_of_their_own():
    sets = [made(RMSprop, shapes=[(400, 400), (7,)], momentum=0.5) for _ in range(5)]

    def run(i):
        variables, optimizer = sets[i]
        for _ in range(20):
            optimizer.apply([tensor(np.ones(v.shape)) for v in variables], variables)
        found[i] = [numbers(v) for v in variables]

    found = {}
    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    run(4)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        for got, want in zip(found[i], found[4], strict=True):
            np.testing.assert_array_equal(got, want)


@needs_kernel
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_norm(dtype):
    x = [torch.tensor(a, dtype=getattr(torch, dtype)) for a in arrays(SIZES)]
    expected = float(sum((a.double() ** 2).sum() for a in [*x, x[-1]])) ** 0.5
    np.testing.assert_allclose(kernel.norm([*x, x[-1].T]), expected, rtol=1e-12)
    for bad in (np.nan, np.inf, -np.inf):
        x[3][2] = bad
        assert not np.isfinite(kernel.norm(x))
    assert kernel.norm([x[0], x[1].half()]) is None
    assert kernel.norm([]) is None


@needs_kernel
def test_a_norm_in_a_step_as_a_function_has_a_derivative():
    found = []
    for jit_compile in ("auto", False):
        [weights], optimizer = made(
            RMSprop, shapes=[(5,)], global_clipnorm=0.5, jit_compile=jit_compile
        )
        gradient = torch.arange(1.0, 6.0, requires_grad=True)
        state = [v.value for v in optimizer.variables]
        [new], _ = optimizer.stateless_apply(state, [gradient], [weights.value])
        (new**2).sum().backward()
        found.append(gradient.grad.numpy())
    assert np.all(found[1] != 0)
    np.testing.assert_allclose(*found, rtol=1e-5)


@needs_kernel
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_norm_that_is_not_finite_does_what_it_does_without(bad):
    found = []
    for jit_compile in ("auto", False):
        variables, optimizer = made(
            RMSprop, shapes=[(3,), (2,)], global_clipnorm=1.0, jit_compile=jit_compile
        )
        optimizer.apply([tensor([1.0, bad, 1.0]), tensor([1.0, 1.0])], variables)
        found.append(np.concatenate([numbers(v) for v in variables]))
    np.testing.assert_array_equal(*map(np.isnan, found))


@needs_kernel
def test_explains():
    _, optimizer = made(RMSprop)
    text = " ".join(optimizer.explain().split())
    assert "6 by the native kernel (all in one call)" in text


def test_without_it_all_works_and_explain_says_why():
    program = """
        import keras, numpy as np
        from keras_rmsprop import RMSprop
        v = keras.Variable(np.ones(5))
        optimizer = RMSprop(0.01)
        optimizer.apply([np.ones(5, "float32")], [v])
        print(float(v.value[0]))
        print(optimizer.explain())
    """
    out = python(program, KERAS_RMSPROP_KERNEL="0")
    assert float(out.split()[0]) == pytest.approx(1 - 0.01 / 0.1**0.5, rel=1e-5)
    assert "native kernel" not in out
    assert "No kernel: KERAS_RMSPROP_KERNEL is 0" in out
