import copy
import itertools
import pickle
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_iris.buffers import SequenceReplayBuffer, Starts
from sb3_iris.type_aliases import SequenceSamples

N_ACTIONS = 5
Script = Sequence[tuple[int, bool]]  # length of each episode and whether it is truncated, over and over


class Step(NamedTuple):
    obs: np.ndarray  # (3, 1, 1): environment, step, episode
    action: int
    reward: float
    terminated: bool
    truncated: bool
    episode_start: bool


def play(scripts: Sequence[Script], n_steps: int) -> list[list[Step]]:
    """What happens in each environment, by environment and step."""
    history = []
    for env, script in enumerate(scripts):
        steps: list[Step] = []
        for episode, (length, truncated) in enumerate(itertools.cycle(script)):
            for t in range(length):
                obs = np.array([env + 1, len(steps), episode], dtype=np.uint8).reshape(3, 1, 1)
                action, reward = (env + 2 * len(steps)) % N_ACTIONS, 1 + len(steps) + env / 8
                last = t == length - 1
                steps.append(Step(obs, action, reward, last and not truncated, last and truncated, t == 0))
            if len(steps) >= n_steps:
                break
        history.append(steps[:n_steps])
    return history


def add(buffer: SequenceReplayBuffer, history: list[list[Step]], first: int = 0) -> None:
    for steps in list(zip(*history, strict=True))[first:]:
        buffer.add(*(np.stack(column) for column in zip(*steps, strict=True)))


def make_buffer(history: list[list[Step]], steps_per_env: int, spare: int = 0, uniform: bool = False) -> SequenceReplayBuffer:
    n_envs = len(history)
    space = spaces.Box(0, 255, (3, 1, 1), np.uint8)
    buffer = SequenceReplayBuffer(
        steps_per_env * n_envs + spare % n_envs, space, spaces.Discrete(N_ACTIONS), "cpu", n_envs, uniform
    )
    half = len(history[0]) // 2
    add(buffer, [steps[:half] for steps in history])
    buffer.latest(1, np.ones(n_envs, dtype=bool))  # nothing that it remembers of this may outlast the next step
    add(buffer, history, half)
    return buffer


def check_segment(samples: SequenceSamples, row: int, history: list[list[Step]]) -> tuple[int, int, int]:
    """One segment against what was added; its environment, first step and length without padding."""
    mask = samples.mask[row].tolist()
    for array in samples:
        assert not array[row][~samples.mask[row]].any()  # zeros in the padding
    if not any(mask):
        return 0, 0, 0
    first, length = mask.index(True), sum(mask)
    assert mask == [first <= t < first + length for t in range(len(mask))]
    env, start, episode = samples.observations[row, first].flatten().tolist()
    env -= 1
    for t in range(length):
        step = history[env][start + t]
        assert step.obs[2] == episode
        assert samples.observations[row, first + t].flatten().tolist() == step.obs.flatten().tolist()
        assert samples.actions[row, first + t] == step.action
        assert samples.rewards[row, first + t] == step.reward
        assert samples.terminations[row, first + t].item() is step.terminated  # a truncation is none
    return env, start, length


def episode_of(steps: list[Step], t: int) -> int:
    """Index of the episode of a step; of one that has not been played yet -1."""
    return int(steps[t].obs[2, 0, 0]) if 0 <= t < len(steps) else -1


def assert_samples_equal(samples: SequenceSamples, expected: SequenceSamples) -> None:
    for array, expected_array in zip(samples, expected, strict=True):
        assert array.dtype == expected_array.dtype and th.equal(array, expected_array)


def assert_frequencies(counts: np.ndarray, expected: np.ndarray) -> None:
    """Chi-square test; the bound is about six standard deviations of the statistic above its mean."""
    freedom = counts.size - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 6 * (2 * freedom) ** 0.5


scripts_strategy = st.lists(
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=4), min_size=1, max_size=3
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    scripts=scripts_strategy,
    n_steps=st.integers(1, 40),
    steps_per_env=st.integers(1, 30),
    spare=st.integers(0, 2),
    sequence_length=st.integers(1, 12),
    pad_left=st.booleans(),
    uniform=st.booleans(),
)
def test_segments(
    scripts: list[Script], n_steps: int, steps_per_env: int, spare: int, sequence_length: int, pad_left: bool, uniform: bool
) -> None:
    """Segments stay inside one episode and what is left in the buffer, and are as long as those allow."""
    history = play(scripts, n_steps)
    buffer = make_buffer(history, steps_per_env, spare, uniform)
    assert buffer.size() == min(n_steps, steps_per_env)
    oldest = n_steps - buffer.size()
    samples = buffer.sample(30, sequence_length, np.random.default_rng(0), pad_left)
    assert samples.observations.shape == (30, sequence_length, 3, 1, 1)
    assert [array.dtype for array in samples] == [th.uint8, th.int64, th.float32, th.bool, th.bool]
    for row in range(30):
        env, start, length = check_segment(samples, row, history)
        assert length > 0 and start >= oldest
        assert samples.mask[row, -1 if pad_left else 0]
        if length < sequence_length:  # padded, so there was nothing more to be had
            beyond = start - 1 if pad_left else start + length
            assert beyond < oldest or episode_of(history[env], beyond) != episode_of(history[env], start)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    scripts=scripts_strategy,
    n_steps=st.integers(1, 40),
    steps_per_env=st.integers(1, 30),
    sequence_length=st.integers(0, 12),
)
def test_latest(scripts: list[Script], n_steps: int, steps_per_env: int, sequence_length: int) -> None:
    """The last steps of the running episode, as far as they are kept, and nothing if the next frame begins another one."""
    history = play(scripts, n_steps)
    buffer = make_buffer(history, steps_per_env)
    dones = np.array([steps[-1].terminated or steps[-1].truncated for steps in history])
    samples = buffer.latest(sequence_length, dones)
    assert samples.mask.shape == (len(history), sequence_length)
    for env, steps in enumerate(history):
        running = sum(episode_of(steps, t) == episode_of(steps, n_steps - 1) for t in range(n_steps))
        expected = 0 if dones[env] else min(running, buffer.size(), sequence_length)
        assert samples.mask[env].tolist() == [False] * (sequence_length - expected) + [True] * expected
        if expected > 0:
            assert check_segment(samples, env, history) == (env, n_steps - expected, expected)
        else:
            check_segment(samples, env, history)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    scripts=scripts_strategy,
    n_steps=st.integers(0, 30),
    n_more=st.integers(0, 30),
    steps_per_env=st.integers(1, 30),
    pad_left=st.booleans(),
)
def test_pickle(scripts: list[Script], n_steps: int, n_more: int, steps_per_env: int, pad_left: bool) -> None:
    """A loaded buffer gives the same samples from the same random stream, also once both have gone on."""
    history = play(scripts, n_steps + n_more)
    buffer = make_buffer([steps[:n_steps] for steps in history], steps_per_env)
    loaded = pickle.loads(pickle.dumps(buffer))
    for first in (n_steps, n_steps + n_more):
        assert (loaded.size(), loaded.pos, loaded.full) == (buffer.size(), buffer.pos, buffer.full)
        if buffer.size():
            expected = buffer.sample(8, 5, np.random.default_rng(1), pad_left)
            assert_samples_equal(loaded.sample(8, 5, np.random.default_rng(1), pad_left), expected)
            starts = np.zeros(len(history), dtype=bool)
            assert_samples_equal(loaded.latest(5, starts), buffer.latest(5, starts))
        add(buffer, history, first)
        add(loaded, history, first)


def test_pickle_keeps_only_what_is_filled() -> None:
    history = play([[(5, False)]], 20)
    large, small = (make_buffer(history, steps_per_env) for steps_per_env in (100_000, 20))
    assert len(pickle.dumps(large)) < len(pickle.dumps(small)) + 200
    assert copy.deepcopy(large).observations.shape == large.observations.shape == (100_000, 1, 3, 1, 1)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("pad_left", [False, True])
@pytest.mark.parametrize(
    "steps_per_env, lengths",
    [(60, [20, 1, 7, 12, 5, 3, 30, 2]), (40, [20, 1, 7, 12, 5, 3, 30, 2]), (25, [5, 1, 7, 12, 23, 2])],
)
def test_frequencies_of_episodes_and_steps(steps_per_env: int, lengths: list[int], pad_left: bool, uniform: bool) -> None:
    """
    Episodes are drawn whatever their length, so a step of an episode of length n has probability 1 / (episodes * n); or all
    steps are drawn alike. The last buffer has lost its oldest steps: what is left of their episodes counts like others.
    """
    history = play([[(20, False), (1, True), (7, False), (12, True)], [(5, True), (3, False), (30, True), (10, False)]], 40)
    buffer = make_buffer(history, steps_per_env, uniform=uniform)
    assert buffer.episodes[:, 2].tolist() == lengths
    n = 30_000
    by_length = np.array(lengths) / sum(lengths) if uniform else np.full(len(lengths), 1 / len(lengths))
    samples = buffer.sample(n, 1, np.random.default_rng(0), pad_left)
    envs, steps, episodes = samples.observations.view(n, 3).numpy().astype(int).T
    _, by_episode = np.unique(10 * envs + episodes, return_counts=True)
    assert_frequencies(by_episode, n * by_length)
    _, by_step = np.unique(100 * envs + steps, return_counts=True)
    assert_frequencies(by_step, np.repeat(n * by_length / np.array(lengths), lengths))


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("steps_per_env, recent_steps", [(60, 9), (25, 9), (25, 1), (25, 100)])
def test_frequencies_of_recent_frames(steps_per_env: int, recent_steps: int, uniform: bool) -> None:
    """The last of the frames are drawn from the last steps alone, and what came before them is that of their own episodes."""
    history = play([[(20, False), (1, True), (7, False), (12, True)], [(5, True), (3, False), (30, True), (10, False)]], 40)
    buffer = make_buffer(history, steps_per_env, uniform=uniform)
    n, n_recent, burn_in = 20_000, 15_000, 4

    def encode(observations: np.ndarray) -> th.Tensor:
        return th.as_tensor(observations).flatten(1).long()

    def observe(tokens: th.Tensor) -> th.Tensor:
        return tokens.unflatten(1, (1, 1, -1)).float()

    contexts = buffer.sample_contexts(n, burn_in, np.random.default_rng(0), encode, observe, Starts(n_recent, recent_steps))
    envs, steps, _ = contexts.tokens.numpy().T
    kept = min(recent_steps, buffer.size())
    drawn, counts = np.unique(100 * envs[-n_recent:] + steps[-n_recent:], return_counts=True)
    assert drawn.tolist() == [100 * env + step for env in (1, 2) for step in range(40 - kept, 40)]
    assert_frequencies(counts, np.full(2 * kept, n_recent / (2 * kept)))
    assert len(np.unique(100 * envs[:-n_recent] + steps[:-n_recent])) == 2 * buffer.size()
    segments = buffer.sample_tokens(n, 2, np.random.default_rng(0), encode, Starts(n_recent, recent_steps))
    assert th.equal(segments.tokens[:, 0], contexts.tokens)  # of the same draws; these begin segments, those end contexts
    for row in range(0, n, 50):
        env, step, episode = contexts.tokens[row].tolist()
        before = [
            t for t in range(step - burn_in, step) if t >= 40 - buffer.size() and episode_of(history[env - 1], t) == episode
        ]
        assert contexts.mask[row].tolist() == [False] * (burn_in - len(before)) + [True] * len(before)
        assert contexts.seen[row][contexts.mask[row]].flatten(1).tolist() == [[env, t, episode] for t in before]


@pytest.mark.parametrize("n_recent", [0, 500])
@pytest.mark.parametrize("within", [1, 4])
def test_frequencies_of_rewarded_frames(within: int, n_recent: int) -> None:
    """
    The last of the frames lie before rewards, all of which are drawn alike, and in the same episode: so the first step of an
    episode is drawn more often. Without rewards all frames are alike.
    """
    history = play([[(20, False), (1, True), (7, False), (12, True)], [(5, True), (3, False), (30, True), (10, False)]], 40)
    buffer = make_buffer(history, 25, uniform=True)  # steps 15 to 39 are left
    rewarded = {(0, 16): -1.0, (0, 20): 1.0, (0, 22): 0.5, (1, 39): 2.0}
    buffer.rewards[:] = 0
    assert buffer.sample_tokens(500, 1, np.random.default_rng(0), tokens_of, Starts(0, 1, 500, within)).mask.all()
    for (env, step), reward in rewarded.items():
        buffer.rewards[step % 25, env] = reward
    buffer._rewarded = None
    assert [(env, step + 15) for env, step in buffer.rewarded.tolist()] == list(rewarded)
    expected: dict[int, float] = {}
    n, n_rewarded = 12_000, 10_000
    for env, step in rewarded:
        first = max(
            t for t in range(15, step + 1) if t == 15 or episode_of(history[env], t) != episode_of(history[env], t - 1)
        )
        for ahead in range(within):
            place = 100 * (env + 1) + max(step - ahead, first)
            expected[place] = expected.get(place, 0.0) + n_rewarded / (within * len(rewarded))
    segments = buffer.sample_tokens(n, 3, np.random.default_rng(0), tokens_of, Starts(n_recent, 9, n_rewarded, within))
    envs, steps, _ = segments.tokens[:, 0].numpy().T
    drawn, counts = np.unique(100 * envs[-n_rewarded:] + steps[-n_rewarded:], return_counts=True)
    assert drawn.tolist() == sorted(expected)
    assert_frequencies(counts, np.array([expected[place] for place in drawn]))
    others = steps[:-n_rewarded]
    assert len(others) == n - n_rewarded and (others[len(others) - n_recent :] >= 31).all() and others.min() == 15
    contexts = buffer.sample_contexts(
        n,
        2,
        np.random.default_rng(0),
        tokens_of,
        lambda tokens: tokens[:, None, None].float(),
        Starts(n_recent, 9, n_rewarded, within),
    )
    assert th.equal(segments.tokens[:, 0], contexts.tokens)


def tokens_of(observations: np.ndarray) -> th.Tensor:
    """Environment, step and episode."""
    return th.as_tensor(observations).flatten(1).long()


def test_rewards_follow_the_ring() -> None:
    """Steps with a reward are counted from the oldest step, also once the buffer is full, and not kept when it is reset."""
    history = play([[(20, False)], [(7, True)]], 30)
    buffer = make_buffer([steps[:0] for steps in history], 8)
    for end in range(1, 31):
        add(buffer, [steps[:end] for steps in history], end - 1)
        rewards = buffer._in_order(buffer.rewards)
        assert sorted(map(tuple, buffer.rewarded.tolist())) == sorted((n, t) for t, n in zip(*rewards.nonzero(), strict=True))
    buffer.reset()
    assert len(buffer.rewarded) == 0


def test_truncation_is_not_a_termination() -> None:
    history = play([[(3, True), (2, False)]], 5)
    buffer = make_buffer(history, 5)
    assert buffer.truncations[:, 0].tolist() == [False, False, True, False, False]
    for seed in range(10):
        samples = buffer.sample(1, 5, np.random.default_rng(seed))
        _, start, length = check_segment(samples, 0, history)
        assert length == (3 - start if start < 3 else 5 - start)  # the segment ends at either of them
        assert samples.terminations.any().item() is (start >= 3)


def test_interrupted_episode() -> None:
    """A reset from outside begins an episode without an end of the one before."""
    history = play([[(3, False)]], 6)
    history[0][2] = history[0][2]._replace(terminated=False)
    buffer = make_buffer(history, 10)
    assert buffer.episodes.tolist() == [[0, 0, 3], [0, 3, 3]]
    samples = buffer.sample(50, 6, np.random.default_rng(0))
    assert samples.mask.sum(1).max() == 3
    # and what is seen before the next frame is empty if the caller says that it begins an episode
    assert not buffer.latest(6, np.array([True])).mask.any()
    assert buffer.latest(6, np.array([False])).mask.tolist() == [[False] * 3 + [True] * 3]


@pytest.mark.parametrize("reset", [False, True])
def test_empty_buffer(reset: bool) -> None:
    buffer = make_buffer(play([[(3, False)], [(2, True)]], 4 if reset else 0), 10)
    if reset:
        buffer.reset()
    with pytest.raises(ValueError, match="empty"):
        buffer.sample(1, 1, np.random.default_rng(0))
    samples = buffer.latest(3, np.array([False, False]))
    assert samples.observations.shape == (2, 3, 3, 1, 1)
    assert not samples.mask.any()


def test_sampling_leaves_the_global_streams_alone() -> None:
    buffer = make_buffer(play([[(3, False)]], 9), 10)
    numpy_state, torch_state = np.random.get_state(), th.get_rng_state()
    rng = np.random.default_rng(0)
    first, second = (buffer.sample(20, 3, rng) for _ in range(2))
    assert not th.equal(first.observations, second.observations)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))
    assert th.equal(th.get_rng_state(), torch_state)


def test_samples_are_copies() -> None:
    buffer = make_buffer(play([[(4, False)]], 4), 4)
    samples = buffer.sample(3, 2, np.random.default_rng(0))
    kept = [array.clone() for array in samples]
    add(buffer, play([[(1, True)]], 4))
    assert_samples_equal(samples, SequenceSamples(*kept))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    scripts=scripts_strategy,
    n_steps=st.integers(1, 30),
    n_more=st.integers(0, 30),
    steps_per_env=st.integers(1, 30),
    sequence_length=st.integers(1, 12),
    seen_bytes=st.integers(0, 2_000),
    forget=st.booleans(),
)
def test_sample_tokens_and_contexts(
    scripts: list[Script], n_steps: int, n_more: int, steps_per_env: int, sequence_length: int, seen_bytes: int, forget: bool
) -> None:
    """
    The segments of ``sample``, encoded, and what is seen of those that end with a frame; also once steps were overwritten, the
    tokenizer has changed, or not all that was seen is kept.
    """
    history = play(scripts, n_steps + n_more)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("sb3_iris.buffers.seen_bytes", lambda device: seen_bytes)
        buffer = make_buffer([steps[:n_steps] for steps in history], steps_per_env)
    shift = 1

    def encode(observations: np.ndarray) -> th.Tensor:
        assert observations.dtype == np.uint8
        return th.as_tensor(observations).flatten(1).long() + shift

    def observe(tokens: th.Tensor) -> th.Tensor:
        assert tokens.dtype == th.int64
        return tokens.unflatten(1, (1, 1, -1)) / 8

    for seed in range(3):
        rng, same_rng = np.random.default_rng(seed), np.random.default_rng(seed)
        contexts = buffer.sample_contexts(8, sequence_length - 1, rng, encode, observe)
        expected = buffer.sample(8, sequence_length, same_rng, pad_left=True)
        expected_tokens = (expected.observations.flatten(2).long() + shift) * expected.mask.unsqueeze(-1)
        assert th.equal(contexts.tokens, expected_tokens[:, -1])
        assert th.equal(contexts.seen, expected_tokens[:, :-1].unflatten(2, (1, 1, -1)) / 8)
        assert th.equal(contexts.mask, expected.mask[:, :-1])
        assert contexts.tokens.dtype == th.int64 and contexts.seen.dtype == th.float32

        samples = buffer.sample_tokens(8, sequence_length, rng, encode)
        expected = buffer.sample(8, sequence_length, same_rng)
        expected_tokens = (expected.observations.flatten(2).long() + shift) * expected.mask.unsqueeze(-1)
        assert samples.tokens.dtype == th.int64
        assert th.equal(samples.tokens, expected_tokens)
        for array, expected_array in zip(samples[1:], expected[1:], strict=True):
            assert array.dtype == expected_array.dtype and th.equal(array, expected_array)
        assert rng.random() == same_rng.random()
        if seed == 0:
            add(buffer, history, n_steps)
        if forget:
            buffer.forget_tokens()
            shift += 1


def test_frames_are_encoded_once() -> None:
    history = play([[(10, False)], [(50, True)]], 250)
    buffer = make_buffer([steps[:240] for steps in history], 200)
    encoded: list[int] = []

    def encode(observations: np.ndarray) -> th.Tensor:
        assert 0 < len(observations) <= 256  # so that encoding takes no more memory than the paper's batch does
        encoded.extend(observations[:, 1, 0, 0].tolist())
        return th.as_tensor(observations).flatten(1).long()

    rng = np.random.default_rng(0)
    buffer.sample_tokens(1, 1, rng, encode)
    assert len(encoded) == 2  # one of them tells the number of tokens per frame
    for _ in range(5):
        buffer.sample_tokens(1_000, 10, rng, encode)
    assert len(encoded) == 1 + 2 * 200
    assert sorted(encoded[1:]) == sorted(2 * list(range(40, 240)))

    encoded.clear()
    add(buffer, history, 240)
    for _ in range(5):
        buffer.sample_tokens(1_000, 10, rng, encode)
    assert sorted(encoded) == sorted(2 * list(range(240, 250)))

    encoded.clear()
    buffer.forget_tokens()
    decoded: list[tuple[int, ...]] = []

    def observe(tokens: th.Tensor) -> th.Tensor:
        decoded.extend(map(tuple, tokens.tolist()))
        return tokens.unflatten(1, (1, 1, -1)).float()

    for _ in range(5):
        buffer.sample_tokens(1_000, 10, rng, encode)
        buffer.sample_contexts(1_000, 9, rng, encode, observe)
    assert len(encoded) == 1 + 2 * 200
    n_burnt_in = 20 * 9 + 4 * 49  # all frames but the last one of each episode
    assert len(decoded) - 1 == len(set(decoded[1:])) == n_burnt_in


def test_tokens_are_not_pickled() -> None:
    buffer = make_buffer(play([[(5, False)]], 20), 20)
    without = len(pickle.dumps(buffer))
    buffer.sample_tokens(4, 4, np.random.default_rng(0), lambda observations: th.zeros(len(observations), 500).long())
    assert abs(len(pickle.dumps(buffer)) - without) < 1_000  # a token takes 4 bytes
    loaded = pickle.loads(pickle.dumps(buffer))
    samples = loaded.sample_tokens(4, 4, np.random.default_rng(0), lambda observations: th.ones(len(observations), 3).long())
    assert th.equal(samples.tokens, samples.mask.unsqueeze(-1).expand(4, 4, 3).long())


def test_empty_buffer_has_no_tokens() -> None:
    buffer = make_buffer(play([[(5, False)]], 0), 20)
    with pytest.raises(ValueError, match="empty"):
        buffer.sample_tokens(1, 1, np.random.default_rng(0), lambda observations: th.zeros(1, 1).long())
