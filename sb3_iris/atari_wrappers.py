"""The preprocessing of Atari games in IRIS, put together from the wrappers of SB3 and Gymnasium."""

from difflib import get_close_matches
from typing import Any

import ale_py
import gymnasium as gym
from gymnasium.wrappers import ResizeObservation
from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv, MaxAndSkipEnv, NoopResetEnv
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

gym.register_envs(ale_py)  # importing ale_py registers its games; this line says so to readers and linters

# Longest game in raw frames; ALE counts the no-ops of the reset too
MAX_TRAIN_FRAMES = 20_000
MAX_EVAL_FRAMES = 108_000


def wrap_atari(env: gym.Env, image_size: int = 64, noop_max: int = 30, terminal_on_life_loss: bool = True) -> gym.Env:
    """
    Wrap one Atari game (made with ``frameskip=1``) as IRIS sees it: an RGB image every fourth frame.

    Unlike SB3's ``AtariWrapper``, frames are resized before the maximum over the last two is taken (as the authors do),
    rewards are not clipped, the image stays in colour and "fire" is never pressed for the agent.

    :param env: Game to wrap
    :param image_size: Height and width of the observation, in pixels
    :param noop_max: At each reset, a number of no-ops uniform in [1, ``noop_max``], in raw frames
    :param terminal_on_life_loss: Whether losing a life terminates the episode (the game itself goes on)
    :return: The wrapped game, with observations (``image_size``, ``image_size``, 3), uint8 in [0, 255]
    """
    env = ResizeObservation(env, (image_size, image_size))  # area interpolation
    env = NoopResetEnv(env, noop_max=noop_max)
    env = MaxAndSkipEnv(env, skip=4)
    return EpisodicLifeEnv(env) if terminal_on_life_loss else env


def make_atari_env(
    env_id: str,
    n_envs: int = 1,
    seed: int | None = None,
    evaluation: bool = False,
    image_size: int = 64,
    monitor_dir: str | None = None,
    vec_env_cls: type[DummyVecEnv] | type[SubprocVecEnv] | None = None,
    vec_env_kwargs: dict[str, Any] | None = None,
) -> VecEnv:
    """
    Create a monitored ``VecEnv`` of an Atari game with the preprocessing of IRIS: no sticky actions, minimal action set.

    ============================  =====================  ======================
    Setting                       Training               Evaluation
    ============================  =====================  ======================
    A lost life ends the episode  yes                    no
    No-ops at reset               1 to 30                1
    A game is truncated after     20,000 raw frames      108,000 raw frames
    ============================  =====================  ======================

    ``Monitor`` sits next to the game, inside all other wrappers. So ``ep_rew_mean`` and ``evaluate_policy`` give the score
    of whole games, and ``ep_len_mean`` their length in raw frames, no-ops included (about four times the agent's steps).

    .. note::
        In training, ``reset()`` after a lost life only plays a no-op step; the game starts anew when it is really over.

    :param env_id: Game, as ``"ALE/Pong-v5"`` or ``"Pong"``
    :param n_envs: Number of games played in parallel
    :param seed: Seed of the first game; the next ones get the numbers after it
    :param evaluation: Whether to evaluate (whole games) instead of to train
    :param image_size: Height and width of the observation, in pixels
    :param monitor_dir: Folder for the monitor files; None writes none
    :param vec_env_cls: ``VecEnv`` class; None means ``DummyVecEnv``
    :param vec_env_kwargs: Keyword arguments for the ``VecEnv`` class
    :return: The games, with observations (N, ``image_size``, ``image_size``, 3), uint8 in [0, 255]
    """
    for name, value in (("n_envs", n_envs), ("image_size", image_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    game = env_id.removeprefix("ALE/").split("-v")[0].removesuffix("NoFrameskip")
    ale_id = f"ALE/{game}-v5"
    if env_id not in (game, ale_id) or ale_id not in gym.registry:
        known = {name[4:-3].lower(): name for name in gym.registry if name.startswith("ALE/") and name.endswith("-v5")}
        matches = [known[name] for name in get_close_matches(game.lower().replace("_", ""), known)]
        raise ValueError(
            f"env_id={env_id!r} is not an Atari game of ale-py, close matches: {matches}. "
            "Name a game as in 'ALE/Pong-v5' or 'Pong' (all of them: gymnasium.pprint_registry())."
        )
    return make_vec_env(
        ale_id,
        n_envs=n_envs,
        seed=seed,
        monitor_dir=monitor_dir,
        wrapper_class=wrap_atari,
        env_kwargs={
            "frameskip": 1,
            "repeat_action_probability": 0.0,
            "full_action_space": False,
            "max_num_frames_per_episode": MAX_EVAL_FRAMES if evaluation else MAX_TRAIN_FRAMES,
        },
        vec_env_cls=vec_env_cls,
        vec_env_kwargs=vec_env_kwargs,
        wrapper_kwargs={
            "image_size": image_size,
            "noop_max": 1 if evaluation else 30,
            "terminal_on_life_loss": not evaluation,
        },
    )
