"""
The replay buffer: transitions of all environments in a ring, sampled as padded segments of episodes.

What belongs together, for one environment whose episode ends with step 2::

    index                 0     1     2  |  3     4
    observations          o0    o1    o2 |  o3    o4      o3 is the first frame of the next episode
    actions               a0    a1    a2 |  a3    a4      taken on the observation of the same index
    rewards               r0    r1    r2 |  r3    r4      received for the action of the same index
    terminations          0     0     1  |  0     0       1: the env terminated on that action (2 may be a truncation instead)
    episode_starts        1     0     0  |  1     0

Vectorised environments reset by themselves, so the frame after an episode's last action is not stored.
"""

from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.vec_env import VecNormalize

from sb3_iris.archive import ArrayFile, write_arrays
from sb3_iris.frame_cache import FrameCache
from sb3_iris.type_aliases import ContextSamples, Observe, SequenceSamples, TokenSamples
from sb3_iris.validation import check_memory

Encode = Callable[[np.ndarray], th.Tensor]

BLOCK_STEPS = 1_000  # in a block of frames in a file; bounds the memory that reading and writing take
OUTCOMES = {"actions": np.int64, "rewards": np.float32, "terminations": bool, "truncations": bool, "episode_starts": bool}


def seen_bytes(device: th.device) -> int:
    """
    :param device: Where the networks are.
    :return: Bytes of memory there in which to keep what the actor-critic sees of frames, at most. A GPU gives more, as little
        else is in its memory while the actor-critic is trained, and frames that find no room are decoded anew each time.
    """
    if device.type == "cuda":
        return min(2**32, th.cuda.get_device_properties(device).total_memory // 4)
    return 2**30


class Starts(NamedTuple):
    """How many segments of a batch begin at particular steps, rather than anywhere in the buffer."""

    n_recent: int = 0  # in the last steps, all of which are drawn alike
    recent_steps: int = 1  # how many of each environment those are
    n_rewarded: int = 0  # before a reward that is not 0, all of which are drawn alike; anywhere as long as there is none
    reward_within: int = 1  # steps from the first step, in which it comes, that one included


EVERYWHERE = Starts()


class SequenceReplayBuffer(BaseBuffer):
    """
    Replay buffer of frames, actions, rewards, terminations and truncations that samples segments of single episodes.

    Frames are kept once each, as uint8: 100,000 steps of 64x64 RGB take 1.2 GB. Memory is taken as the buffer fills, and
    asked for when it is first used, see ``allocate``: a model that only plays needs none. Once full, the oldest steps of each
    environment are overwritten; what is left of their episode stays in use.

    :param buffer_size: Most steps to keep, over all environments.
    :param observation_space: uint8 images, (C, H, W).
    :param action_space: Discrete actions.
    :param device: Where samples go.
    :param n_envs: Number of environments.
    :param uniform: Whether all steps are drawn alike; else an episode is drawn first.
    """

    _arrays = ("observations", *OUTCOMES)
    observations: np.ndarray  # (buffer_size, N, C, H, W) uint8; the others are (buffer_size, N)
    actions: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray
    episode_starts: np.ndarray

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Discrete,
        device: th.device | str = "auto",
        n_envs: int = 1,
        uniform: bool = False,
    ) -> None:
        super().__init__(buffer_size, observation_space, action_space, device, n_envs=n_envs)
        self.uniform = uniform
        self.buffer_size = max(buffer_size // n_envs, 1)
        self.n_actions = int(action_space.n)
        self.n_added = 0  # steps of each environment since the last reset; step i lies in row i % buffer_size
        self.stored: Any = None  # what a checkpoint folder already has of the frames, see `checkpoints.py`
        self._episodes: np.ndarray | None = None  # (episodes, 3) int64, see `episodes`; None once it is out of date
        self._rewarded: np.ndarray | None = None  # (n, 2) int64, see `rewarded`; the same
        self._make_caches()

    def allocate(self) -> None:
        """
        Ask for the memory of a full buffer, unless that was done before.

        :raises ValueError: If the machine does not have it.
        """
        if "observations" in self.__dict__:
            return
        shape = (self.buffer_size, self.n_envs)
        bytes_per_step = int(np.prod(self.obs_shape)) + sum(np.dtype(dtype).itemsize for dtype in OUTCOMES.values())
        check_memory(self.buffer_size * self.n_envs, self.buffer_size * self.n_envs * bytes_per_step)
        for name, dtype in OUTCOMES.items():
            setattr(self, name, np.zeros(shape, dtype=dtype))
        self.observations = np.zeros((*shape, *self.obs_shape), dtype=np.uint8)

    def __getattr__(self, name: str) -> Any:
        if name not in type(self)._arrays:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.allocate()
        return self.__dict__[name]

    def _make_caches(self) -> None:
        """Of tokens and of what the actor-critic sees of them; the frame of row i and environment n has index i N + n."""
        self._tokens = FrameCache(self.buffer_size * self.n_envs)
        self._seen = FrameCache(self.buffer_size * self.n_envs, seen_bytes)

    def to(self, device: th.device) -> None:
        """
        :param device: Where samples go from now on.
        """
        self.device = device
        self._make_caches()

    def reset(self) -> None:
        """Forget all steps."""
        super().reset()
        self.n_added = 0
        self.stored = None
        self._episodes = self._rewarded = None
        self.forget_tokens()

    def add(  # type: ignore[override]
        self,
        obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        episode_start: np.ndarray,
    ) -> None:
        """
        Add one step of every environment.

        :param obs: (N, C, H, W) uint8, what the action was taken on
        :param action: (N,) int
        :param reward: (N,) float
        :param terminated: (N,) bool, whether the environment reached an end of its own
        :param truncated: (N,) bool, whether the episode was cut off, by a time limit for instance
        :param episode_start: (N,) bool, whether ``obs`` is the first frame of an episode
        """
        self.observations[self.pos] = obs
        self.actions[self.pos] = action
        self.rewards[self.pos] = reward
        self.terminations[self.pos] = terminated
        self.truncations[self.pos] = truncated
        self.episode_starts[self.pos] = episode_start
        self._episodes = self._rewarded = None
        for cache in (self._tokens, self._seen):
            cache.forget(self.pos * self.n_envs, (self.pos + 1) * self.n_envs)
        self._set_n_added(self.n_added + 1)

    def _set_n_added(self, n_added: int) -> None:
        self.n_added = n_added
        self.pos = n_added % self.buffer_size
        self.full = n_added >= self.buffer_size

    @property
    def episodes(self) -> np.ndarray:
        """
        Episodes in the buffer, running ones and ones that lost their first steps included.

        :return: (episodes, 3) int64: environment, first step counted from the oldest one in the buffer, length.
        """
        if self._episodes is None:
            starts = self._in_order(self.episode_starts).copy()
            starts[:1] = True  # the oldest step: here begins what is left of its episode
            envs, firsts = np.nonzero(starts.T)  # by environment, then by time
            lasts = np.append(firsts[1:], self.size())
            lasts[np.append(envs[1:] != envs[:-1], True)] = self.size()
            self._episodes = np.stack([envs, firsts, lasts - firsts], axis=1)
        return self._episodes

    @property
    def rewarded(self) -> np.ndarray:
        """
        Steps with a reward that is not 0.

        :return: (n, 2) int64: environment, step counted from the oldest one in the buffer.
        """
        if self._rewarded is None:
            self._rewarded = np.argwhere(self._in_order(self.rewards).T)
        return self._rewarded

    def sample(  # type: ignore[override]
        self, batch_size: int, sequence_length: int, rng: np.random.Generator, pad_left: bool = False
    ) -> SequenceSamples:
        """
        Sample segments: an episode is drawn uniformly, whatever its length, then a step of it; or, if ``uniform``, a step of
        all that there are. The segment begins with that step and is padded on the right past the episode's end or, with
        ``pad_left``, ends with that step and is padded on the left before the episode's start.

        :param batch_size: Number of segments B.
        :param sequence_length: Steps in a segment T.
        :param rng: Random stream of the draws.
        :param pad_left: Whether the step drawn is the segment's last one rather than its first.
        :return: The segments, on the buffer's device.
        """
        return self._segments(*self._draw(batch_size, sequence_length, rng, pad_left))

    def sample_tokens(
        self,
        batch_size: int,
        sequence_length: int,
        rng: np.random.Generator,
        encode: Encode,
        starts: Starts = EVERYWHERE,
    ) -> TokenSamples:
        """
        Sample segments as ``sample`` does, with the tokens of the frames in place of the frames. A frame is encoded when it
        is first drawn and never again, until ``forget_tokens`` is called; that costs 4 K + 1 bytes a frame.

        :param batch_size: Number of segments B.
        :param sequence_length: Steps in a segment T.
        :param rng: Random stream of the draws.
        :param encode: Gives the tokens of frames, (n, C, H, W) uint8 to (n, K) int64.
        :param starts: Which of the segments begin at particular steps.
        :return: The segments, on the buffer's device.
        """
        steps, envs, mask = self._draw(batch_size, sequence_length, rng, False, starts)
        rows = self._locate(steps, mask)
        tokens = self._scatter(self._get_tokens((rows * self.n_envs + envs[:, None])[mask], encode), mask)
        return TokenSamples(tokens.long(), *self._outcomes(rows, envs, mask))

    def sample_contexts(
        self,
        batch_size: int,
        burn_in: int,
        rng: np.random.Generator,
        encode: Encode,
        observe: Observe,
        starts: Starts = EVERYWHERE,
    ) -> ContextSamples:
        """
        Sample frames to imagine from, as ``sample`` draws last steps with ``pad_left``, and what the actor-critic sees of the
        frames before them. No frame is encoded twice until ``forget_tokens`` is called, none decoded twice until
        ``forget_seen`` is, as far as ``seen_bytes`` reach: a decoded frame of 64x64 RGB takes 49 KB, so a GiB holds 21,845.

        :param batch_size: Number of frames B.
        :param burn_in: Steps before each of them.
        :param rng: Random stream of the draws.
        :param encode: Gives the tokens of frames, (n, C, H, W) uint8 to (n, K) int64.
        :param observe: Gives what the actor-critic sees, (n, K) int64 to (n, C, H, W) float32.
        :param starts: Which of the frames are those of particular steps.
        :return: The frames, on the buffer's device.
        """
        steps, envs, mask = self._draw(batch_size, burn_in + 1, rng, True, starts)
        indices = self._locate(steps, mask) * self.n_envs + envs[:, None]

        def see(frames: np.ndarray) -> th.Tensor:
            return observe(self._get_tokens(frames, encode).long())

        tokens = self._get_tokens(indices[:, -1], encode)
        before = mask[:, :-1]
        if before.any():
            seen = self._seen.get(indices[:, :-1][before], see)
        else:  # no step before any of them; a frame tells the shape
            seen = see(indices[:1, -1])[:0]
        return ContextSamples(tokens.long(), self._scatter(seen, before), th.as_tensor(before, device=self.device))

    def _get_tokens(self, indices: np.ndarray, encode: Encode) -> th.Tensor:
        """Tokens of frames, (n,) int64 indices to (n, K) int32."""

        def encode_frames(frames: np.ndarray) -> th.Tensor:
            return encode(self.observations[np.divmod(frames, self.n_envs)]).int()

        return self._tokens.get(indices, encode_frames)

    def _scatter(self, values: th.Tensor, mask: np.ndarray) -> th.Tensor:
        """Values (n, ...) of the n steps at which the mask (B, T) is True, as a tensor (B, T, ...) with zeros elsewhere."""
        scattered = values.new_zeros(mask.size, *values.shape[1:])
        scattered[th.as_tensor(np.flatnonzero(mask), device=self.device)] = values
        return scattered.unflatten(0, mask.shape)

    def forget_tokens(self) -> None:
        """To be called when the tokenizer has changed."""
        self._tokens.clear()
        self.forget_seen()

    def forget_seen(self) -> None:
        """To be called at the start of a training phase: decoding rounds by batches, which a resumed run must have alike."""
        self._seen.clear()

    def _draw(
        self,
        batch_size: int,
        sequence_length: int,
        rng: np.random.Generator,
        pad_left: bool,
        starts: Starts = EVERYWHERE,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps of segments, (B, T), counted from the oldest one in the buffer, their environments (B,) and mask (B, T)."""
        if self.size() == 0:
            raise ValueError("The replay buffer is empty: there is nothing to sample, call add() first")
        n_rewarded = starts.n_rewarded if starts.n_rewarded and len(self.rewarded) else 0
        n = batch_size - starts.n_recent - n_rewarded
        if self.uniform:
            envs, drawn = rng.integers(self.n_envs, size=n), rng.integers(self.size(), size=n)
        else:
            envs, firsts, lengths = self.episodes[rng.integers(len(self.episodes), size=n)].T
            drawn = firsts + rng.integers(lengths)
        if starts.n_recent:
            oldest = max(self.size() - starts.recent_steps, 0)
            envs = np.append(envs, rng.integers(self.n_envs, size=starts.n_recent))
            drawn = np.append(drawn, rng.integers(oldest, self.size(), size=starts.n_recent))
        if n_rewarded:
            rewarded = self.rewarded[rng.integers(len(self.rewarded), size=n_rewarded)]
            envs, drawn = np.append(envs, rewarded[:, 0]), np.append(drawn, rewarded[:, 1])
        # Episodes are in the order of their environments, then of time
        begins = self.episodes[:, 0] * self.size() + self.episodes[:, 1]
        _, firsts, lengths = self.episodes[np.searchsorted(begins, envs * self.size() + drawn, side="right") - 1].T
        if n_rewarded:
            earlier = drawn[-n_rewarded:] - rng.integers(starts.reward_within, size=n_rewarded)
            drawn[-n_rewarded:] = np.maximum(earlier, firsts[-n_rewarded:])
        begin = drawn - sequence_length + 1 if pad_left else drawn
        steps = begin[:, None] + np.arange(sequence_length)
        mask = (steps >= firsts[:, None]) & (steps < (firsts + lengths)[:, None])
        return steps, envs, mask

    def latest(self, sequence_length: int, episode_start: np.ndarray) -> SequenceSamples:
        """
        The last steps of the running episodes, padded on the left: what an agent has seen before the observation to come.

        :param sequence_length: Steps in a segment T.
        :param episode_start: (N,) bool, whether the observation to come begins a new episode.
        :return: One segment per environment.
        """
        running = self.episodes[np.append(np.diff(self.episodes[:, 0]) > 0, True)] if self.size() else self.episodes
        steps = np.arange(self.size() - sequence_length, self.size())[None].repeat(self.n_envs, axis=0)
        firsts = running[:, 1] if self.size() else np.zeros(self.n_envs, dtype=np.int64)
        mask = (steps >= firsts[:, None]) & ~np.asarray(episode_start, dtype=bool)[:, None]
        return self._segments(steps, np.arange(self.n_envs), mask)

    def _segments(self, steps: np.ndarray, envs: np.ndarray, mask: np.ndarray) -> SequenceSamples:
        """Frames and outcomes of steps, counted from the oldest one, of one environment per row of (B, T)."""
        rows = self._locate(steps, mask)
        return SequenceSamples(self._gather(self.observations, rows, envs, mask), *self._outcomes(rows, envs, mask))

    def _locate(self, steps: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Rows of the arrays at which steps lie, counted from the oldest one; 0 where the mask is False."""
        oldest = self.pos if self.full else 0
        return np.where(mask, (oldest + steps) % self.buffer_size, 0)

    def _outcomes(self, rows: np.ndarray, envs: np.ndarray, mask: np.ndarray) -> tuple[th.Tensor, ...]:
        """Actions, rewards, terminations and the mask, (B, T) each."""
        arrays = (self.actions, self.rewards, self.terminations)
        return (*(self._gather(array, rows, envs, mask) for array in arrays), th.as_tensor(mask, device=self.device))

    def _gather(self, array: np.ndarray, rows: np.ndarray, envs: np.ndarray, mask: np.ndarray) -> th.Tensor:
        """Entries of an array as a tensor (B, T, ...); zeros where the mask is False."""
        values = array[rows, envs[:, None]]
        values[~mask] = 0
        return th.as_tensor(values, device=self.device)

    def _in_order(self, array: np.ndarray) -> np.ndarray:
        """What is filled of an array, oldest step first."""
        return np.concatenate([array[self.pos :], array[: self.pos]]) if self.full else array[: self.pos]

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> Any:
        raise NotImplementedError("Segments are sampled with sample(), single transitions are not")

    # --- Files -----------------------------------------------------------------------------------------------------------

    def frames_block(self, first: int, last: int) -> np.ndarray:
        """
        Frames in the form in which files have them: each environment's after another, as differences to the frame before,
        since most pixels of a game do not change from one step to the next.

        :param first: First step, counted from the last reset.
        :param last: Step behind the last one.
        :return: (N, T, C, H, W) uint8
        """
        frames = self.observations[np.arange(first, last) % self.buffer_size].swapaxes(0, 1).copy()
        frames[:, 1:] ^= frames[:, :-1]  # NumPy sees that they overlap
        return frames

    def fill_frames(self, block: np.ndarray, first: int) -> None:
        """
        The other way round.

        :param block: What ``frames_block`` gave.
        :param first: First step to fill.
        """
        frames = block.swapaxes(0, 1).copy()
        for t in range(1, len(frames)):  # several times as fast as np.bitwise_xor.accumulate
            frames[t] ^= frames[t - 1]
        self.observations[np.arange(first, first + len(frames)) % self.buffer_size] = frames

    def outcomes(self) -> dict[str, np.ndarray]:
        """
        :return: All but the frames, by name, (steps, N) each, oldest step first.
        """
        return {name: self._in_order(getattr(self, name)) for name in OUTCOMES}

    def fill_outcomes(self, file: ArrayFile, n_added: int, n_steps: int) -> None:
        """
        :param file: File with what ``outcomes`` gave.
        :param n_added: Steps added to that buffer since its last reset.
        :param n_steps: Steps that were in it.
        :raises ValueError: If the file holds other arrays, or what no environment gives. The buffer is then half filled.
        """
        rows = np.arange(n_added - n_steps, n_added) % self.buffer_size
        for name, dtype in OUTCOMES.items():
            getattr(self, name)[rows] = file.read(name, dtype, (n_steps, self.n_envs))
        if n_steps and not (0 <= self.actions[rows].min() and self.actions[rows].max() < self.n_actions):
            raise ValueError(f"it has actions that are none of the {self.n_actions} of env")
        if not np.isfinite(self.rewards[rows]).all():
            raise ValueError("it has rewards that are not finite")
        self._set_n_added(n_added)
        self._episodes = self._rewarded = None
        self.forget_tokens()

    def blocks(self, first: int) -> Iterator[tuple[int, int]]:
        """
        :param first: First step, counted from the last reset.
        :return: First and last steps, the last excluded, of blocks from there to the newest step.
        """
        for begin in range(first, self.n_added, BLOCK_STEPS):
            yield begin, min(begin + BLOCK_STEPS, self.n_added)

    def save(self, file: Any) -> None:
        """
        :param file: File object open for writing bytes.
        """

        def arrays() -> Iterator[tuple[str, np.ndarray]]:
            about = [self.n_envs, self.n_actions, *self.obs_shape, self.buffer_size, self.n_added, self.size()]
            yield "about", np.array(about, dtype=np.int64)
            yield from self.outcomes().items()
            for begin, end in self.blocks(self.n_added - self.size()):
                yield f"frames_{begin}", self.frames_block(begin, end)

        write_arrays(file, arrays())

    def load(self, file: BinaryIO) -> "SequenceReplayBuffer":
        """
        :param file: File object open for reading bytes, with what ``save`` wrote.
        :return: A buffer like this one, with the size and the steps of that one.
        :raises ValueError: If it is another file, or one of other images, actions or number of environments.
        """
        arrays = ArrayFile(file)
        n_envs, n_actions, *shape, buffer_size, n_added, n_steps = arrays.read("about", np.int64, (8,)).tolist()
        ours, theirs = (self.n_envs, self.obs_shape, self.n_actions), (n_envs, tuple(shape), n_actions)
        if ours != theirs:
            raise ValueError(
                f"it holds steps of (n_envs, image shape, actions) = {theirs}, but this model has {ours}: load it into a "
                "model with the same environments and image_size"
            )
        if not (1 <= buffer_size and 0 <= n_steps == min(n_added, buffer_size)):
            raise ValueError(f"it says that it has {n_steps} of {n_added} steps in a buffer of {buffer_size}")
        loaded = SequenceReplayBuffer(
            buffer_size * n_envs,
            self.observation_space,
            self.action_space,  # type: ignore[arg-type]
            self.device,
            n_envs,
            self.uniform,
        )
        loaded.allocate()  # raises if the file asks for more than there is
        loaded.fill_outcomes(arrays, n_added, n_steps)
        for begin, end in loaded.blocks(n_added - n_steps):
            block_shape = (n_envs, end - begin, *self.obs_shape)
            loaded.fill_frames(arrays.read(f"frames_{begin}", np.uint8, block_shape), begin)
        return loaded

    def __getstate__(self) -> dict[str, Any]:
        """Pickle only what is filled, so that a file is as large as what it holds."""
        state = self.__dict__.copy()
        del state["_tokens"], state["_seen"]
        for name in state.keys() & {*self._arrays}:
            state[name] = state[name][: self.size()]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_caches()
        for name in state.keys() & {*self._arrays}:
            filled = state[name]
            array = np.zeros((self.buffer_size, *filled.shape[1:]), dtype=filled.dtype)
            array[: len(filled)] = filled
            setattr(self, name, array)
