"""Gymnasium's CarRacing as a game for algorithms that know rewards by their signs."""

from typing import SupportsFloat

import gymnasium as gym
from gymnasium.wrappers import MaxAndSkipObservation, TransformReward

NAME = "CarRacing-v3"
SETTINGS = {"continuous": False}


def wrap_car_racing(env: gym.Env) -> gym.Env:
    """
    Four frames a step, as in Atari games, so 250 steps a game. The reward is 1 in steps that come to new track, -1 where the
    car leaves the field, which ends the game, and 0 else: what each frame costs, a tenth of a point, is left out.

    :param env: CarRacing with five actions.
    :return: It, wrapped; a ``Monitor`` inside counts the game's own score.
    """
    return TransformReward(MaxAndSkipObservation(env, skip=4), _sign)


def make_car_racing() -> gym.Env:
    """
    :return: CarRacing as the networks see it, to play in.
    """
    return wrap_car_racing(gym.make(NAME, **SETTINGS))


def _sign(reward: SupportsFloat) -> float:
    return float(float(reward) > 0) - float(float(reward) < -50)
