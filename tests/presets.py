"""Networks and schedules so small that a test takes a moment, and an environment in which every frame tells what it is."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_iris import IRIS

NETWORKS = ("tokenizer", "world_model", "actor_critic")
SIZE = 8  # side of the images that the tiny networks see
SIZES = {
    "image_size": SIZE,
    "codebook_size": 16,
    "codebook_dim": 8,
    "tokenizer_channels": 4,
    "channel_multipliers": (1, 1, 1),
    "n_res_blocks": 1,
    "attention_resolutions": (),
    "n_layers": 1,
    "n_heads": 2,
    "embed_dim": 16,
    "lstm_hidden_size": 16,
    "actor_critic_input": "frames",
    "robust_tokenizer": False,
}
SETTINGS = {
    "buffer_size": 300,
    "train_freq": 4,
    "sequence_length": 4,
    "imagination_horizon": 2,
    "burn_in": 2,
    "final_training_epochs": 1,
    "perceptual_loss": None,
    "seed": 0,
    "device": "cpu",
    **{f"{network}_batch_size": 3 for network in NETWORKS},
    **{f"{network}_gradient_steps": 1 for network in NETWORKS},
    **{f"{network}_learning_starts": 4 for network in NETWORKS},
}
NO_TRAINING = {f"{network}_gradient_steps": 0 for network in NETWORKS}


def tiny(env: Any, policy_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> IRIS:
    """A model of tiny networks that trains all three of them from its first training phase on."""
    return IRIS("CnnPolicy", env, policy_kwargs={**SIZES, **(policy_kwargs or {})}, **{**SETTINGS, **kwargs})


def decided(model: IRIS) -> IRIS:
    """Give a model tokens that differ from frame to frame, and strong opinions about them and its LSTM state."""
    generator = th.Generator().manual_seed(1)

    def draw(parameter: th.Tensor, scale: float) -> None:
        parameter.data = scale * th.randn(parameter.shape, generator=generator)

    tokenizer, actor_critic = model.policy.tokenizer, model.policy.actor_critic
    with th.no_grad():  # codes in the middle of what the encoder gives for random frames
        frames = th.rand(32, *tokenizer.image_shape, generator=generator)
        z = tokenizer.encoder(2 * frames - 1).movedim(1, -1).flatten(0, -2)
        tokenizer.quantizer.codebook.data = z[th.randperm(len(z), generator=generator)[: tokenizer.codebook_size]]
    last = tokenizer.decoder[-1]
    assert isinstance(last, th.nn.Conv2d)
    draw(last.weight, 2.0)
    for name, parameter in actor_critic.named_parameters():
        draw(parameter, 0.15 if name.startswith("cnn") else 0.7)
    draw(actor_critic.actor.weight, 5.0)
    return model


class FrameEnv(gym.Env):
    """
    Frames with one number per channel: the step within the episode, the number of the episode, and a random one from the
    environment's own stream. Action 0 gives reward -2, action 1 gives 0 and action 2 gives 0.5, plus ``bonus`` for each.

    :param length: Steps after which an episode terminates, None for never.
    :param bonus: Added to every reward.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
    rewards = (-2.0, 0.0, 0.5)

    def __init__(self, length: int | None = 5, bonus: float = 0.0, render_mode: str | None = None) -> None:
        self.action_space = gym.spaces.Discrete(3)
        self.length = length
        self.bonus = bonus
        self.render_mode = render_mode
        self.episode = 0
        self.n_steps = 0  # of all episodes
        self.n_resets = 0
        self.actions: list[int] = []

    def _frame(self) -> np.ndarray:
        numbers = (self.t, self.episode, self.np_random.integers(256))
        return np.broadcast_to(np.array(numbers, dtype=np.uint8), (SIZE, SIZE, 3)).copy()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t = 0
        self.episode += 1
        self.n_resets += 1
        return self._frame(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.action_space.contains(action), action
        self.t += 1
        self.n_steps += 1
        self.actions.append(int(action))
        return self._frame(), self.rewards[action] + self.bonus, self.t == self.length, False, {}

    def render(self) -> np.ndarray:
        return np.full((16, 16, 3), self.t, dtype=np.uint8)


def frame_envs(n_envs: int = 1, max_episode_steps: int | None = None, **kwargs: Any) -> VecEnv:
    """``FrameEnv`` several times, each with a time limit if one is given, in a ``DummyVecEnv`` with ``Monitor``."""

    def make_env() -> gym.Env:
        env: gym.Env = FrameEnv(**kwargs)
        return env if max_episode_steps is None else gym.wrappers.TimeLimit(env, max_episode_steps)

    return make_vec_env(make_env, n_envs=n_envs)


def frame_env(vec_env: VecEnv, index: int = 0) -> FrameEnv:
    """The ``FrameEnv`` inside all wrappers."""
    return vec_env.get_attr("unwrapped", index)[0]


class GradientSteps:
    """
    Records each gradient step of a model's three optimizers.

    :param model: The model to watch.
    """

    def __init__(self, model: IRIS) -> None:
        self.names: list[str] = []
        self.timesteps: list[int] = []
        self.learning_rates: list[float] = []
        for name in NETWORKS:
            optimizer: th.optim.Optimizer = getattr(model.policy, f"{name}_optimizer")

            def record(optimizer: th.optim.Optimizer, *_: Any, name: str = name) -> None:
                (learning_rate,) = {group["lr"] for group in optimizer.param_groups}
                self.names.append(name)
                self.timesteps.append(model.num_timesteps)
                self.learning_rates.append(float(learning_rate))

            optimizer.register_step_post_hook(record)


class EventLog(BaseCallback):
    """
    Writes down which of its methods were called, and stops at a step if asked to.

    :param stop_at: Env step at which to return False, None for never.
    """

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.stop_at = stop_at
        self.events: list[str] = []
        self.timesteps: list[int] = []

    def _on_training_start(self) -> None:
        self.events.append("training_start")

    def _on_rollout_start(self) -> None:
        self.events.append("rollout_start")

    def _on_step(self) -> bool:
        self.events.append("step")
        self.timesteps.append(self.num_timesteps)
        return self.num_timesteps != self.stop_at

    def _on_rollout_end(self) -> None:
        self.events.append("rollout_end")

    def _on_training_end(self) -> None:
        self.events.append("training_end")


def parameters(model: IRIS) -> dict[str, th.Tensor]:
    """A copy of all parameters and of all that the three optimizers remember, by name."""
    tensors = {name: value.clone() for name, value in model.policy.state_dict().items()}
    for network in NETWORKS:
        optimizer = getattr(model.policy, f"{network}_optimizer")
        for index, state in optimizer.state_dict()["state"].items():
            tensors.update({f"{network}_optimizer.{index}.{key}": value.clone() for key, value in state.items()})
    return tensors


def steps_in_buffer(model: IRIS) -> dict[str, np.ndarray]:
    """What is in the replay buffer, each (steps, n_envs, ...), oldest first as long as the buffer is not full."""
    buffer = model.replay_buffer
    names = ("observations", "actions", "rewards", "terminations", "truncations", "episode_starts")
    return {name: getattr(buffer, name)[: buffer.size()].copy() for name in names}


def assert_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    """The same names with bit-equal tensors or arrays."""
    assert first.keys() == second.keys() and len(first) > 0
    different = [name for name in first if not _equal(first[name], second[name])]
    assert not different, different


def differing(first: dict[str, Any], second: dict[str, Any]) -> set[str]:
    """First parts of the names of tensors or arrays that are not bit-equal."""
    assert first.keys() == second.keys()
    return {name.split(".")[0] for name in first if not _equal(first[name], second[name])}


def _equal(first: Any, second: Any) -> bool:
    """Whether tensors, on whichever devices, or arrays are bit-equal."""
    one, other = (value.cpu() if isinstance(value, th.Tensor) else value for value in (first, second))
    return np.array_equal(np.asarray(one), np.asarray(other))
