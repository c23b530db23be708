"""A step in a SavedModel, and in TFLite."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import python

from keras_rmsprop import RMSprop
from keras_rmsprop.kernel import tensorflow as kernel

pytestmark = pytest.mark.tensorflow("SavedModels and TFLite")

BUILT_IN = keras.optimizers.RMSprop


class Trainer(tf.Module):
    """A model with a function that trains it."""

    def __init__(self, optimizer, has_table=False):
        layers = [keras.Input((3,)), keras.layers.Dense(1)]
        if has_table:
            table = keras.layers.Embedding(50, 4)
            layers[:1] = keras.Input((3,), dtype="int32"), table, keras.layers.Flatten()
        self.model, self.optimizer = keras.Sequential(layers), optimizer
        optimizer.build(self.model.trainable_variables)
        x = tf.TensorSpec((8, 3), tf.int32 if has_table else tf.float32)
        self.train = tf.function(self.train, input_signature=[x])

    def train(self, x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self.model(x) - 1))
        variables = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


@pytest.mark.skipif(not kernel.ops(), reason=kernel.why_not())
@pytest.mark.slow
def test_a_saved_step_is_loaded_and_taken_in_a_process_that_took_none(tmp_path):
    keras.utils.set_random_seed(0)
    trainer = Trainer(RMSprop(0.01))
    tf.saved_model.save(trainer, tmp_path)
    nodes = trainer.train.get_concrete_function().graph.get_operations()
    assert "KerasRmspropStep" in {node.type for node in nodes}
    expected = [float(trainer.train(tf.ones((8, 3)))["loss"]) for _ in range(3)]
    program = f"""
        import tensorflow as tf
        import keras_rmsprop
        trainer = tf.saved_model.load({str(tmp_path)!r})
        print(*(float(trainer.train(tf.ones((8, 3)))["loss"]) for _ in range(3)))
    """
    assert [*map(float, python(program).split())] == pytest.approx(expected, rel=1e-5)


@pytest.mark.rest
@pytest.mark.slow
def test_a_library_that_is_refused_does_not_fail_the_import(tmp_path):
    program = """
        import warnings
        warnings.simplefilter("error")
        import os
        from pathlib import Path
        from keras_rmsprop.kernel import build
        path = build.cache() / build.name(build.OPS)
        path.parent.mkdir(0o700)
        path.write_text("no library")
        import keras_rmsprop.kernel.tensorflow as kernel
        print(os.environ["XDG_CACHE_HOME"] == str(path.parent.parent))
    """
    assert python(program, XDG_CACHE_HOME=str(tmp_path)) == "True"


def convert(trainer, folder):
    signatures = {"train": trainer.train.get_concrete_function()}
    tf.saved_model.save(trainer, folder, signatures=signatures)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder))
    converter.target_spec.supported_ops = [
        tf.lite.OpsSet.TFLITE_BUILTINS,
        tf.lite.OpsSet.SELECT_TF_OPS,
    ]
    converter.experimental_enable_resource_variables = True
    return converter.convert()


OPTIONS = {
    "default": {},
    "momentum": {"momentum": 0.9, "centered": True, "weight_decay": 0.01},
    "averages": {"use_ema": True, "ema_overwrite_frequency": 2},
    "accumulation": {"gradient_accumulation_steps": 2, "global_clipnorm": 1.0},
    "auto": {"learning_rate": "auto", "use_ema": True, "skip_nonfinite": True},
    "lazy": {"sparse_update": "lazy", "momentum": 0.9, "use_ema": True},
    "bytes": {"slot_dtype": "uint8", "float32_slots": ()},
}


@pytest.mark.slow
@pytest.mark.one_in(8)
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("has_table", [True, False], ids=["table", "dense"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tflite_converts_a_step_without_the_kernel(options, has_table, tmp_path):
    trainer = Trainer(RMSprop(jit_compile=False, **options), has_table)
    tflite = convert(trainer, tmp_path)
    [train] = tf.lite.Interpreter(model_content=tflite).get_signature_list()
    assert train == "train"


@pytest.mark.one_in(9)
@pytest.mark.portable
@pytest.mark.parametrize(
    "options",
    [
        {"centered": True},
        {"use_ema": True},
        {"sparse_update": "lazy", "momentum": 0.9},
        {"gradient_accumulation_steps": 2},
    ],
)
@pytest.mark.parametrize("jit_compile", ["auto", False])
def test_reads_of_a_table_do_not_copy_it(options, jit_compile):
    """TensorFlow switches to copies at the first scatter; a step switches back.

    TFLite does not know how to, so a step with `jit_compile=False` does not.
    """
    weights = keras.Variable(np.ones((50, 4), "float32"))
    optimizer = RMSprop(jit_compile=jit_compile, **options)

    @tf.function
    def step(ids):
        gradient = tf.IndexedSlices(tf.ones([2, 4]), ids)
        optimizer.apply([gradient], [weights])

    graph = step.get_concrete_function(tf.constant([0, 1])).graph.as_graph_def()
    functions = [
        graph.node,
        *(function.node_def for function in graph.library.function),
    ]
    scattered = 0
    for nodes in functions:
        to, back = (
            {node.input[0] for node in nodes if node.op == op}
            for op in ("ResourceScatterUpdate", "DisableCopyOnRead")
        )
        assert back == (set() if jit_compile is False else to)
        scattered += len(to)
    assert scattered > 2
