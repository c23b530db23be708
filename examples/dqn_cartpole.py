"""A deep Q-network learns to balance a pole, with the RMSprop of DeepMind's DQN.

    python examples/dqn_cartpole.py

As in the paper of Mnih et al.: random steps out of a memory, a second network that sets
the goals and follows now and then, Huber's loss, and a centered RMSprop with an epsilon
that counts. It is smaller here, as the loss is a mean over the batch and not the sum.
Eight games are played at once.
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
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from keras_rmsprop import dialects

GAMES, BATCH_SIZE, UNITS, DISCOUNT, LEARNING_RATE = 8, 256, 128, 0.98, 0.003
EPSILON, REWARD = 0.0016, 0.1  # small rewards keep errors where Huber's loss is smooth
WARM_UP, NEW_GOALS, LEAST_CHANCE = 100, 50, 0.01
MEMORY = [
    ("state", "f4", 4),
    ("action", "i4"),
    ("reward", "f4"),
    ("after", "f4", 4),
    ("over", "f4"),
    ("counts", "f4"),  # not if a finished game starts again
]


def network() -> Any:
    """Return a network from states to what each action is worth."""
    dense = keras.layers.Dense
    return keras.Sequential(
        [keras.Input((4,)), dense(UNITS, "relu"), dense(UNITS, "relu"), dense(2)]
    )


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Learn, draw how it went, and return the return of each episode."""
    parser = example_parser(
        "dqn_cartpole",
        "A deep Q-network learns to balance a pole.",
        steps=12_000,
        short=300,
        unit=f"steps of {GAMES} games",
        gives="it balances a pole for some 480 of 500 steps, after a minute or two",
    )
    options = parser.parse_args(arguments)
    keras.utils.set_random_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    games = RecordEpisodeStatistics(gymnasium.make_vec(cartpole.NAME, GAMES))
    model, goals = network(), network()
    rate = keras.optimizers.schedules.PolynomialDecay(
        LEARNING_RATE, options.steps, LEARNING_RATE / 3
    )
    optimizer = dialects.deepmind_dqn(rate, min_squared_gradient=EPSILON)
    optimizer.build(model.trainable_variables)

    def best(states: Any) -> Any:
        return tf.argmax(model(states), axis=1)

    def learn(states: Any, actions: Any, rewards: Any, *rest: Any) -> None:
        after, over, counts = rest
        future = (1 - over) * tf.reduce_max(goals(after), axis=1)
        goal = REWARD * rewards + DISCOUNT * future
        with tf.GradientTape() as tape:
            worth = tf.gather(model(states), actions, batch_dims=1)
            loss = keras.losses.Huber()(goal[:, None], worth[:, None], counts)
        weights = model.trainable_variables
        optimizer.apply(tape.gradient(loss, weights), weights)

    best, learn = (tf.function(f, jit_compile=True) for f in (best, learn))
    memory = np.zeros((options.steps, GAMES), MEMORY)
    returns: list[float] = []
    states, _ = games.reset(seed=options.seed)
    begun = np.zeros(GAMES, bool)
    progress = keras.utils.Progbar(options.steps, stateful_metrics=["return"])
    for n in range(options.steps):
        chance = max(LEAST_CHANCE, 1 - 8 * n / options.steps)
        random = rng.random(GAMES) < chance
        actions = np.where(random, rng.integers(2, size=GAMES), best(states))
        after, rewards, terminated, truncated, info = games.step(actions)
        new = states, actions, rewards, after, terminated, ~begun
        for (name, *_), values in zip(MEMORY, new, strict=True):
            memory[name][n] = values
        states, begun = after, terminated | truncated
        if begun.any():
            returns += info["episode"]["r"][begun].tolist()
        if n >= WARM_UP:
            choice = rng.integers((n + 1) * GAMES, size=BATCH_SIZE)
            batch = memory.reshape(-1)[choice]
            learn(*(batch[name] for name, *_ in MEMORY))
        if n % NEW_GOALS == 0:
            goals.set_weights(model.get_weights())
        mean = [("return", np.mean(returns[-20:]))] if returns else []
        progress.update(n + 1, mean)

    title = "CartPole by a deep Q-network with DeepMind's RMSprop"
    print(cartpole.draw(options.output / "returns.png", title, returns))
    print(f"Written to {options.output}: returns.png")
    return returns


if __name__ == "__main__":
    main()
