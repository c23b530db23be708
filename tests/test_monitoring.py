"""What the monitor says, against gradients computed by hand."""

import csv

import keras
import numpy as np
import pytest
from small_models import compiled, dense_model, numbers, table_model
from stepping import BACKEND, gradients_of, python

from keras_rmsprop import RMSprop, monitoring
from keras_rmsprop.callbacks import AverageForEvaluation, Monitor


def watched(model, x, y, monitor=None, **options):
    monitor = monitor or Monitor(every=1, show=False)
    options = {"batch_size": len(x), "epochs": 3, "verbose": 0} | options
    history = model.fit(x, y, callbacks=[monitor], **options)
    return monitor, history.history


def test_norms_and_ratios_are_those_of_the_gradients():
    model = dense_model(RMSprop(0.01))
    model.optimizer.build(model.trainable_variables)
    x, y = numbers(model)
    gradients, _ = gradients_of(model, x, y)
    weights = model.get_weights()
    monitor, _ = watched(model, x, y, epochs=1)
    for reading, g, w, now in zip(
        monitor.readings, gradients, weights, model.get_weights(), strict=True
    ):
        g = keras.ops.convert_to_numpy(g)
        assert reading.gradient_norm == pytest.approx(np.linalg.norm(g), rel=1e-4)
        effective = 0.01 / np.sqrt(0.1 * g**2 + 1e-7)
        assert reading.effective_rate == pytest.approx(np.median(effective), rel=1e-4)
        if w.any():
            ratio = np.linalg.norm(now - w) / np.linalg.norm(w)
            assert reading.update_ratio == pytest.approx(ratio, rel=1e-4)


@pytest.mark.slow
def test_it_looks_every_so_many_batches_and_changes_nothing():
    ends = []
    for callbacks in ([], [Monitor(every=3, show=False)]):
        model = dense_model(RMSprop("auto", use_ema=True))
        x, y = numbers(model, batch=32)
        model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=callbacks)
        ends.append([v.numpy() for v in [*model.weights, *model.optimizer.variables]])
    steps = [2, 5, 8] if BACKEND == "tensorflow" else [1, 4, 7]  # built before a step
    assert sorted({r.step for r in callbacks[0].readings}) == steps
    for a, b in zip(*ends, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_averages_that_are_judged_are_not_looked_at():
    seen = []
    for more in ([], [AverageForEvaluation()]):
        model = dense_model(RMSprop(0.1, use_ema=True))
        x, y = numbers(model, batch=32)
        monitor = Monitor(every=1, show=False)
        model.fit(x, y, 32, 4, verbose=0, callbacks=[*more, monitor])
        seen.append(monitor.readings)
    assert len(seen[0]) >= 12
    assert [r[2:] for r in seen[0]] == [r[2:] for r in seen[1]]


def test_by_default_looks_take_a_small_part_of_the_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(monitoring.time, "perf_counter", lambda: now[0])
    monitor = Monitor(show=False)
    monitor.set_model(dense_model(RMSprop(0.1)))
    model, looks = monitor.model, []
    model.optimizer.build(model.trainable_variables)
    seen = monitor._seen

    def look():  # takes 2 s, a step takes 0.1 s
        looks.append(now[0])
        now[0] += 2
        return seen()

    monkeypatch.setattr(monitor, "_seen", look)
    for _ in range(10_000):
        monitor.on_train_batch_begin(0)
        now[0] += 0.1
    assert 5 < len(looks) / 2 < 8
    assert 2 * len(looks) < 0.03 * now[0]


@pytest.mark.slow
def test_the_rate_is_in_the_logs():
    model = dense_model(RMSprop("auto"))
    x, y = numbers(model, batch=32)
    _, history = watched(model, x, y)
    assert history["current_learning_rate"][-1] == pytest.approx(
        model.optimizer.current_learning_rate
    )
    model = dense_model(RMSprop(0.25))
    _, history = watched(model, x, y)
    assert history["current_learning_rate"] == [0.25] * 3


@pytest.mark.slow
def test_other_callbacks_find_the_rate_in_the_logs_wherever_it_stands(tmp_path):
    for monitor_is_last in True, False:
        model = dense_model(RMSprop("auto"))
        x, y = numbers(model, batch=32)
        file = tmp_path / f"{monitor_is_last}.csv"
        callbacks = [keras.callbacks.CSVLogger(file), Monitor(show=False)]
        callbacks = callbacks if monitor_is_last else callbacks[::-1]
        model.fit(x, y, epochs=2, verbose=0, callbacks=callbacks)
        with file.open() as lines:
            rates = [
                float(line["current_learning_rate"]) for line in csv.DictReader(lines)
            ]
        assert len(rates) == 2
        assert rates[-1] == pytest.approx(model.optimizer.current_learning_rate)
        assert rates[-1] < 0.5  # the factor is 1


def test_it_names_what_gets_no_gradient_and_what_is_not_finite():
    model = dense_model(RMSprop(0.01))
    x, y = numbers(model)
    monitor, _ = watched(model, 0 * x, y)
    assert any("body/kernel gets no gradient" in f for f in monitor.findings)
    assert not any("head/bias" in f for f in monitor.findings)
    monitor, _ = watched(model, np.nan * x, y)
    assert any("is no longer finite" in f for f in monitor.findings)


def test_a_layer_that_hardly_moves_has_stalled():
    model = dense_model(RMSprop(1e-9))
    x, y = numbers(model)
    monitor, _ = watched(model, x, y)
    assert any("body/kernel has stalled" in f for f in monitor.findings)


@pytest.mark.slow
@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch has no `steps_per_execution`")
def test_several_steps_in_one_execution():
    norms = []
    for together in 1, 4:
        model = dense_model(RMSprop(1e-6))
        model.compile(model.optimizer, "mse", steps_per_execution=together)
        x, y = numbers(model, 8)
        x, y = np.tile(x, (8, 1)), np.tile(y, (8, 1))  # batches that are alike
        monitor, _ = watched(model, x, y, batch_size=8, epochs=3, shuffle=False)
        assert not monitor.findings
        norms.append(
            {r.variable.split("/")[-2:][0]: r.gradient_norm for r in monitor.readings}
        )
        assert monitor.readings[-1].step in (21, 24)
    for name, norm in norms[0].items():
        assert norms[1][name] == pytest.approx(norm, rel=0.01)


@pytest.mark.slow
def test_a_look_that_was_interrupted_is_forgotten():
    model = dense_model(RMSprop(0.01))
    x, y = numbers(model, 32)

    def stop(batch, logs):
        if batch == 2:
            raise KeyboardInterrupt

    monitor = Monitor(every=1, show=False)
    stopper = keras.callbacks.LambdaCallback(on_train_batch_begin=stop)
    with pytest.raises(KeyboardInterrupt):
        model.fit(x, y, batch_size=8, verbose=0, callbacks=[monitor, stopper])
    seen = len(monitor.readings)
    model.set_weights([w + 100 for w in model.get_weights()])
    watched(model, x, y, monitor)
    assert all(r.update_ratio < 0.1 for r in monitor.readings[seen:])
    watched(dense_model(RMSprop(0.01), units=(2, 2)), x, y[:, :2], monitor)


@pytest.mark.slow
def test_files(tmp_path):
    model = table_model(RMSprop(0.01))
    ids = np.random.default_rng(0).integers(0, 12, (16, 4))
    monitor = Monitor(1, tmp_path / "a" / "watch.csv", tmp_path / "board", show=False)
    watched(model, ids, np.ones((16, 1)), monitor)
    with (tmp_path / "a" / "watch.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(monitor.readings) >= 6
    assert float(lines[-1]["gradient_norm"]) == monitor.readings[-1].gradient_norm
    assert list((tmp_path / "board").iterdir())
    monitor.plot().savefig(tmp_path / "watch.png")
    assert (tmp_path / "watch.png").stat().st_size > 10_000


def test_bad_input():
    with pytest.raises(ValueError, match="has seen no step yet"):
        Monitor().plot()
    with pytest.raises(ValueError, match="`every` must be an integer >= 1"):
        Monitor(0)
    model = dense_model(keras.optimizers.RMSprop())
    with pytest.raises(ValueError, match="needs an RMSprop of keras_rmsprop"):
        watched(model, *numbers(model))


@pytest.mark.rest
@pytest.mark.tensorflow("a start: the others need not be started again")
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends(backend):
    pytest.importorskip(backend)
    out = python(
        """
        import keras, numpy as np
        from keras_rmsprop import RMSprop
        from keras_rmsprop.callbacks import Monitor
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        model.compile(RMSprop("auto"), "mse")
        monitor, x = Monitor(every=2), np.ones((32, 3))
        model.fit(x, x[:, :2], batch_size=8, epochs=2, verbose=0, callbacks=[monitor])
        steps = [r.step for r in monitor.readings]
        assert steps[::2] == steps[1::2] and len(steps) in (6, 8)
        assert all(r.gradient_norm > 0 < r.update_ratio for r in monitor.readings)
        print(keras.backend.backend())
        """,
        KERAS_BACKEND=backend,
    )
    assert out.splitlines()[-1] == backend


def test_estimates_of_a_large_variable_are_close():
    layers = [keras.layers.Dense(512, name="wide"), keras.layers.Dense(1)]
    model = compiled(RMSprop(0.01), keras.Input((512,)), layers)
    x, y = numbers(model, 64)
    model.fit(x, y, verbose=0)
    weights = model.get_weights()[0]
    v = model.optimizer.get_state().slots[0].velocity
    monitor, _ = watched(model, x, y, epochs=1)
    new = model.optimizer.get_state().slots[0].velocity
    reading = next(r for r in monitor.readings if r.variable.endswith("wide/kernel"))
    norm = np.sqrt((new.astype("float64") - 0.9 * v).sum() / 0.1)
    assert weights.size >= 2 * monitoring.MOST_ELEMENTS
    assert reading.gradient_norm == pytest.approx(norm, rel=0.05)
    ratio = np.linalg.norm(model.get_weights()[0] - weights) / np.linalg.norm(weights)
    assert reading.update_ratio == pytest.approx(ratio, rel=0.02)
