"""What ends of episodes leave in the replay buffer, and what they do to the LSTM state of the collection."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_iris import IRIS
from sb3_iris.exploration import Exploration
from sb3_iris.type_aliases import LSTMState
from tests.presets import NO_TRAINING, FrameEnv, decided, frame_env, frame_envs, steps_in_buffer, tiny


def flags(model: IRIS, env: int = 0) -> tuple[list[int], list[int], list[int]]:
    """Indices of terminations, truncations and episode starts of one environment."""
    steps = steps_in_buffer(model)
    starts, ends, cuts = (steps[name][:, env] for name in ("episode_starts", "terminations", "truncations"))
    return np.flatnonzero(ends).tolist(), np.flatnonzero(cuts).tolist(), np.flatnonzero(starts).tolist()


@pytest.mark.parametrize("train_freq", [1, 3, 100])
@pytest.mark.parametrize(
    "length, max_episode_steps, ends, cuts, starts",
    [
        (5, None, [4, 9], [], [0, 5, 10]),
        (None, 4, [], [3, 7, 11], [0, 4, 8]),
        (None, None, [], [], [0]),
        (3, 4, [2, 5, 8, 11], [], [0, 3, 6, 9]),
        (4, 4, [3, 7, 11], [], [0, 4, 8]),  # both at once: it terminated
        (1, None, list(range(12)), [], list(range(12))),
        (None, 1, [], list(range(12)), list(range(12))),
    ],
)
def test_ends_in_the_buffer(length, max_episode_steps, ends, cuts, starts, train_freq):
    model = tiny(frame_envs(length=length, max_episode_steps=max_episode_steps), train_freq=train_freq, **NO_TRAINING)
    model.learn(12)
    assert flags(model) == (ends, cuts, starts)
    # the first frame of an episode shows step 0, and each episode its number
    frames = model.replay_buffer.observations[:12, 0, :, 0, 0]
    assert np.flatnonzero(frames[:, 0] == 0).tolist() == starts
    assert frames[:, 1].tolist() == np.cumsum(np.isin(np.arange(12), starts)).tolist()
    assert model._last_episode_starts == [12 in [i + 1 for i in ends + cuts]]


def env_of_kinds() -> VecEnv:
    """The first environment terminates after 5 steps, the second is cut after 4, the third never ends."""
    kinds = [lambda: FrameEnv(5), lambda: gym.wrappers.TimeLimit(FrameEnv(None), 4), lambda: FrameEnv(None)]
    made = iter(kinds)
    return make_vec_env(lambda: next(made)(), n_envs=3)


@pytest.mark.parametrize("train_freq", [6, 100])
def test_three_envs(train_freq):
    model = tiny(env_of_kinds(), train_freq=train_freq, **NO_TRAINING)
    model.learn(3 * 11)
    assert flags(model, 0) == ([4, 9], [], [0, 5, 10])
    assert flags(model, 1) == ([], [3, 7], [0, 4, 8])
    assert flags(model, 2) == ([], [], [0])
    assert model._episode_num == 4


def test_rewards_and_actions_belong_to_the_frame_before():
    """Each step holds the reward of its own action, at ends of episodes too, where the env resets itself."""
    env = frame_envs(length=3)
    model = tiny(env, **NO_TRAINING)
    model.learn(12)
    assert model.replay_buffer.actions[:12, 0].tolist() == frame_env(env).actions
    assert model.replay_buffer.rewards[:12, 0].tolist() == [FrameEnv.rewards[a] for a in frame_env(env).actions]
    assert model.replay_buffer.observations[:12, 0, 0, 0, 0].tolist() == [0, 1, 2] * 4


def test_time_limits_are_no_ends_for_the_world_model():
    """Of segments that reach a time limit, none has a termination; of those that reach a termination, all have."""
    for env, expected in ((frame_envs(max_episode_steps=4, length=None), False), (frame_envs(length=4), True)):
        model = tiny(env, **NO_TRAINING)
        model.learn(16)
        samples = model.replay_buffer.sample(50, 4, np.random.default_rng(0))
        assert samples.mask[:, 0].all() and not samples.mask.all()
        assert samples.terminations.any(1).all().item() is expected
        assert samples.terminations.any().item() is expected


def inputs_of_collection(model: IRIS) -> list[LSTMState]:
    """The LSTM states that go into the actor-critic from now on, one per env step (if it is not trained)."""
    states: list[LSTMState] = []
    model.policy.actor_critic.register_forward_pre_hook(lambda module, args: states.append(args[1]))
    return states


def state_after(model: IRIS, frames: np.ndarray) -> th.Tensor:
    """Hidden and cell state after frames (T, C, H, W) from the start of an episode, by the networks themselves."""
    policy = model.policy
    state = th.zeros(1, 16), th.zeros(1, 16)
    with th.no_grad():
        for frame in frames:
            seen = policy.tokenizer.decode(policy.tokenizer.encode(th.tensor(frame)[None] / 255))
            state = policy.actor_critic.lstm(policy.actor_critic.cnn(2 * seen - 1), state)
    return th.stack(state)[:, 0]


@pytest.mark.parametrize("burn_in", [0, 2, 30])
@pytest.mark.parametrize("train_freq", [9, 300])
def test_lstm_state_in_collection(burn_in, train_freq):
    """
    At each step the state is that after the frames of the running episode: all since its start or, if the collection began
    within the episode, those since then and up to ``burn_in`` before.
    """
    model = decided(tiny(env_of_kinds(), train_freq=train_freq, burn_in=burn_in, **NO_TRAINING))
    states = inputs_of_collection(model)
    model.learn(3 * 14)
    assert len(states) == 14
    per_collection = train_freq // 3
    n_zero = 0
    for t, state in enumerate(states):
        collection_start = t - t % per_collection
        for env in range(3):
            starts = np.flatnonzero(model.replay_buffer.episode_starts[: t + 1, env])
            first = max(starts[-1], collection_start - burn_in)
            frames = model.replay_buffer.observations[first:t, env]
            given = th.stack([state.hidden[env], state.cell[env]])
            th.testing.assert_close(given, state_after(model, frames), atol=1e-5, rtol=1e-4)
            n_zero += len(frames) == 0
            assert (given == 0).all().item() == (len(frames) == 0)
    n_first = 3 + 4 + 1  # first steps of episodes
    if burn_in == 0 and train_freq == 9:
        assert n_zero > n_first
    else:
        assert n_zero == n_first


def test_burn_in_follows_the_networks():
    """When networks have been trained, a collection begins with the state that the new ones have after the same frames."""
    model = decided(tiny(frame_envs(length=None), burn_in=30, actor_critic_gradient_steps=0))
    states = inputs_of_collection(model)
    model.learn(8)  # the tokenizer changes after 4
    final = model.replay_buffer.observations[:8, 0]
    model.final_training_epochs = 0
    model.learn(1, reset_num_timesteps=False)
    given = th.stack([states[8].hidden[0], states[8].cell[0]])
    model_before = given.clone()
    # `learn(1)` trained once more behind the step: compare with networks that did not
    other = decided(tiny(frame_envs(length=None), burn_in=30, actor_critic_gradient_steps=0))
    other.learn(8)
    th.testing.assert_close(model_before, state_after(other, final), atol=1e-5, rtol=1e-4)
    stale = th.stack([states[7].hidden[0], states[7].cell[0]])
    assert not th.allclose(stale, state_after(other, final[:7]), atol=1e-5)


def test_burn_in_knows_nothing_of_other_runs():
    """After ``learn`` with a reset, and after another environment or buffer, the state begins at zero."""
    model = tiny(frame_envs(length=None), burn_in=30, **NO_TRAINING)
    states = inputs_of_collection(model)
    model.learn(5)
    model.learn(5)
    model.set_env(frame_envs(length=None))
    model.learn(5, reset_num_timesteps=False)
    zero = [bool((state.hidden == 0).all() and (state.cell == 0).all()) for state in states]
    assert np.flatnonzero(zero).tolist() == [0, 5, 10]


def test_exploration():
    """With probability 1, actions are uniform whatever the policy wants; with 0 and temperature 0, they are what it wants."""
    model = tiny(FrameEnv(), exploration_rate=1.0, temperature=0.0, **NO_TRAINING)
    model.policy.actor_critic.actor.bias.data[1] = 2.0  # at temperature 1 the others would come up as well
    model.learn(300)
    counts = np.bincount(model.replay_buffer.actions[:300, 0], minlength=3)
    assert (np.abs(counts - 100) < 4.5 * np.sqrt(300 * 2 / 9)).all()
    model.exploration_rate = 0.0
    model.replay_buffer.reset()
    model.learn(50)
    assert (model.replay_buffer.actions[:50] == 1).all()


def test_repeated_exploration():
    """A random action is held for n steps, n with probability 6 / (pi n)^2, then the policy goes on; no end is passed."""
    n_envs, never = 40_000, -1
    explore, rng, policy = Exploration(n_envs), np.random.default_rng(0), np.full(n_envs, never)
    running, begun = np.zeros(n_envs, dtype=bool), np.ones(n_envs, dtype=bool)
    steps = [explore(policy, begun, 10**9, 0.5, True, rng)]
    steps += [explore(policy, running, 10**9, 0.0, True, rng) for _ in range(3)]
    held = np.array([(step != never).mean() for step in steps])
    left_out = np.cumsum([0.0, 1.0, 1 / 4, 1 / 9]) * 6 / np.pi**2
    np.testing.assert_allclose(held, 0.5 * (1 - left_out), atol=4.5 * 0.5 / np.sqrt(n_envs))
    assert all((later[later != never] == steps[0][later != never]).all() for later in steps)
    assert (explore(policy, begun, 10**9, 0.0, True, rng) == never).all()


@pytest.mark.parametrize("length", [None, 1])
@pytest.mark.parametrize("train_freq", [4, 800])
def test_repeated_exploration_in_collection(length, train_freq):
    """It goes on over training phases, and ends with the episode: with episodes of one step it is the plain one."""
    envs = frame_envs(4, length=length)
    model = tiny(envs, exploration_rate=1.0, repeat_exploration=True, train_freq=train_freq, **NO_TRAINING).learn(800)
    actions = model.replay_buffer.actions[:200]
    changes = (actions[1:] != actions[:-1]).mean()  # two of three new actions are others
    if length == 1:
        assert abs(changes - 2 / 3) < 4.5 * np.sqrt(2 / 9 / 796)
    else:
        assert 0.02 < changes < 1 / 3
