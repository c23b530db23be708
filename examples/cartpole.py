"""The picture of what `dqn_cartpole.py` and `policy_gradient.py` learned."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from matplotlib.figure import Figure

NAME = "CartPole-v1"
LAST = 100  # so many episodes it takes to call the task solved
BLUE, ORANGE, GREY = "#2a78d6", "#e8710a", "#6b6a66"


def draw(path: Path, title: str, returns: Sequence[float]) -> str:
    """Draw the return of every episode, and say what the last ones reached.

    Args:
        path: The PNG to write.
        title: What the picture shows.
        returns: The returns, in the order in which the episodes ended.
    """
    means = [np.mean(returns[max(0, n - LAST) : n]) for n in range(1, len(returns) + 1)]
    solved: Any = gymnasium.spec(NAME).reward_threshold
    episodes = range(1, len(returns) + 1)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(episodes, returns, ".", color=BLUE, alpha=0.3, ms=6, label="one episode")
    axes.plot(episodes, means, color=ORANGE, lw=3, label=f"mean of the last {LAST}")
    axes.axhline(solved, color=GREY, ls="--", label=f"counts as solved: {solved:.0f}")
    axes.set_title(title, loc="left", size=15)
    axes.set_xlabel("episode", size=12)
    axes.set_ylabel("return (steps balanced, 500 at most)", size=12)
    axes.set_ylim(0, 520)
    axes.grid(axis="y", color="#e4e3df")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=12)
    figure.savefig(path, dpi=120)
    return (
        f"Mean return of the first {LAST} episodes: {np.mean(returns[:LAST]):.0f}; "
        f"of the last {LAST}, of {len(returns)}: {means[-1]:.0f}."
    )
