"""REINFORCE with a baseline learns to balance a pole: two networks, two RMSprops.

    python examples/policy_gradient.py

The policy is a classifier: it learns the actions that it took, weighted by how much
better they went than the baseline foretold. Sixteen episodes make a step.
"""

from collections.abc import Sequence
from typing import Any

import quiet  # noqa: F401

# isort: split

import cartpole
import gymnasium
import keras
import numpy as np
import tensorflow as tf
from command_line import example_parser
from numpy.typing import NDArray

from keras_rmsprop import RMSprop

GAMES, LENGTH, DISCOUNT, LEARNING_RATE, BASELINE_STEPS = 16, 500, 0.99, 0.01, 5
STEP = [("state", "f4", 4), ("action", "i4"), ("reward", "f4"), ("counts", "f4")]


def play(games: Any, policy: Any, rng: np.random.Generator) -> NDArray[Any]:
    """Play one episode of each game, and return the steps: (`LENGTH`, `GAMES`).

    Args:
        games: The games.
        policy: From states to the odds of each action.
        rng: Draws the actions by the odds.
    """
    episodes = np.zeros((LENGTH, GAMES), STEP)
    going = np.ones(GAMES, bool)  # a finished game starts again: that does not count
    states, _ = games.reset()
    for step in episodes:
        actions = (rng.random(GAMES) < policy(states)[:, 1]).astype("int32")
        step["state"], step["action"], step["counts"] = states, actions, going
        states, rewards, terminated, truncated, _ = games.step(actions)
        step["reward"] = rewards * going
        going &= ~(terminated | truncated)
        if not going.any():
            break
    return episodes


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Learn, draw how it went, and return the return of each episode."""
    parser = example_parser(
        "policy_gradient",
        "REINFORCE with a baseline learns to balance a pole.",
        steps=60,
        short=3,
        unit=f"steps, of {GAMES} episodes each",
        gives="it balances a pole for some 495 of 500 steps, after half a minute",
    )
    options = parser.parse_args(arguments)
    keras.utils.set_random_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    games = gymnasium.make_vec(cartpole.NAME, GAMES)
    games.reset(seed=options.seed)

    dense = keras.layers.Dense
    policy = keras.Sequential(
        [keras.Input((4,)), dense(64, "tanh"), dense(2, "softmax")]
    )
    # Small steps at last, so that chance does not undo what is learned.
    rate = keras.optimizers.schedules.PolynomialDecay(
        LEARNING_RATE, options.steps, LEARNING_RATE / 10
    )
    policy.compile(RMSprop(rate), "sparse_categorical_crossentropy")
    baseline = keras.Sequential(
        [
            keras.Input((4,)),
            dense(64, "tanh"),
            dense(1),
            keras.layers.Rescaling(1 / (1 - DISCOUNT)),  # the most there is to gain
        ]
    )
    baseline.compile(RMSprop(LEARNING_RATE), "mse")
    odds = tf.function(lambda states: policy(states), jit_compile=True)

    returns: list[float] = []
    progress = keras.utils.Progbar(options.steps, stateful_metrics=["return"])
    for n in range(options.steps):
        episodes = play(games, lambda states: odds(states).numpy(), rng)
        gains = episodes["reward"].copy()
        for after, now in zip(gains[:0:-1], gains[-2::-1], strict=True):
            now += DISCOUNT * after
        states, actions, counts = (
            episodes[name].reshape(LENGTH * GAMES, -1)
            for name in ("state", "action", "counts")
        )
        gains = gains.reshape(-1, 1)
        better = (gains - baseline.predict_on_batch(states)) * counts
        policy.train_on_batch(states, actions, sample_weight=better[:, 0])
        for _ in range(BASELINE_STEPS):
            baseline.train_on_batch(states, gains, sample_weight=counts[:, 0])
        returns += episodes["reward"].sum(axis=0).tolist()
        progress.update(n + 1, [("return", np.mean(returns[-GAMES:]))])

    title = "CartPole by REINFORCE with RMSprop"
    print(cartpole.draw(options.output / "returns.png", title, returns))
    print(f"Written to {options.output}: returns.png")
    return returns


if __name__ == "__main__":
    main()
