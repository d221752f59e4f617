"""A game that tiny networks learn in seconds, and a model that has learned it."""

import functools
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.env_util import make_vec_env

from sb3_iris import IRIS
from tests.presets import SETTINGS, SIZE, SIZES

LENGTH = 4  # cells of the corridor


class Corridor(gym.Env):
    """
    A bright cell in a corridor. Action 1 moves it right, action 0 left; past the right end there is reward 1, past the left
    end reward -1, and both end the episode.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)

    def __init__(self, render_mode: str | None = None) -> None:
        self.action_space = gym.spaces.Discrete(2)
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.position = int(self.np_random.integers(LENGTH))
        return corridor_frame(self.position), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.position += 1 if action == 1 else -1
        reward = float(self.position == LENGTH) - float(self.position == -1)
        return corridor_frame(self.position), reward, reward != 0, False, {}

    def render(self) -> np.ndarray:
        return corridor_frame(self.position)

    def get_keys_to_action(self) -> dict[Any, int]:
        return {("a",): 0, ("d",): 1}


def corridor_frame(position: int) -> np.ndarray:
    """(SIZE, SIZE, 3) uint8; past an end all is dark."""
    frame = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    if 0 <= position < LENGTH:
        frame[:, 2 * position : 2 * position + 2] = 255
    return frame


def corridor_images(*positions: int) -> np.ndarray:
    """(n, 3, SIZE, SIZE) uint8."""
    return np.stack([corridor_frame(position).transpose(2, 0, 1) for position in positions])


def position_in(image: np.ndarray) -> int:
    """Where the bright cell is in a (3, SIZE, SIZE) image, by the mean of each cell."""
    return int(image.mean(axis=(0, 1)).reshape(LENGTH, 2).mean(1).argmax())


@functools.cache
def learned_model() -> IRIS:
    """A model whose tokenizer and world model have learned the corridor, its policy has not. Not to be trained."""
    return model_of(Corridor)


def model_of(game: type[gym.Env], **kwargs: Any) -> IRIS:
    """A model whose tokenizer and world model have learned a game as small as the corridor, its policy has not."""
    settings: dict[str, Any] = {
        **SETTINGS,
        "buffer_size": 1_000,
        "learning_rate": 3e-3,
        "train_freq": 600,
        "exploration_rate": 1.0,
        "final_training_epochs": 0,
        "tokenizer_batch_size": 32,
        "tokenizer_gradient_steps": 150,
        "world_model_batch_size": 32,
        "world_model_gradient_steps": 400,
        "actor_critic_gradient_steps": 0,
        **kwargs,
    }
    sizes = {**SIZES, "robust_tokenizer": True, "embed_dim": 32, "dropout": 0.0}
    model = IRIS("CnnPolicy", make_vec_env(game, 4, seed=0), policy_kwargs=sizes, **settings)
    return model.learn(600)
