"""
The learned game as an environment, for Stable-Baselines3 (``WorldModelVecEnv``) and for Gymnasium (``WorldModelEnv``).

Nothing here reads an env: the frames that games start from come from the replay buffer or from the caller.
"""

import math
import warnings
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_iris.imagination import ImaginedGame
from sb3_iris.policies import CnnLstmPolicy
from sb3_iris.training_health import untrained
from sb3_iris.type_aliases import Observe
from sb3_iris.validation import check_positive

if TYPE_CHECKING:
    from sb3_iris.iris import IRIS


class WorldModelVecEnv(VecEnv):
    """
    Games played in a model's world model, a batch at a time on the model's device.

    Observations are decoded frames of the model's size, uint8 and channels first. Rewards are signs, -1, 0 or 1, as the world
    model learns them. An episode ends when the world model says so, or is truncated after ``max_episode_steps``. The
    frame after an end is never learned: the ``terminal_observation`` of an episode that was not truncated is a guess.

    The games are those of the model as it is now: training it further changes them. Images below 36 pixels are too small for
    the features extractor of SB3's ``CnnPolicy``; ``benchmarks/dream_ppo.py`` gives it another one.

    :param model: The model; its replay buffer gives the first frames, from all play that it holds.
    :param n_envs: Number of games.
    :param max_episode_steps: Steps after which an episode is truncated, None for never.
    :param temperature: Temperature of all sampling from the world model; 0 takes the most likely class.
    :param start_observations: Frames to start from instead, each as likely as the other: uint8 images of the environment's
        or the model's size, channels first or last, (n, C, H, W).
    :param kept_frames: Frames that stay in the world model's context when it is full; None for those of half the context,
        which reads far less anew than a window that slides with each step. Going on from 1 frame alone, as the paper's
        imagination does, saves little more and forgets what a frame does not show.
    :param render_mode: ``"rgb_array"`` or None.
    :param seed: Seed of the first ``reset``; see ``seed`` for later ones.
    :raises ValueError: If an argument does not fit, or there is no frame to start from.
    """

    def __init__(
        self,
        model: "IRIS",
        n_envs: int = 1,
        max_episode_steps: int | None = 1_000,
        temperature: float = 1.0,
        start_observations: np.ndarray | None = None,
        kept_frames: int | None = None,
        render_mode: str | None = "rgb_array",
        seed: int | None = None,
    ) -> None:
        check_positive(n_envs=n_envs, **{} if max_episode_steps is None else {"max_episode_steps": max_episode_steps})
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode={render_mode!r} must be 'rgb_array' or None")
        policy = model.policy
        self.render_mode: str | None = render_mode
        super().__init__(n_envs, policy.image_space, model.action_space)
        self.model: IRIS = model
        self.max_episode_steps: int | None = max_episode_steps
        self.start_images: np.ndarray | None = None
        if start_observations is not None:
            try:
                self.start_images = to_images(policy, start_observations)
            except ValueError as error:
                raise ValueError(f"start_observations does not fit the model: {error}") from error
        if self.start_images is None and model.replay_buffer.size() == 0:
            raise ValueError(
                "start_observations=None, but the model's replay buffer is empty: give frames to start from, or load the "
                "buffer with load_replay_buffer()"
            )
        warn_if_untrained(model)
        self._generator: th.Generator = th.Generator(device=policy.device)
        self._generator.manual_seed(int(np.random.default_rng().integers(2**63)))
        self._rng: np.random.Generator = np.random.default_rng()
        self.game: ImaginedGame = make_game(model, temperature, self._generator, kept_frames)
        self._actions: np.ndarray | None = None
        self._observations: np.ndarray | None = None  # (N, C, H, W) uint8, None before the first reset
        self._steps: np.ndarray = np.zeros(n_envs, dtype=np.int64)  # since the start of each episode
        if seed is not None:
            self.seed(seed)

    def reset(self) -> VecEnvObs:
        """
        Start all games.

        :return: (N, C, H, W) uint8, the first frames as the tokenizer reconstructs them
        """
        seed = self._seeds[0]
        if seed is not None:
            # Two streams of one seed: which frames to start from, and what the world model says
            first, second = np.random.SeedSequence(seed).spawn(2)
            self._rng = np.random.default_rng(first)
            self._generator.manual_seed(int(second.generate_state(1, np.uint64)[0]) >> 1)
        self._reset_seeds()
        self._reset_options()
        self._actions = None
        self._steps[:] = 0
        self._observations = to_bytes(self.game.reset(self._first_tokens(self.num_envs)))
        return self._observations.copy()

    def step_async(self, actions: np.ndarray) -> None:
        """
        :param actions: (N,) whole numbers, one action for each game
        :raises ValueError: If they are of another shape or kind, or no actions of the game.
        """
        actions = np.asarray(actions)
        n_actions = int(self.action_space.n)  # type: ignore[attr-defined]
        if actions.shape != (self.num_envs,) or actions.dtype.kind not in "iu":
            raise ValueError(
                f"actions has shape {actions.shape} and dtype {actions.dtype}, but must be {self.num_envs} whole numbers, "
                f"one for each of the {self.num_envs} games"
            )
        if not ((actions >= 0) & (actions < n_actions)).all():
            raise ValueError(f"actions={actions.tolist()} must lie in [0, {n_actions}), the actions of {self.action_space}")
        self._actions = actions.astype(np.int64)

    def step_wait(self) -> VecEnvStepReturn:
        """
        Play the step asked for. Games that are over begin anew.

        :return: Observations (N, C, H, W) uint8, rewards (N,) float32, dones (N,) bool and one info per game.
        """
        observations, rewards, ends, truncated = self.advance()
        dones = ends | truncated
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": bool(cut)} for cut in truncated]
        (over,) = dones.nonzero()
        if len(over) > 0:
            for n in over:
                infos[n]["terminal_observation"] = observations[n].copy()
            observations[over] = to_bytes(self.game.restart(over, self._first_tokens(len(over))))
            self._steps[over] = 0
            self._observations = observations
        return observations.copy(), rewards, dones, infos

    def advance(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """
        Play the step asked for with ``step_async``, whoever's game is over then.

        :return: Observations (N, C, H, W) uint8, rewards (N,) float32, ends (N,) bool, truncations (N,) bool without ends.
        """
        if self._observations is None or self._actions is None:
            raise RuntimeError("There is no step to play: call reset() first, then step()")
        rewards, ends, frames = self.game.step(th.as_tensor(self._actions, device=self.model.policy.device))
        assert frames is not None
        self._actions = None
        self._observations = to_bytes(frames)
        self._steps += 1
        ended = ends.cpu().numpy()
        too_long = np.zeros_like(ended) if self.max_episode_steps is None else self._steps >= self.max_episode_steps
        return self._observations, rewards.cpu().numpy(), ended, too_long & ~ended

    def _first_tokens(self, n_games: int) -> th.Tensor:
        """Tokens of frames to start from, (n_games, K)."""
        policy = self.model.policy
        images: Any
        if self.start_images is None:
            images = self.model.replay_buffer.sample(n_games, 1, self._rng).observations[:, 0]
        else:
            images = self.start_images[self._rng.integers(len(self.start_images), size=n_games)]
        return policy.tokenizer.encode(policy.to_frames(images))

    def get_images(self) -> Sequence[np.ndarray | None]:
        """
        :return: The current frame of each game, (H, W, 3) uint8.
        """
        if self._observations is None:
            raise RuntimeError("There is nothing to render: call reset() first")
        return [to_rgb(observation) for observation in self._observations]

    def close(self) -> None:
        """Nothing is open."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The games have no attributes of their own: gives that of the whole for each."""
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Sets an attribute of the whole; single games have none."""
        if len(list(self._get_indices(indices))) != self.num_envs:
            raise ValueError(f"indices={indices!r}: the games share all attributes, leave indices out to set {attr_name!r}")
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """The games are no objects with methods of their own."""
        raise AttributeError(f"Games in the world model have no method {method_name!r}")

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        """No game is wrapped."""
        return [False for _ in self._get_indices(indices)]


class WorldModelEnv(gym.Env):
    """
    One game played in a model's world model, as a Gymnasium environment; see ``WorldModelVecEnv``.

    :param model: The model.
    :param kwargs: Further arguments of ``WorldModelVecEnv``.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012
    action_space: spaces.Discrete

    def __init__(self, model: "IRIS", **kwargs: Any) -> None:
        if "n_envs" in kwargs:
            raise ValueError(f"n_envs={kwargs['n_envs']!r}: this is one game, use WorldModelVecEnv for more")
        self.vec_env = WorldModelVecEnv(model, 1, **kwargs)
        self.observation_space = self.vec_env.observation_space
        self.action_space = model.action_space
        self.render_mode = self.vec_env.render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """
        Start a game.

        :param seed: Seed of all that follows; None goes on with the random streams.
        :param options: None are known.
        :return: (C, H, W) uint8 and an empty info.
        """
        super().reset(seed=seed)
        if seed is not None:
            self.vec_env.seed(seed)
        return np.asarray(self.vec_env.reset())[0], {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """
        :param action: Action in [0, A).
        :return: Observation (C, H, W) uint8, reward in {-1, 0, 1}, terminated, truncated and an empty info.
        :raises ValueError: If it is no action of the game.
        """
        if not self.action_space.contains(action):
            raise ValueError(f"action={action!r} must be a whole number in [0, {self.action_space.n})")
        self.vec_env.step_async(np.asarray(action)[None])
        observations, rewards, ends, truncated = self.vec_env.advance()
        return observations[0].copy(), float(rewards[0]), bool(ends[0]), bool(truncated[0]), {}

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        """
        :return: (H, W, 3) uint8; None if made with ``render_mode=None``.
        """
        return None if self.render_mode is None else self.vec_env.get_images()[0]

    def get_keys_to_action(self) -> dict[Any, int]:
        """
        :return: Actions by the keys pressed, for ``gymnasium.utils.play``: the model's environment's own, else digits.
        """
        vec_env = self.vec_env.model.get_env()
        # Asked first, as a worker of SubprocVecEnv dies of a method that is not there
        if vec_env is not None and vec_env.has_attr("get_keys_to_action"):
            return vec_env.env_method("get_keys_to_action", indices=0)[0]
        return digit_keys(int(self.action_space.n))


class ReconstructedVecEnv(VecEnvWrapper):
    """
    Real games as a model sees them: resized to its size, encoded and decoded. Policies that were trained in the
    world model find the same kind of frames here.

    :param venv: The real games.
    :param model: The model.
    """

    def __init__(self, venv: VecEnv, model: "IRIS") -> None:
        super().__init__(venv, observation_space=model.policy.image_space)
        if venv.action_space != model.action_space:
            raise ValueError(f"venv has actions {venv.action_space}, but the model plays {model.action_space}")
        self.model: IRIS = model

    def reset(self) -> VecEnvObs:
        return reconstruct(self.model, np.asarray(self.venv.reset()))

    def step_wait(self) -> VecEnvStepReturn:
        observations, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            if "terminal_observation" in info:
                info["terminal_observation"] = reconstruct(self.model, info["terminal_observation"][None])[0]
        return reconstruct(self.model, np.asarray(observations)), rewards, dones, infos


def make_game(
    model: "IRIS",
    temperature: float = 1.0,
    generator: th.Generator | None = None,
    kept_frames: int | None = None,
    observe: Observe | None = None,
) -> ImaginedGame:
    """
    The core of all games here, which is that of the actor-critic's own imagination.

    :param model: The model.
    :param temperature: Temperature of all sampling from the world model; 0 takes the most likely class.
    :param generator: Random stream of the sampling, on the model's device; torch's global one if None.
    :param kept_frames: See ``WorldModelVecEnv``.
    :param observe: What the player sees of tokens; decoded frames if None.
    :return: The game, not started yet.
    :raises ValueError: If an argument does not fit.
    """
    if not (isinstance(temperature, Real) and 0 <= temperature < math.inf):
        raise ValueError(f"temperature={temperature!r} must be a finite number of at least 0")
    observe = observe or model.policy.tokenizer.decode
    game = model._imagined_game(observe, temperature=temperature, generator=generator)
    if kept_frames is not None:
        whole = isinstance(kept_frames, int | np.integer) and not isinstance(kept_frames, bool)
        if not (whole and 1 <= kept_frames <= game.max_frames):
            raise ValueError(
                f"kept_frames={kept_frames!r} must be None or a whole number from 1 to {game.max_frames}, one less "
                "than the steps in the world model's context"
            )
    game.kept_frames = game.max_frames // 2 + 1 if kept_frames is None else int(kept_frames)
    return game


def warn_if_untrained(model: "IRIS") -> None:
    """
    :param model: A model whose learned game somebody wants.
    """
    for name in untrained(model):
        warnings.warn(f"The {name} is untrained: the game will be noise. It is learned by model.learn().")


@th.no_grad()
def reconstruct(model: "IRIS", observations: np.ndarray) -> np.ndarray:
    """
    What a model makes of frames, by way of its tokens.

    :param model: The model.
    :param observations: (N, ...) uint8 images of the environment's or the model's size, channels first or last
    :return: (N, C, H, W) uint8 of the model's size
    """
    policy = model.policy
    return to_bytes(policy.tokenizer.decode(policy.tokenizer.encode(policy.to_frames(to_images(policy, observations)))))


def to_rgb(image: np.ndarray) -> np.ndarray:
    """
    :param image: (C, H, W) uint8; of more than three channels the last frame of a stack is shown, of four of which the last
        is 255 everywhere, as of RGBA, the first three.
    :return: (H, W, 3) uint8
    """
    if len(image) == 4 and (image[3] == 255).all():
        image = image[:3]
    n_channels = 3 if len(image) % 3 == 0 else 1
    return np.ascontiguousarray(np.broadcast_to(image[-n_channels:], (3, *image.shape[1:])).transpose(1, 2, 0))


def digit_keys(n_actions: int) -> dict[Any, int]:
    """
    :param n_actions: Number of actions A.
    :return: Keys 0 to 9, then a to z, for the actions in their order.
    """
    return {(key,): action for action, key in enumerate("0123456789abcdefghijklmnopqrstuvwxyz"[:n_actions])}


def to_bytes(frames: th.Tensor) -> np.ndarray:
    """
    :param frames: (N, C, H, W) float32 in [0, 1]
    :return: (N, C, H, W) uint8
    """
    return (255 * frames).round().to(th.uint8).cpu().numpy()


def to_images(policy: CnnLstmPolicy, observations: np.ndarray) -> np.ndarray:
    """
    :param policy: The networks.
    :param observations: (N, ...) uint8 images of the environment's or the networks' size, channels first or last
    :return: (N, C, H, W) uint8 of the networks' size
    """
    observations = np.asarray(observations)
    if observations.ndim != 4 or len(observations) == 0:
        raise ValueError(f"observations has shape {observations.shape}, but must be a batch of images with four axes")
    return policy._to_images(observations)[0]
