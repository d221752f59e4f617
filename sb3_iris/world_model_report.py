"""How far the learned game can be trusted, by the number of steps imagined."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.type_aliases import GymEnv

from sb3_iris.validation import check_positive
from sb3_iris.world_model_env import make_game, warn_if_untrained

if TYPE_CHECKING:
    from sb3_iris.iris import IRIS


class WorldModelReport(NamedTuple):
    """
    How good the imagined game is, by horizon h = 1, 2, ...; all arrays (horizon,), NaN where there was nothing to measure.
    Errors are mean absolute errors of pixels in [0, 1].
    """

    n_segments: np.ndarray  # real segments of that length
    frame_error: np.ndarray  # of the imagined frame
    repeat_error: np.ndarray  # baseline: the first frame repeated
    reconstruction_error: np.ndarray  # floor: the tokenizer's reconstruction of the real frame
    token_accuracy: np.ndarray  # share of the frame's tokens that are those of the real frame
    reward_precision: np.ndarray  # of the imagined rewards that are not 0, the share with the real one's sign
    reward_recall: np.ndarray  # of the real rewards that are not 0, the share whose sign was imagined
    end_precision: np.ndarray  # of the imagined ends, the share that are real
    end_recall: np.ndarray  # of the real ends, the share that were imagined

    def table(self) -> str:
        """
        :return: The report as a table in Markdown.
        """
        header = "| horizon | segments | frame error | last frame repeated | reconstruction | token accuracy "
        header += "| reward precision | reward recall | end precision | end recall |"
        lines = [header, "|---" * 10 + "|"]
        for h, row in enumerate(zip(*self, strict=True), start=1):
            cells = [f"{int(row[0])}", *("-" if np.isnan(value) else f"{value:.4f}" for value in row[1:])]
            lines.append(f"| {h} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """
        Plot the report.

        :param path: Picture to write.
        :raises ImportError: If ``matplotlib`` is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Plots need the package matplotlib: pip install 'sb3_iris[extra]'") from error
        figure = Figure(figsize=(12, 4), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        horizons = np.arange(1, len(self.n_segments) + 1)
        labels = {
            "frame_error": "imagined",
            "repeat_error": "last real frame repeated",
            "reconstruction_error": "reconstruction",
        }
        for axes, title, names in (
            (left, "mean absolute error of pixels", labels),
            (middle, "share of right tokens", ("token_accuracy",)),
            (right, "precision and recall", ("reward_precision", "reward_recall", "end_precision", "end_recall")),
        ):
            for name in names:
                axes.plot(horizons, getattr(self, name), marker=".", label=labels.get(name, name.replace("_", " ")))
            axes.set(xlabel="horizon in steps", title=title, ylim=(0, None) if axes is left else (0, 1.02))
            axes.legend()
        figure.savefig(path)


def world_model_report(
    model: "IRIS",
    env: GymEnv,
    n_steps: int = 1_000,
    horizon: int = 20,
    temperature: float = 1.0,
    kept_frames: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> WorldModelReport:
    """
    Play new episodes in the real game, then from each of their frames imagine how they go on under the same actions
    (open loop: after the first frame nothing real but the actions is seen) and compare.

    :param model: The model; its policy plays the real game, with one action in ten at random.
    :param env: The real game, not the very environment that the model trains in, whose episode would break off; a vectorized
        one is played in parallel.
    :param n_steps: Real steps to play, over all environments; each is the start of a segment.
    :param horizon: Most steps to imagine.
    :param temperature: Temperature of the world model's sampling.
    :param kept_frames: See ``WorldModelVecEnv``.
    :param batch_size: Segments to imagine at a time.
    :param seed: Seed of the environment and of all sampling.
    :return: The report.
    """
    check_positive(n_steps=n_steps, horizon=horizon, batch_size=batch_size)
    make_game(model, temperature, None, kept_frames)  # errors before anything is played
    warn_if_untrained(model)
    rng = np.random.default_rng(seed)
    generator = th.Generator(model.policy.device).manual_seed(seed)
    episodes = _play(model, env, n_steps, rng, seed)
    starts = [(episode, t) for episode in episodes for t in range(len(episode.actions))]
    sums = np.zeros((horizon, len(SUMS)))
    for first in range(0, len(starts), batch_size):
        some = starts[first : first + batch_size]
        sums += measure(model, some, range(1, horizon + 1), temperature, generator, kept_frames)
    total = dict(zip(SUMS, sums.T, strict=True))

    def ratio(part: str, whole: str) -> np.ndarray:
        return np.divide(total[part], total[whole], out=np.full(horizon, np.nan), where=total[whole] > 0)

    return WorldModelReport(
        total["steps"].astype(np.int64),
        ratio("frame_error", "frames"),
        ratio("repeat_error", "frames"),
        ratio("reconstruction_error", "frames"),
        ratio("token_accuracy", "frames"),
        ratio("right_rewards", "imagined_rewards"),
        ratio("right_rewards", "real_rewards"),
        ratio("right_ends", "imagined_ends"),
        ratio("right_ends", "real_ends"),
    )


# What `measure` adds up over segments, by horizon
SUMS = (
    *("steps", "frames", "frame_error", "repeat_error", "reconstruction_error", "token_accuracy"),
    *("right_rewards", "imagined_rewards", "real_rewards", "right_ends", "imagined_ends", "real_ends"),
    *("same_rewards", "same_ends"),  # also where there is none
)


class Episode(NamedTuple):
    """A real episode or a part of one; the frame after its last action is not known."""

    images: np.ndarray  # (T, C, H, W) uint8 of the model's size
    actions: np.ndarray  # (T,)
    rewards: np.ndarray  # (T,)
    ends: np.ndarray  # (T,) bool, terminations


def _play(model: "IRIS", env: GymEnv, n_steps: int, rng: np.random.Generator, seed: int) -> list[Episode]:
    """Real episodes; those still running after ``n_steps`` are cut there."""
    vec_env = type(model)._wrap_env(maybe_make_env(env, 0), monitor_wrapper=False)
    if vec_env.action_space != model.action_space:
        raise ValueError(f"env has actions {vec_env.action_space}, but the model plays {model.action_space}")
    shape, ours = vec_env.observation_space.shape, (model.observation_space.shape, model.policy.image_space.shape)
    if shape not in ours:
        raise ValueError(f"env has observations of shape {shape}, but the model was made for {ours[0]}")
    policy_stream = model.policy._generator.get_state()  # a report in the middle of a run does not change the run
    model.policy.seed(seed)
    vec_env.seed(seed)
    observations, state = np.asarray(vec_env.reset()), None
    starts = np.ones(vec_env.num_envs, dtype=bool)
    running: list[list[tuple]] = [[] for _ in starts]
    episodes: list[Episode] = []
    for _ in range(0, n_steps, vec_env.num_envs):
        actions, state = model.predict(observations, state, starts, deterministic=False)
        explore = rng.random(len(actions)) < 0.1
        actions = np.where(explore, rng.integers(model.action_space.n, size=len(actions)), actions)
        images = np.array(model.policy.resize(observations))
        observations, rewards, starts, infos = vec_env.step(actions)  # type: ignore[assignment]
        for n, steps in enumerate(running):
            end = starts[n] and not infos[n].get("TimeLimit.truncated", False)
            steps.append((images[n], actions[n], rewards[n], end))
            if starts[n]:
                episodes.append(Episode(*map(np.stack, zip(*steps, strict=True))))
                steps.clear()
    episodes += [Episode(*map(np.stack, zip(*steps, strict=True))) for steps in running if steps]
    model.policy._generator.set_state(policy_stream)
    return episodes


@th.no_grad()
def measure(
    model: "IRIS",
    starts: list[tuple[Episode, int]],
    horizons: Sequence[int],
    temperature: float,
    generator: th.Generator,
    kept_frames: int | None,
) -> np.ndarray:
    """
    Imagine how episodes go on from some of their frames under the real actions, and compare.

    :param model: The model.
    :param starts: Episodes and the step of each to start from.
    :param horizons: Numbers of imagined steps after which to compare, rising.
    :param temperature: As for ``make_game``.
    :param generator: As there.
    :param kept_frames: As there.
    :return: (horizons, sums) float64, added up over ``starts``; ``SUMS`` names the columns.
    """
    policy = model.policy

    def real(column: int, t: int) -> np.ndarray:
        """Step t of each segment, the episode's last one where it is over by then."""
        return np.stack([episode[column][min(first + t, len(episode.actions) - 1)] for episode, first in starts])

    left = np.array([len(episode.actions) - first for episode, first in starts])  # steps of each segment
    first_frames = policy.to_frames(real(0, 0))
    # Frames are decoded where they are compared
    game = make_game(model, temperature, generator, kept_frames, observe=lambda tokens: tokens)
    game.reset(policy.tokenizer.encode(first_frames))
    sums = []
    for t in range(max(horizons)):
        rewards, ends, _ = game.step(th.as_tensor(real(1, t), device=policy.device))
        if t + 1 not in horizons:
            continue
        played = left > t
        real_frames = policy.to_frames(real(0, t + 1))
        real_tokens = policy.tokenizer.encode(real_frames)
        has_frame = th.as_tensor(left > t + 1, device=policy.device)

        def error(frames: th.Tensor, real_frames: th.Tensor = real_frames, has_frame: th.Tensor = has_frame) -> float:
            return ((frames - real_frames).abs().flatten(1).mean(1) * has_frame).sum().item()

        signs, real_signs = rewards.cpu().numpy(), np.sign(real(2, t))
        stops, real_stops = ends.cpu().numpy() & played, real(3, t) & played
        sums.append(
            (
                played.sum(),
                has_frame.sum().item(),
                error(policy.tokenizer.decode(game.tokens)),
                error(first_frames),
                error(policy.tokenizer.decode(real_tokens)),
                ((game.tokens == real_tokens).float().mean(1) * has_frame).sum().item(),
                (played & (signs == real_signs) & (real_signs != 0)).sum(),
                (played & (signs != 0)).sum(),
                (played & (real_signs != 0)).sum(),
                (stops & real_stops).sum(),
                stops.sum(),
                real_stops.sum(),
                (played & (signs == real_signs)).sum(),
                (played & (stops == real_stops)).sum(),
            )
        )
    return np.array(sums, dtype=np.float64)
