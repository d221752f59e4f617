"""MinAtar's games as images: ten by ten pixels in the colours of MinAtar's own renderer, or its planes as channels."""

from typing import Any

import gymnasium as gym
import minatar.gym
import numpy as np
from gymnasium import spaces

minatar.gym.register_envs()


class RenderedObservation(gym.ObservationWrapper):
    """
    Shows what MinAtar renders, (10, 10, 3) uint8, in place of its binary planes.

    :param env: A MinAtar game made with ``render_mode="rgb_array"``.
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.observation_space = spaces.Box(0, 255, (10, 10, 3), dtype=np.uint8)

    def observation(self, observation: Any) -> np.ndarray:
        return np.round(255 * np.asarray(self.env.render())).astype(np.uint8)

    def get_keys_to_action(self) -> dict[tuple[int, ...], int]:
        """
        :return: MinAtar's actions by pygame's codes of the arrows and the space bar.
        """
        import pygame

        keys = {"l": pygame.K_LEFT, "r": pygame.K_RIGHT, "u": pygame.K_UP, "d": pygame.K_DOWN, "f": pygame.K_SPACE}
        game: Any = self.env.unwrapped
        names = [game.game.env.action_map[index] for index in game.action_set]
        return {(keys[name],): action for action, name in enumerate(names) if name in keys}


class PlanesObservation(gym.ObservationWrapper):
    """
    Shows MinAtar's binary planes, one for each kind of object, as the channels of an image: (planes, 10, 10) uint8, 0 or 255.

    :param env: A MinAtar game.
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        assert env.observation_space.shape is not None
        height, width, planes = env.observation_space.shape
        self.observation_space = spaces.Box(0, 255, (planes, height, width), dtype=np.uint8)

    def observation(self, observation: Any) -> np.ndarray:
        return 255 * np.asarray(observation).transpose(2, 0, 1).astype(np.uint8)


def make_minatar(game: str, max_episode_steps: int = 1_000, planes: bool = False) -> gym.Env:
    """
    :param game: MinAtar's name of the game, as in "Breakout" or "SpaceInvaders"; its minimal action set is used.
    :param max_episode_steps: Steps after which an episode is truncated.
    :param planes: Whether to show its planes instead of what it renders.
    :return: The game with image observations.
    """
    env = gym.make(f"MinAtar/{game}-v1", render_mode="rgb_array", max_episode_steps=max_episode_steps)
    return PlanesObservation(env) if planes else RenderedObservation(env)
