"""Random actions in collection."""

import numpy as np


class Exploration:
    """
    Epsilon-greedy exploration of several environments. With repeats it is the temporally-extended one of
    https://arxiv.org/abs/2006.01782: a random action is held for n steps, with a probability that falls with n squared.

    :param n_envs: Number of environments.
    """

    def __init__(self, n_envs: int) -> None:
        self._actions = np.zeros(n_envs, dtype=np.int64)
        self._steps_left = np.zeros(n_envs, dtype=np.int64)

    def __call__(
        self,
        actions: np.ndarray,
        episode_starts: np.ndarray,
        n_actions: int,
        rate: float,
        repeat: bool,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """
        :param actions: The policy's actions, (N,) int.
        :param episode_starts: Whether an episode begins with this step, (N,) bool; no action is held beyond an episode's end.
        :param n_actions: Number of the environments' actions.
        :param rate: Probability that exploration begins in a step of the policy's.
        :param repeat: Whether a random action is held for a random number of steps, or taken once.
        :param rng: Random stream.
        :return: The actions to take, (N,) int.
        """
        self._steps_left[episode_starts] = 0
        begins = (rng.random(len(actions)) < rate) & (self._steps_left == 0)
        self._actions = np.where(begins, rng.integers(n_actions, size=len(actions)), self._actions)
        self._steps_left[begins] = rng.zipf(2, size=begins.sum()) if repeat else 1
        explores = self._steps_left > 0
        self._steps_left[explores] -= 1
        return np.where(explores, self._actions, actions)
