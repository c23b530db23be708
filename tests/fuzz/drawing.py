"""What a random program is made of: a model, options and changes of options."""

import keras
from hypothesis import strategies as st

ROWS, SHAPES = 7, {"table": (7, 3), "matrix": (2, 3), "vector": (4,)}
NAMES = [*SHAPES]


@keras.saving.register_keras_serializable("fuzz")
class Dot(keras.layers.Layer):
    """The sum of a weight's elements times the inputs: these are its gradient."""

    def __init__(self, shape, constraint=None, **kwargs):
        super().__init__(**kwargs)
        self.shape, self.constraint = tuple(shape), constraint

    def build(self, _):
        self.weight = self.add_weight(
            shape=self.shape, name="weight", constraint=self.constraint
        )

    def call(self, x):
        return keras.ops.sum(self.weight * x, axis=[*range(1, 1 + len(self.shape))])

    def get_config(self):
        return super().get_config() | {
            "shape": self.shape,
            "constraint": self.constraint,
        }


@keras.saving.register_keras_serializable("fuzz")
def output(_, y):
    """The loss whose gradient is that of the output."""
    return y


def model_of(dtype, constraint):
    keras.config.set_dtype_policy(dtype)
    ids = keras.Input((None,), dtype="int32", name="ids")
    table = keras.Input((None, 3), name="table_x")
    matrix, vector = (keras.Input(SHAPES[n], name=f"{n}_x") for n in NAMES[1:])
    found = keras.layers.Embedding(ROWS, 3, name="table")(ids)
    y = keras.ops.sum(found * table, axis=(1, 2)) + Dot((2, 3), name="matrix")(matrix)
    y = y + Dot((4,), constraint, name="vector")(vector)
    model = keras.Model([ids, table, matrix, vector], y)
    keras.config.set_dtype_policy("float32")
    return model


def options():
    """Draw arguments: each is left out half of the time."""
    some = {
        "learning_rate": st.sampled_from([0.01, 0.1, "schedule"]),
        "rho": RHO,
        "momentum": st.sampled_from([0.5, 0.9]),
        "centered": st.just(True),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "clip": CLIP,
        "loss_scale_factor": st.just(8.0),
        "gradient_accumulation_steps": st.sampled_from([2, 3]),
        "ema": st.fixed_dictionaries(
            {},
            optional={
                "ema_momentum": EMA_MOMENTUM,
                "ema_overwrite_frequency": st.sampled_from([2, 3]),
                "ema_warmup": st.booleans(),
            },
        ),
        "epsilon_inside_sqrt": st.just(False),
        "initial_accumulator_value": st.just(0.5),
        "bias_correction": st.just(True),
        "nesterov": st.just(True),
        "lr_in_momentum": st.just(False),
        "decoupled_weight_decay": st.just(False),
        "maximize": st.just(True),
        "skip_nonfinite": st.just(True),
        "jit_compile": st.sampled_from([True, False]),
    }
    return st.fixed_dictionaries({"epsilon": EPSILON}, optional=some).map(flat)


RHO = st.sampled_from([0.5, 0.9, 0.99])
EPSILON = st.sampled_from([1e-2, 1e-3])
EMA_MOMENTUM = st.sampled_from([0.5, 0.9])
CLIP = st.sampled_from(
    [{"clipnorm": 1.0}, {"clipvalue": 0.5}, {"global_clipnorm": 1.0}]
)
NO_CLIP = dict.fromkeys(["clipnorm", "clipvalue", "global_clipnorm"])


def flat(drawn):
    drawn = dict(drawn)
    clip, ema = drawn.pop("clip", {}), drawn.pop("ema", None)
    if drawn.get("centered"):  # with these a variance of nearly 0 is divided by
        drawn.pop("bias_correction", None), drawn.pop("epsilon_inside_sqrt", None)
    return drawn | clip | ({} if ema is None else ema | {"use_ema": True})


CHANGES = st.one_of(
    st.fixed_dictionaries({"rho": RHO}),
    st.fixed_dictionaries({"epsilon": EPSILON}),
    st.fixed_dictionaries({"learning_rate": st.sampled_from([0.02, 0.2])}),
    st.fixed_dictionaries({"momentum": st.sampled_from([0.0, 0.6])}),
    st.just({"centered": False}),
    st.fixed_dictionaries({"weight_decay": st.sampled_from([None, 0.0, 0.2])}),
    st.one_of(st.just({}), CLIP).map(lambda clip: NO_CLIP | clip),
    st.fixed_dictionaries({"use_ema": st.booleans()}),
    st.fixed_dictionaries({"ema_momentum": EMA_MOMENTUM}),
    st.fixed_dictionaries({"ema_overwrite_frequency": st.sampled_from([None, 1, 2])}),
    st.fixed_dictionaries({"ema_warmup": st.booleans()}),
    st.fixed_dictionaries({"loss_scale_factor": st.sampled_from([None, 4.0])}),
    st.fixed_dictionaries(
        {"gradient_accumulation_steps": st.sampled_from([None, 2, 3])}
    ),
    st.fixed_dictionaries({"skip_nonfinite": st.booleans()}),
    st.fixed_dictionaries({"bias_correction": st.booleans()}),
    st.fixed_dictionaries({"nesterov": st.booleans()}),
    st.fixed_dictionaries({"maximize": st.booleans()}),
)
NEED_SLOTS = {"momentum", "centered", "use_ema", "skip_nonfinite"} | {
    "gradient_accumulation_steps"
}
