"""
Play the learned game in a window::

    python -m sb3_iris.play model.zip --env ALE/Breakout-v5
    python -m sb3_iris.play model.zip --env benchmarks.minatar_env:make_minatar --env-kwargs game=Breakout --agent

or, without a screen, write a video of it::

    python -m sb3_iris.play model.zip --env ALE/Breakout-v5 --real --agent --record breakout.gif

The environment gives the keys and the frames that games start from. Escape closes the window.
"""

import argparse
import ast
import contextlib
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.utils import check_for_correct_spaces, get_device
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_iris.atari_wrappers import make_atari_env
from sb3_iris.iris import IRIS
from sb3_iris.policies import RecurrentState
from sb3_iris.visualization import SHORTEST_SIDE, with_text, write_video
from sb3_iris.world_model_env import WorldModelEnv, digit_keys, reconstruct, to_images, to_rgb

WINDOW_HEIGHT = 320  # of a frame, in pixels


class Window(gym.Wrapper):
    """
    What the window shows of a game: its frame, or the real frame beside the model's reconstruction, enlarged, with the last
    action, the reward of the step and the return so far. With an agent, the keys do nothing.

    :param env: The game, learned or real.
    :param model: The model.
    :param real: Whether the game is the real one.
    :param agent: Whether the model's policy plays.
    :param height: Height of a frame in the window, in pixels, at least.
    """

    def __init__(
        self, env: gym.Env, model: IRIS, real: bool = False, agent: bool = False, height: int = WINDOW_HEIGHT
    ) -> None:
        super().__init__(env)
        self.model = model
        self.real = real
        self.agent = agent
        self.height = height

    @property
    def render_mode(self) -> str:  # type: ignore[override]
        return "rgb_array"

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self.observation, info = self.env.reset(**kwargs)
        self.state: RecurrentState | None = None
        self.total = 0.0
        self.lines = ["", "return 0"]
        return self.observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if self.agent:
            action, self.state = self.model.predict(np.asarray(self.observation), self.state)  # type: ignore[assignment]
        self.observation, reward, terminated, truncated, info = self.env.step(int(action))
        self.total += float(reward)
        self.lines = [f"action {int(action)}  reward {float(reward):+.3g}", f"return {self.total:.3g}"]
        return self.observation, reward, terminated, truncated, info

    def render(self) -> np.ndarray:  # type: ignore[override]
        observation = np.asarray(self.observation)[None]
        frames = [to_rgb(to_images(self.model.policy, observation)[0])]
        if self.real:
            frames.append(to_rgb(reconstruct(self.model, observation)[0]))
        factor = -(-self.height // frames[0].shape[0])
        image = np.concatenate([frame.repeat(factor, axis=0).repeat(factor, axis=1) for frame in frames], axis=1)
        return with_text(image, self.lines, n_lines=2)


def keys_to_action(env: gym.Env) -> dict[Any, int]:
    """
    :param env: A game, learned or real.
    :return: Actions by the keys pressed, for ``gymnasium.utils.play``: those that the game names itself, else digits.
    """
    if env.has_wrapper_attr("get_keys_to_action"):
        return env.get_wrapper_attr("get_keys_to_action")()
    assert isinstance(env.action_space, gym.spaces.Discrete)
    return digit_keys(int(env.action_space.n))


def describe(keys: dict[Any, int]) -> str:
    """
    :param keys: What ``keys_to_action`` gave: actions by a key, a code, or a combination of them.
    :return: It in words.
    """
    import pygame

    def name(key: str | int) -> str:
        return pygame.key.name(ord(key) if isinstance(key, str) else key)

    combinations = [key if isinstance(key, tuple | str) else (key,) for key in keys]
    words = ["+".join(map(name, combination)) for combination in combinations]
    return ", ".join(f"{word}: {action}" for word, action in zip(words, keys.values(), strict=True))


def make_env(name: str, kwargs: dict[str, Any], observation_space: gym.spaces.Space) -> gym.Env:
    """
    :param name: A name registered with Gymnasium, or ``module:function``.
    :param kwargs: Arguments of the environment or the function.
    :param observation_space: What the model sees: an Atari game has the preprocessing of this package unless the model is one
        of images of another size, as of those that Gymnasium gives by this name.
    :return: The real game.
    :raises ValueError: If the function returns a vector environment.
    """
    module, _, function = name.partition(":")
    if function and callable(getattr(importlib.import_module(module), function, None)):
        env = getattr(importlib.import_module(module), function)(**kwargs)
        if isinstance(env, VecEnv):
            raise ValueError(f"--env {name} makes a {type(env).__name__}: name a function that returns a single environment")
        return env
    if not name.startswith("ALE/"):
        return gym.make(name, **kwargs)
    atari = make_atari_env(name, **{"evaluation": True, **kwargs})
    assert isinstance(atari, DummyVecEnv) and atari.observation_space.shape is not None
    height, width, channels = atari.observation_space.shape
    return atari.envs[0] if observation_space.shape == (channels, height, width) else gym.make(name, **kwargs)


def model_parser(**kwargs: Any) -> argparse.ArgumentParser:
    """
    :param kwargs: Arguments of ``ArgumentParser``.
    :return: A parser of what all programs ask for that take a model and its real game, see ``parse_model_args``.
    """
    parser = argparse.ArgumentParser(**kwargs)
    parser.add_argument("model", help="a file that IRIS.save wrote")
    parser.add_argument("--env", required=True, help="the real game: a name registered with Gymnasium, or module:function")
    parser.add_argument("--env-kwargs", nargs="*", default=[], metavar="NAME=VALUE", help="its arguments")
    parser.add_argument("--seed", type=int, help="makes what happens reproducible (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="where the networks are (default: %(default)s)")
    return parser


def parse_model_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """
    :param parser: What ``model_parser`` gave, perhaps with more arguments.
    :param argv: The command line; the program's own if None.
    :return: Its arguments, ``env_kwargs`` as a dictionary. What is wrong ends the program with a word about it.
    """
    args = parser.parse_args(argv)
    pairs = [pair.partition("=") for pair in args.env_kwargs]
    if not all(separator for _, separator, _ in pairs):
        parser.error(f"--env-kwargs {' '.join(args.env_kwargs)}: write each as NAME=VALUE")
    args.env_kwargs = {name: literal(value) for name, _, value in pairs}
    try:
        get_device(args.device)
    except RuntimeError as error:
        parser.error(f"--device {args.device}: {error}")
    return args


@contextlib.contextmanager
def errors_in_words() -> Iterator[None]:
    """What is wrong with the model, or with the game and its arguments, ends the program without a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, gym.error.Error) as error:
        raise SystemExit(f"error: {error}") from error


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = model_parser(prog="python -m sb3_iris.play", description="Play the learned game in a window.")
    parser.add_argument("--agent", action="store_true", help="let the policy play")
    parser.add_argument("--real", action="store_true", help="play the real game, beside what the model makes of its frames")
    parser.add_argument("--fps", type=int, default=10, help="steps per second (default: %(default)s)")
    parser.add_argument("--zoom", type=float, default=1.0, help="size of the window (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the world model's sampling (default: %(default)s)")
    parser.add_argument("--record", metavar="FILE", help="write one game as a video, .gif or .mp4, and open no window")
    parser.add_argument(
        "--max-episode-steps", type=int, default=1_000, help="of the learned game, and in a video (default: %(default)s)"
    )
    args = parse_model_args(parser, argv)
    for name in ("fps", "max_episode_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: it must be at least 1")
    if not args.zoom > 0:
        parser.error(f"--zoom {args.zoom}: it must be above 0")
    if args.record:
        if not args.agent:
            parser.error(f"--record {args.record}: without a window there are no keys, so add --agent")
        if Path(args.record).suffix not in (".gif", ".mp4") or not Path(args.record).absolute().parent.is_dir():
            parser.error(f"--record {args.record}: name a file that ends in .gif or .mp4, in a folder that there is")
    return args


def literal(text: str) -> Any:
    """A number, a bool, None or a list as in Python; anything else is a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def make_window(args: argparse.Namespace) -> tuple[Window, dict[Any, int]]:
    """
    :param args: What ``parse_args`` gave.
    :return: The game as the window shows it, and its keys.
    """
    model = IRIS.load(args.model, device=args.device)
    real = make_env(args.env, args.env_kwargs, model.observation_space)
    check_for_correct_spaces(model._wrap_env(real, monitor_wrapper=False), model.observation_space, model.action_space)
    keys = keys_to_action(real)
    env: gym.Env = real
    if not args.real:
        starts = np.stack([real.reset(seed=None if args.seed is None else args.seed + n)[0] for n in range(8)])
        env = WorldModelEnv(
            model,
            start_observations=starts,
            temperature=args.temperature,
            max_episode_steps=args.max_episode_steps,
        )
    window = Window(env, model, args.real, args.agent, SHORTEST_SIDE if args.record else WINDOW_HEIGHT)
    if args.seed is not None:
        model.policy.seed(args.seed)
        window.reset(seed=args.seed)  # once: `play` would start all games from the same seed
    return window, keys


def record(window: Window, max_steps: int) -> np.ndarray:
    """
    :param window: A game that the agent plays.
    :param max_steps: Steps after which the video ends, if the game does not.
    :return: What the window shows of one game, (T, height, width, 3) uint8.
    """
    window.reset()
    frames, ended = [window.render()], False
    while not ended and len(frames) <= max_steps:
        _, _, terminated, truncated, _ = window.step(0)
        frames.append(window.render())
        ended = terminated or truncated
    return np.stack(frames)


def main(argv: Sequence[str] | None = None) -> None:
    """Open the window, and return when it is closed; or write a video."""
    args = parse_args(argv)
    if not args.record:
        try:
            import pygame  # noqa: F401
        except ImportError as error:
            raise SystemExit("Playing needs the package pygame-ce: pip install 'sb3_iris[extra]'") from error
    with errors_in_words():
        window, keys = make_window(args)
    if args.record:
        write_video(args.record, record(window, args.max_episode_steps), args.fps)
        print(f"Wrote {args.record}: return {window.total:.3g}")
        return
    from gymnasium.utils.play import play

    if args.agent:
        print("The policy plays; Escape closes the window.")
    else:
        print(f"Keys and their actions: {describe(keys)}; Escape closes the window.")
    play(window, fps=args.fps, zoom=args.zoom, keys_to_action={} if args.agent else keys)


if __name__ == "__main__":
    main()
