"""Bad input, refused before any training: each error names the argument, its value and the way out."""

import contextlib
import inspect
import math
import os
import warnings
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, EventCallback
from stable_baselines3.common.preprocessing import is_image_space

from sb3_iris.type_aliases import NETWORKS

if TYPE_CHECKING:
    from sb3_iris.iris import IRIS


def check_positive(**sizes: Any) -> None:
    """
    :param sizes: Values by argument name.
    :raises ValueError: For the first that is not a positive whole number.
    """
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")


def check_memory(buffer_size: int, n_bytes: int) -> None:
    """
    :param buffer_size: Size of a replay buffer in steps.
    :param n_bytes: Memory that it takes when it is full.
    :raises ValueError: If the machine, or the share of it that this process may use, has less.
    """
    in_all, available = machine_memory()
    if n_bytes > in_all:
        raise ValueError(
            f"buffer_size={buffer_size} takes {n_bytes / 1e9:.2f} GB of memory when it is full, but this machine has "
            f"{in_all / 1e9:.2f} GB: make it at most {int(buffer_size * in_all / n_bytes)}, which load takes too, or "
            "image_size smaller. To play only, load the model without env"
        )
    if n_bytes > available:
        warnings.warn(
            f"buffer_size={buffer_size} takes {n_bytes / 1e9:.2f} GB of memory when it is full, of which "
            f"{available / 1e9:.2f} GB are free now: other programs may have to go"
        )


def machine_memory() -> tuple[float, float]:
    """
    :return: Bytes of memory that this process can have, by what the machine and its control groups (containers, batch
        jobs) allow, and those of them that are free; infinity where the system does not say.
    """
    try:
        in_all = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        in_all = math.inf
    available = math.inf
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)
    groups = ["0::/", "0:memory:/"]  # the groups' own roots, which is all that a container sees of them
    with contextlib.suppress(OSError):
        groups += Path("/proc/self/cgroup").read_text().splitlines()
    for group in groups:
        _, _, kind_and_path = group.partition(":")
        kind, _, path = kind_and_path.partition(":")
        name = {"": f"{path}/memory.max", "memory": f"memory{path}/memory.limit_in_bytes"}.get(kind)
        if name is not None:
            with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
                in_all = min(in_all, float(int((Path("/sys/fs/cgroup") / name.lstrip("/")).read_text())))
    return in_all, min(in_all, available)


def check_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> None:
    """
    :param observation_space: Observations of an environment.
    :param action_space: Its actions.
    :raises ValueError: If IRIS cannot play it.
    """
    if not isinstance(action_space, spaces.Discrete) or action_space.start != 0:
        raise ValueError(
            f"env has actions {action_space}, but IRIS plays Discrete actions that count from 0 only. Wrap the environment so "
            "that it takes those (for instance with Gymnasium's TransformAction)"
        )
    if len(observation_space.shape or ()) != 3 or not is_image_space(observation_space):
        raise ValueError(
            f"env has observations {observation_space}, but IRIS sees single images only: a Box of uint8 in [0, 255] with "
            "three axes, channels first or last. Wrap the environment so that it gives such images (for instance with "
            "Gymnasium's AddRenderObservation, or GrayscaleObservation(..., keep_dim=True) for grey ones; do not normalise "
            "them: VecNormalize(..., norm_obs=False))"
        )
    assert observation_space.shape is not None
    if observation_space.shape[0] == min(observation_space.shape[1:]):
        warnings.warn(
            f"env has images of shape {observation_space.shape}: Stable-Baselines3 takes the smallest axis for the channels, "
            "and the first one here. If the channels are last, enlarge the images until a side has more pixels than channels"
        )


def check_network_sizes(
    height: int, width: int, channel_multipliers: Sequence[int], embed_dim: int, n_heads: int, dropout: float
) -> None:
    """
    :param height: Height of the networks' images, in pixels.
    :param width: Width of the networks' images, in pixels.
    :param channel_multipliers: One per level of the tokenizer.
    :param embed_dim: Embedding size of the world model.
    :param n_heads: Attention heads of the world model.
    :param dropout: Dropout probability of the world model.
    :raises ValueError: For the first that does not go together with the others.
    """
    downsampling = 2 ** (len(channel_multipliers) - 1) if channel_multipliers else 0
    if not channel_multipliers:
        raise ValueError("channel_multipliers=() is empty: give one multiplier per level, for instance (1, 1, 1)")
    if height % downsampling or width % downsampling:
        raise ValueError(
            f"image_size: a {height}x{width} image cannot be halved {len(channel_multipliers) - 1} times, as "
            f"channel_multipliers={tuple(channel_multipliers)} asks. Choose an image_size divisible by {downsampling}, "
            "or fewer channel_multipliers"
        )
    if embed_dim % n_heads:
        raise ValueError(f"n_heads={n_heads} does not divide embed_dim={embed_dim}: make embed_dim a multiple of n_heads")
    if not (isinstance(dropout, Real) and 0 <= dropout < 1):
        raise ValueError(f"dropout={dropout!r} must be a number in [0, 1)")


def refuse_events(callback: BaseCallback) -> None:
    """
    :param callback: A callback that works at ends of collections.
    :raises ValueError: If it is part of one that tells it of steps only.
    """
    if isinstance(callback.parent, EventCallback):
        name, parent = type(callback).__name__, type(callback.parent).__name__
        raise ValueError(
            f"{name} in {parent} would do nothing: it works at ends of collections, of which {parent} tells it nothing. "
            "Give it to learn() itself; it has a frequency of its own"
        )


def check_hyperparameters(model: "IRIS") -> None:
    """
    :param model: A model whose hyperparameters are set.
    :raises ValueError: For the first hyperparameter that cannot work.
    """
    check_positive(
        **{name: getattr(model, name) for name in ("buffer_size", "train_freq")},
        stats_window_size=model._stats_window_size,
        **{f"{network}_batch_size": getattr(model, f"{network}_batch_size") for network in NETWORKS},
    )
    for name, least in {
        **{f"{network}_{what}": 0 for network in NETWORKS for what in ("gradient_steps", "learning_starts")},
        **{"burn_in": 0, "final_training_epochs": 0, "sequence_length": 2, "imagination_horizon": 2},
    }.items():
        value = getattr(model, name)
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
    starts, stops = model.tokenizer_learning_starts, model.tokenizer_learning_stops
    if stops is not None and not (isinstance(stops, int | np.integer) and stops > starts):
        raise ValueError(
            f"tokenizer_learning_stops={stops!r} must be a whole number above tokenizer_learning_starts={starts}, or None"
        )
    shares = ("world_model_recent_share", "actor_critic_recent_share", "rewarded_share")
    for name in ("gamma", "gae_lambda", "exploration_rate", *shares):
        value = getattr(model, name)
        if not (isinstance(value, Real) and 0 <= float(value) <= 1):
            raise ValueError(f"{name}={value!r} must be a number in [0, 1]")
    for name in ("ent_coef", "temperature", "eval_temperature", "world_model_weight_decay"):
        value = getattr(model, name)
        if not (isinstance(value, Real) and 0 <= float(value) < math.inf):
            raise ValueError(f"{name}={value!r} must be a finite number of at least 0")
    if not (isinstance(model.max_grad_norm, Real) and model.max_grad_norm > 0):
        raise ValueError(f"max_grad_norm={model.max_grad_norm!r} must be above 0; float('inf') does not clip")
    rate = model.learning_rate
    if not callable(rate) and not (isinstance(rate, Real) and 0 <= rate < math.inf):
        raise ValueError(f"learning_rate={model.learning_rate!r} must be a finite number of at least 0, or a schedule")
    seed = model.seed
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32):
        raise ValueError(f"seed={seed!r} must be a whole number from 0 to {2**32 - 1}, or None")
    for name in ("uniform_replay", "repeat_exploration"):
        value = getattr(model, name)
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be True or False")
    longest = max(model.sequence_length, model.burn_in + 1)
    if model.buffer_size // model.n_envs < longest:
        raise ValueError(
            f"buffer_size={model.buffer_size} leaves {model.buffer_size // model.n_envs} steps to each of {model.n_envs} "
            f"environments, too few for one segment of {longest}: make it at least {longest * model.n_envs}"
        )


def check_learn_arguments(model: "IRIS", total_timesteps: float, log_interval: int | None) -> None:
    """
    :param model: The model, whose hyperparameters may have been changed since it was made.
    :param total_timesteps: As given to ``learn``.
    :param log_interval: As given to ``learn``.
    :raises ValueError: For the first that ``learn`` cannot work with.
    """
    check_hyperparameters(model)
    length = model.policy.world_model.sequence_length
    if model.sequence_length != length:
        raise ValueError(f"sequence_length={model.sequence_length} cannot be changed: it is {length}")
    if model.env is None:
        raise ValueError("env=None: the model was loaded without an environment, give it one with set_env()")
    if not (isinstance(total_timesteps, Real) and 0 <= total_timesteps < math.inf):
        raise ValueError(f"total_timesteps={total_timesteps!r} must be a finite number of at least 0")
    if log_interval is not None and not (isinstance(log_interval, int | np.integer) and log_interval >= 1):
        raise ValueError(f"log_interval={log_interval!r} must be a whole number of at least 1, or None for no logs")


def takes_argument(policy_class: type, name: str) -> bool:
    """
    :param policy_class: Class of a policy.
    :param name: Name of an argument.
    :return: Whether its constructor takes it.
    """
    parameters = inspect.signature(policy_class).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def check_policy_kwargs(policy_class: type, policy_kwargs: dict[str, Any]) -> None:
    """
    :param policy_class: Class of the policy.
    :param policy_kwargs: Arguments for it from the user.
    :raises ValueError: For the first that the policy does not have, or that is not the user's to give there.
    """
    parameters = inspect.signature(policy_class).parameters
    # These come from the constructor's own arguments
    own = ("observation_space", "action_space", "lr_schedule", "sequence_length", "weight_decay", "eval_temperature")
    known = [name for name in parameters if name not in own]
    booleans = ("patch_tokenizer", "relative_positions")
    for name, value in policy_kwargs.items():
        settled_later = name == "robust_tokenizer" and value == "auto"  # and left out if the policy has no such argument
        if name in own or not (takes_argument(policy_class, name) or settled_later):
            raise ValueError(f"policy_kwargs has {name}={value!r}, but its names must be among {', '.join(known)}")
        if name == "robust_tokenizer" and not (isinstance(value, bool) or (isinstance(value, str) and value == "auto")):
            raise ValueError(f"robust_tokenizer={value!r} must be True, False or 'auto'")
        if name in booleans and not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be True or False")
