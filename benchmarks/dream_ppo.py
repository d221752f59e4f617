"""
Train PPO purely in a model's learned game, then play the real one, beside the model's own policy and random play::

    python benchmarks/dream_ppo.py model.zip --env benchmarks.minatar_env:make_minatar --env-kwargs game=Breakout

PPO never sees the real game before it is evaluated. Its games start from frames in the replay buffer if it was saved with the
model (``model.save(path, include=["replay_buffer"])``) or beside it (``--replay-buffer``), else from frames of new real
episodes that the model's policy plays, one action in ten at random.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecTransposeImage
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.compare import RandomPlayer
from sb3_iris import IRIS
from sb3_iris.play import errors_in_words, make_env, model_parser, parse_model_args
from sb3_iris.world_model_env import ReconstructedVecEnv


class SmallCnn(BaseFeaturesExtractor):
    """
    Two convolutions, for images that are too small for SB3's own network.

    :param observation_space: Images, channels first.
    :param features_dim: Size of the output.
    """

    def __init__(self, observation_space: gym.spaces.Box, features_dim: int = 128) -> None:
        super().__init__(observation_space, features_dim)
        channels, height, width = observation_space.shape
        self.network = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * height * width, features_dim),
            nn.ReLU(),
        )

    def forward(self, images: th.Tensor) -> th.Tensor:
        return self.network(images)


def real_frames(model: IRIS, env: VecEnv, n_steps: int, seed: int) -> np.ndarray:
    """Frames of real episodes that the model plays, one action in ten at random."""
    rng = np.random.default_rng(seed)
    observations, state, starts = env.reset(), None, np.ones(env.num_envs, dtype=bool)
    frames = []
    for _ in range(0, n_steps, env.num_envs):
        frames.append(np.array(observations))
        actions, state = model.predict(frames[-1], state, starts)
        explore = rng.random(env.num_envs) < 0.1
        observations, _, starts, _ = env.step(
            np.where(explore, rng.integers(model.action_space.n, size=env.num_envs), actions)
        )
    return np.concatenate(frames)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = model_parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(seed=0)
    parser.add_argument("--replay-buffer", help="a file that IRIS.save_replay_buffer wrote")
    parser.add_argument("--steps", type=int, default=100_000, help="steps in the learned game (default: %(default)s)")
    parser.add_argument("--n-envs", type=int, default=64, help="learned games at a time (default: %(default)s)")
    parser.add_argument("--max-episode-steps", type=int, default=50, help="of the learned games (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=100, help="real episodes to evaluate on (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="file to write the result to, as JSON")
    args = parse_model_args(parser, argv)
    if args.out is not None and not args.out.absolute().parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {args.out.parent}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with errors_in_words():
        model = IRIS.load(args.model, device=args.device)
        if args.replay_buffer is not None:
            model.load_replay_buffer(args.replay_buffer)
        real: VecEnv = VecTransposeImage(
            make_vec_env(lambda: make_env(args.env, args.env_kwargs, model.observation_space), 10, seed=1_000 + args.seed)
        )
    starts = None if model.replay_buffer.size() > 0 else real_frames(model, real, 2_000, args.seed)
    dream = VecMonitor(
        model.get_world_model_env(args.n_envs, max_episode_steps=args.max_episode_steps, start_observations=starts)
    )
    small = min(dream.observation_space.shape[1:]) < 36  # type: ignore[index]
    agent = PPO(
        "CnnPolicy",
        dream,
        n_steps=64,
        batch_size=512,
        n_epochs=4,
        learning_rate=1e-3,
        gamma=model.gamma,
        ent_coef=0.01,
        policy_kwargs={"features_extractor_class": SmallCnn} if small else None,
        seed=args.seed,
        device=args.device,
        verbose=1,
    )
    start = time.perf_counter()
    agent.learn(args.steps, log_interval=5)
    result: dict[str, Any] = {"steps": args.steps, "seconds": round(time.perf_counter() - start), "real_return": {}}
    for name, player, env in (
        ("random", RandomPlayer(real.action_space, args.seed), real),
        ("iris", model, real),
        ("ppo_in_the_dream", agent, ReconstructedVecEnv(real, model)),
    ):
        returns, lengths = evaluate_policy(player, env, args.episodes, deterministic=False, return_episode_rewards=True)  # type: ignore[arg-type]
        assert isinstance(returns, list)
        summary = {
            "mean": np.mean(returns),
            "standard_error": np.std(returns, ddof=1) / len(returns) ** 0.5,
            "length": np.mean(lengths),
        }
        result["real_return"][name] = {key: round(float(value), 3) for key, value in summary.items()}
    print(json.dumps(result, indent=2))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
