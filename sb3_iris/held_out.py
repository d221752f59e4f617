"""
The world model on steps that it has not been trained on, and the rewards of the real game beside those of the imagined one.

What has just been played is held out from all training so far, and nothing has to be taken away from training for that.
"""

import time
import warnings
from collections import Counter, deque
from typing import TYPE_CHECKING

import numpy as np
import torch as th

from sb3_iris.actor_critic import sample_categorical
from sb3_iris.buffers import SequenceReplayBuffer
from sb3_iris.frame_cache import TOGETHER
from sb3_iris.world_model_report import SUMS, Episode, measure

if TYPE_CHECKING:
    from sb3_iris.iris import IRIS

MOST_STEPS = 320  # read of a collection, and
MOST_SEGMENTS = 32  # imagined; at the README's laptop settings both take less than 2 % of the time of a training phase
HORIZON = 20  # imagined steps, as in the paper
LEAST_SEGMENTS = 8  # with a frame behind the last imagined step; the horizon is shorter where there are not as many
EPOCHS = 10  # over which rare events are added up
MISSED_REWARDS = 20  # real ones in a row that the world model has not predicted, from which on it is warned of


class HeldOut:
    """
    Scores the steps just collected before they are trained on, and logs the figures. It draws from random streams of its
    own and changes nothing.

    Under ``held_out/``, one step ahead: segments of up to ``sequence_length`` steps are read as in training. The accuracies
    are those that training logs under ``world_model/``, and ``changed_token_accuracy``, that of tokens which are not as in
    the frame before: they are few in most games, and a world model that only copies knows none of them.

    Under ``held_out/imagined_``, ``HORIZON`` steps ahead, or as many as the episodes just played are long enough for
    (``held_out/horizon``): the game is imagined from a real frame under the real actions, past the context as in the policy's
    imagination, and compared after the last of these steps.

    Rewards that are not 0 and ends are rare, and a world model that is unsure of their moment never finds them the most
    likely class; what counts is whether they happen in imagination. So precision and recall are those of predictions that are
    sampled as there, one step ahead as well, added up over the last ``EPOCHS`` epochs. What is undefined is not logged.

    Beside ``actor_critic/imagined_reward`` stands ``actor_critic/real_reward``: the sum of reward signs over
    ``imagination_horizon`` real steps, or up to the episode's end if that comes first, mean over all windows completed in the
    last ``EPOCHS`` epochs. Both end where the episode does: what is imagined behind an end has no real
    counterpart. Windows that a time limit cuts short are left out. Real windows begin with every step of the latest play,
    imagined ones where training begins them, by default with steps of episodes drawn uniformly from the whole buffer.
    """

    def __init__(self) -> None:
        self._rare: deque[Counter[str]] = deque(maxlen=EPOCHS)
        self._windows: deque[tuple[float, int]] = deque(maxlen=EPOCHS)
        self._n_scored = 0
        self._missed_rewards = 0  # since one was predicted
        self._warned = False

    @th.no_grad()
    def look(self, model: "IRIS", n_steps: int) -> None:
        """
        To be called between a collection and its training phase.

        :param model: The model.
        :param n_steps: Env steps collected, over all environments.
        """
        buffer = model.replay_buffer
        n_rows = min(-(-n_steps // model.n_envs), buffer.size())
        if n_rows == 0:  # all of the epoch's steps were collected before the run was resumed
            return
        self._windows.append(real_rewards(buffer, n_rows, model.imagination_horizon))
        total, n_windows = map(sum, zip(*self._windows, strict=True))
        trains = model.actor_critic_gradient_steps > 0 and model.num_timesteps >= model.actor_critic_learning_starts
        if trains and n_windows > 0:
            model.logger.record("actor_critic/real_reward", total / n_windows)
        if model.policy.world_model_optimizer.state:  # it has been trained
            start = time.perf_counter()
            self._score(model, pieces(buffer, n_rows))
            model.logger.record("time/held_out_seconds", time.perf_counter() - start)

    def _score(self, model: "IRIS", parts: np.ndarray) -> None:
        """Log the figures of the world model on parts of episodes."""
        n_added = model.replay_buffer.n_added
        rng = np.random.default_rng(n_added)
        generator = th.Generator(model.policy.device).manual_seed(n_added)
        rare: Counter[str] = Counter()
        T = model.sequence_length
        figures = _read(model, _cut(parts, T, rng)[: max(MOST_STEPS // T, 1)], rare, generator)

        horizon = _longest_horizon(parts[:, 2])
        segments = _cut(parts, horizon, rng, overlapping=True)[:MOST_SEGMENTS]
        episodes = [(_episode(model.replay_buffer, *segment), 0) for segment in segments]
        sums = dict(zip(SUMS, measure(model, episodes, [horizon], 1.0, generator, kept_frames=1)[0], strict=True))
        figures["horizon"] = horizon
        for name, right, all_of in (
            ("token", "token_accuracy", "frames"),
            ("reward", "same_rewards", "steps"),
            ("end", "same_ends", "steps"),
        ):
            if sums[all_of] > 0:
                figures[f"imagined_{name}_accuracy"] = float(sums[right] / sums[all_of])
        for name in ("reward", "end"):
            rare[f"imagined_{name} right"] = int(sums[f"right_{name}s"])
            rare[f"imagined_{name} predicted"] = int(sums[f"imagined_{name}s"])
            rare[f"imagined_{name} real"] = int(sums[f"real_{name}s"])

        self._rare.append(rare)
        total: Counter[str] = Counter()
        for counts in self._rare:
            total.update(counts)
        for name in ("reward", "end", "imagined_reward", "imagined_end"):
            for figure, whole in (("precision", "predicted"), ("recall", "real")):
                if total[f"{name} {whole}"] > 0:
                    figures[f"{name}_{figure}"] = total[f"{name} right"] / total[f"{name} {whole}"]
        for name, value in figures.items():
            model.logger.record(f"held_out/{name}", value)
        self._warn(model, rare)

    def _warn(self, model: "IRIS", rare: Counter[str]) -> None:
        """Say so once if the world model predicts no rewards though it has been trained for some phases."""
        self._n_scored += 1
        self._missed_rewards = 0 if rare["reward right"] else self._missed_rewards + rare["reward real"]
        if self._n_scored >= EPOCHS and self._missed_rewards >= MISSED_REWARDS and not self._warned:
            self._warned = True
            way_out = "" if model.policy.tokenizer.robust else "policy_kwargs=dict(robust_tokenizer=True), or "
            warnings.warn(
                f"The world model does not see rewards coming: it has been trained in {self._n_scored} phases, but of the "
                f"last {self._missed_rewards} rewards that it had not been trained on it predicted none one step ahead. In "
                "imagination the policy then gets none either and learns nothing. If tokenizer/moving_error is high, what "
                f"rewards depend on is lost before the world model: try {way_out}a larger codebook_size; else raise "
                "world_model_gradient_steps, or learning_rate"
            )


def real_rewards(buffer: SequenceReplayBuffer, n_rows: int, horizon: int) -> tuple[float, int]:
    """
    Rewards of as many real steps as are imagined.

    :param buffer: The buffer.
    :param n_rows: Newest steps of each environment.
    :param horizon: Steps in a window.
    :return: Sums of reward signs of the windows that these steps complete, by their length or by an end, and their number.
    """
    total, n_windows, first_new = 0.0, 0, buffer.size() - n_rows
    episodes = buffer.episodes
    for env, first, length in episodes[episodes[:, 1] + episodes[:, 2] > first_new]:
        last = first + length
        steps = np.arange(max(first, first_new - horizon + 1), last)
        rows = buffer._locate(steps, np.ones(len(steps), dtype=bool))
        sums = np.append(0.0, np.sign(buffer.rewards[rows, env]).cumsum())
        n_full = max(len(steps) - horizon + 1, 0)
        n_starts = len(steps) if buffer.terminations[rows[-1], env] else n_full
        starts = np.arange(n_starts)
        total += float((sums[np.minimum(starts + horizon, len(steps))] - sums[starts]).sum())
        n_windows += n_starts
    return total, n_windows


def pieces(buffer: SequenceReplayBuffer, n_rows: int) -> np.ndarray:
    """
    :param buffer: The buffer.
    :param n_rows: Newest steps of each environment.
    :return: What these have of each episode, (parts, 3) int64 like ``buffer.episodes``.
    """
    envs, firsts, lengths = buffer.episodes.T
    begins = np.maximum(firsts, buffer.size() - n_rows)
    parts = np.stack([envs, begins, firsts + lengths - begins], axis=1)
    return parts[parts[:, 2] > 0]


def _longest_horizon(lengths: np.ndarray) -> int:
    """The most steps, up to ``HORIZON``, for which parts of these lengths have enough segments; at least 1."""
    horizon = HORIZON
    while horizon > 1 and np.maximum(lengths - horizon, 0).sum() < LEAST_SEGMENTS:
        horizon -= 1
    return horizon


def _cut(parts: np.ndarray, length: int, rng: np.random.Generator, overlapping: bool = False) -> np.ndarray:
    """
    Segments of parts of episodes in random order: such as lie end to end, of which the last of a part may be shorter, or
    with ``overlapping`` all of at least ``length`` steps, with the step behind them if there is one.
    """
    segments = []
    for env, first, n_steps in parts:
        starts = np.arange(n_steps - length + 1) if overlapping else np.arange(0, n_steps, length)
        lengths = np.minimum(length + overlapping, n_steps - starts)
        segments.append(np.stack([np.full(len(starts), env), first + starts, lengths], axis=1))
    return rng.permutation(np.concatenate(segments))


def _episode(buffer: SequenceReplayBuffer, env: int, first: int, length: int) -> Episode:
    rows = buffer._locate(np.arange(first, first + length), np.ones(length, dtype=bool))
    arrays = (buffer.observations, buffer.actions, buffer.rewards, buffer.terminations)
    return Episode(*(array[rows, env] for array in arrays))


def _read(model: "IRIS", segments: np.ndarray, rare: Counter[str], generator: th.Generator) -> dict[str, float]:
    """Accuracies one step ahead, teacher-forced; counts of rare events go to ``rare``."""
    buffer, policy = model.replay_buffer, model.policy
    envs, firsts, lengths = segments.T
    steps = firsts[:, None] + np.arange(model.sequence_length)
    samples = buffer._segments(steps, envs, steps < (firsts + lengths)[:, None])
    frames = samples.observations.flatten(0, 1).split(TOGETHER)
    tokens = th.cat([policy.tokenizer.encode(policy.to_frames(part)) for part in frames]).unflatten(0, steps.shape)
    _, logs = policy.world_model.loss(tokens, *samples[1:])
    output = policy.world_model(tokens, samples.actions)
    rewards = sample_categorical(output.reward_logits, 1.0, generator) - 1
    ends = sample_categorical(output.end_logits, 1.0, generator)
    for name, real, predicted in (("reward", samples.rewards.sign(), rewards), ("end", samples.terminations, ends)):
        rare[f"{name} right"] = int(((predicted == real) & (real != 0) & samples.mask).sum())
        rare[f"{name} predicted"] = int(((predicted != 0) & samples.mask).sum())
        rare[f"{name} real"] = int(((real != 0) & samples.mask).sum())
    figures = {f"{name}_accuracy": logs[f"{name}_accuracy"].item() for name in ("token", "reward", "end")}
    K = tokens.shape[-1]
    after_first = output.token_logits[:, K - 1 : -1].argmax(-1).unflatten(1, (-1, K))  # (B, T - 1, K)
    changed = (tokens[:, 1:] != tokens[:, :-1]) & samples.mask[:, 1:, None]
    if changed.any():
        figures["changed_token_accuracy"] = (after_first == tokens[:, 1:])[changed].float().mean().item()
    return figures
