"""The agent kept with the benchmarks still plays, and its world model still is its game."""

from pathlib import Path

import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from benchmarks.minatar_env import make_minatar
from sb3_iris import IRIS

AGENT = Path(__file__).parent.parent / "benchmarks" / "agents" / "minatar_breakout.zip"


def test_kept_agent() -> None:
    """It is at 8.3 and random play at 0.1 to 0.5, see RESULTS.md."""
    assert AGENT.stat().st_size < 6e6  # it is in every clone
    model = IRIS.load(AGENT, device="cpu")
    env = make_vec_env(lambda: make_minatar("Breakout"), n_envs=10, seed=123)
    returns, _ = evaluate_policy(model, env, n_eval_episodes=50, deterministic=False, return_episode_rewards=True)
    assert np.mean(returns) > 5

    dream = model.get_world_model_env(
        4, start_observations=np.stack([make_minatar("Breakout").reset(seed=n)[0] for n in range(4)])
    )
    first = np.asarray(dream.reset())
    dream.step_async(np.zeros(4, dtype=np.int64))
    second = dream.step_wait()[0]
    changed = (np.abs(first.astype(int) - np.asarray(second).astype(int)).max(axis=1) > 60).sum(axis=(1, 2))
    assert ((changed >= 1) & (changed <= 6)).all()  # ball, trail and perhaps the paddle move, the wall stays
