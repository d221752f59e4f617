"""``predict``: shapes, states, sampling, and that it changes nothing."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.envs import FakeImageEnv

from sb3_iris import IRIS
from sb3_iris.type_aliases import LSTMState
from tests.presets import (
    NETWORKS,
    NO_TRAINING,
    SIZE,
    SIZES,
    FrameEnv,
    assert_equal,
    decided,
    differing,
    frame_env,
    frame_envs,
    parameters,
    steps_in_buffer,
    tiny,
)

HIDDEN = 16


@pytest.fixture(scope="module")
def model() -> IRIS:
    """Env of 16x12 pixels in 3 channels, networks of 8x8; tests must leave it as it is."""
    return decided(tiny(FakeImageEnv(screen_height=16, screen_width=12, n_channels=3, action_dim=4)))


def images(n: int, shape: tuple[int, ...] = (3, 16, 12), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(n, *shape), dtype=np.uint8)


def act(model: IRIS, obs: np.ndarray, state=None, episode_start=None) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    return model.policy.predict(obs, state, episode_start, deterministic=True)


def test_types(model):
    for deterministic in (True, False):
        actions, state = model.predict(images(5), deterministic=deterministic)
        assert actions.shape == (5,) and actions.dtype == np.int64
        assert isinstance(state, tuple) and [part.shape for part in state] == [(1, 5, HIDDEN)] * 2
        assert all(isinstance(part, np.ndarray) and part.dtype == np.float32 for part in state)
        action, state = model.predict(images(1)[0], deterministic=deterministic)
        assert np.shape(action) == () and model.action_space.contains(action)
        assert [part.shape for part in state] == [(1, 1, HIDDEN)] * 2


def test_no_observations(model):
    actions, state = model.predict(images(0))
    assert actions.shape == (0,) and state[0].shape == (1, 0, HIDDEN)


def test_batch_equals_single_ones():
    model = decided(tiny(FakeImageEnv(screen_height=16, screen_width=12, n_channels=3, action_dim=4)))
    actor_critic = model.policy.actor_critic
    with th.no_grad():  # networks that do not magnify rounding, which on some CPUs depends on the size of the batch
        model.policy.tokenizer.decoder[-1].weight.div_(4)
        for parameter in actor_critic.lstm.parameters():
            parameter.div_(3)
        actor_critic.actor.weight.mul_(10)
    batch = images(20)
    actions, state = act(model, batch)
    assert len(set(actions)) > 1
    again, next_state = act(model, batch[::-1], state)
    assert state[0].std(axis=1).mean() > 0.01
    for i in range(20):
        action, single_state = act(model, batch[i])
        assert action == actions[i]
        following, following_state = act(model, batch[19 - i], single_state)
        assert following == again[i]
        for single, many in ((single_state, state), (following_state, next_state)):
            for part, parts in zip(single, many, strict=True):
                np.testing.assert_allclose(part[:, 0], parts[:, i], atol=1e-5)


def test_one_image_as_a_batch(model):
    action, state = act(model, images(1)[0])
    actions, states = act(model, images(1))
    assert actions.shape == (1,) and actions[0] == action
    np.testing.assert_array_equal(state, states)


def test_state_matters(model):
    _, state = act(model, images(30))
    obs = images(30, seed=1)
    fresh, going_on = act(model, obs)[0], act(model, obs, state)[0]
    assert (fresh != going_on).any()
    zeros = np.zeros((1, 30, HIDDEN), dtype=np.float32)
    np.testing.assert_array_equal(act(model, obs, (zeros, zeros))[0], fresh)  # as in sb3-contrib


def test_state_follows_the_networks(model):
    """Against the networks themselves, called one after the other."""
    frames = images(3, (3, SIZE, SIZE))
    hidden = th.zeros(1, HIDDEN), th.zeros(1, HIDDEN)
    policy, state = model.policy, None
    for frame in frames:
        action, state = act(model, frame, state)
        with th.no_grad():
            seen = 2 * policy.tokenizer.decode(policy.tokenizer.encode(th.tensor(frame)[None] / 255)) - 1
            features = policy.actor_critic.cnn(seen.contiguous(memory_format=th.channels_last))
            hidden = policy.actor_critic.lstm(features, hidden)
            assert action == policy.actor_critic.actor(hidden[0]).argmax()
        np.testing.assert_allclose(np.concatenate(state), np.stack([part.numpy() for part in hidden]), atol=1e-6)


def test_codes_as_input(tmp_path):
    """The actor-critic sees the codebook's entries of a frame's tokens: playing, collecting, imagining, and once loaded."""
    env = FakeImageEnv(screen_height=16, screen_width=12, n_channels=3, action_dim=4)
    model = tiny(env, {"actor_critic_input": "codes"}, burn_in=3)
    tokenizer, codebook = model.policy.tokenizer, model.policy.tokenizer.quantizer.codebook
    seen: list[th.Tensor] = []
    model.policy.actor_critic.cnn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))

    obs = images(5)
    model.predict(obs)
    tokens = tokenizer.encode(model.policy.to_frames(model.policy.resize(obs)))
    (codes,) = seen
    for position, (row, column) in enumerate(np.ndindex(*tokenizer.grid)):
        assert th.equal(codes[:, :, row, column], codebook[tokens[:, position]])

    decoded: list[th.Tensor] = []
    tokenizer.decoder.register_forward_pre_hook(lambda module, inputs: decoded.append(inputs[0]))
    seen.clear()
    model.learn(12)
    # One gradient step of the tokenizer in each epoch and one behind the last; else frames are decoded for figures only
    assert [inputs.requires_grad for inputs in decoded].count(True) == 4
    assert all(inputs.shape[1:] == codes.shape[1:] for inputs in seen)
    assert sum(len(inputs) for inputs in seen) > 12 + 4 * model.actor_critic_batch_size * model.imagination_horizon

    model.save(tmp_path / "model")
    for ours, theirs in zip(act(IRIS.load(tmp_path / "model", device="cpu"), obs), act(model, obs), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("given", [{}, {"actor_critic_input": "auto"}])
def test_small_images_are_seen_as_codes(given, capsys):
    """By default, and it is said; the paper's four max-pools leave more than a position of larger ones."""
    sizes = {name: value for name, value in SIZES.items() if name != "actor_critic_input"}
    for side, codes in ((28, True), (32, False)):
        model = IRIS("CnnPolicy", FrameEnv(), policy_kwargs={**sizes, **given, "image_size": side}, verbose=1, device="cpu")
        assert model.policy.actor_critic.sees_codes is codes
        assert ("The actor-critic sees codes" in capsys.readouterr().out) is codes


@pytest.mark.parametrize("dtype", [bool, int, float])
def test_episode_start_resets(model, dtype):
    obs = images(4)
    _, state = act(model, obs)
    starts = np.array([1, 0, 1, 0], dtype=dtype)
    _, mixed = act(model, obs, state, starts)
    fresh, going_on = act(model, obs), act(model, obs, state)
    for k in range(2):
        np.testing.assert_allclose(mixed[k][:, [0, 2]], fresh[1][k][:, [0, 2]], atol=1e-6)
        np.testing.assert_allclose(mixed[k][:, [1, 3]], going_on[1][k][:, [1, 3]], atol=1e-6)
    assert not np.allclose(fresh[1][0], going_on[1][0])
    for none in (None, np.zeros(4, dtype)):
        np.testing.assert_array_equal(act(model, obs, state, none)[1], going_on[1])


@pytest.mark.parametrize("batched", [False, True])
def test_layouts_and_sizes(model, batched):
    """Channels first or last, at the environment's or the networks' size: the same image gives the same answer."""
    env_size = images(6)
    model_size = model.policy.resize(env_size)
    assert model_size.shape == (6, 3, SIZE, SIZE)
    expected = act(model, env_size)
    for obs in (env_size, model_size):
        flipped = np.ascontiguousarray(obs[:, :, ::-1])[:, :, ::-1]  # a view as OpenGL's are
        for layout in (obs, flipped, obs.transpose(0, 2, 3, 1), np.ascontiguousarray(obs.transpose(0, 2, 3, 1))):
            if batched:
                actions, state = act(model, layout)
                np.testing.assert_array_equal(actions, expected[0])
                np.testing.assert_array_equal(state, expected[1])
            else:
                action, state = act(model, layout[2])
                assert action == expected[0][2]
                np.testing.assert_allclose(np.stack(state)[:, 0, 0], np.stack(expected[1])[:, 0, 2], atol=1e-5)


def test_channels_first_env():
    """Where the environment itself gives channels first, both layouts are understood as well."""
    model = decided(tiny(FakeImageEnv(screen_height=16, screen_width=12, n_channels=3, channel_first=True)))
    obs = images(5)
    np.testing.assert_array_equal(act(model, obs)[1], act(model, obs.transpose(0, 2, 3, 1))[1])


@pytest.mark.parametrize("channels", [1, 4, 7])
def test_numbers_of_channels(channels):
    env = FakeImageEnv(screen_height=16, screen_width=16, n_channels=channels)
    model = tiny(env)
    obs = env.reset(seed=0)[0]
    assert model.predict(obs)[1][0].shape == (1, 1, HIDDEN)
    np.testing.assert_array_equal(act(model, obs)[1], act(model, obs.transpose(2, 0, 1))[1])


def test_predict_sees_what_the_collection_sees():
    """What the policy makes of frames in ``learn`` is what it makes of them in ``predict``, resized as they are."""
    env = FakeImageEnv(screen_height=20, screen_width=12, n_channels=3)
    env.observation_space.seed(0)
    model = decided(tiny(env, burn_in=20, **NO_TRAINING))
    frames, states = [], []
    model.policy.actor_critic.register_forward_hook(lambda module, args, output: states.append(output.state))
    model.learn(9, callback=lambda local, _: frames.append(local["new_obs"]) or True)
    state = None
    for t in range(9):  # an episode has 10 steps
        stored = model.replay_buffer.observations[t]
        if t > 0:
            np.testing.assert_array_equal(model.policy.resize(frames[t - 1]), stored)
        _, state = act(model, stored if t == 0 else frames[t - 1], state)
        np.testing.assert_allclose(np.concatenate(state)[:, 0], th.cat(states[t]).numpy(), atol=1e-5)
        del states[t + 1 :]  # those of `predict`


@pytest.fixture
def sampled(model) -> Iterator[IRIS]:
    old = model.policy.eval_temperature
    yield model
    model.policy.eval_temperature = old


def test_sampling_at_eval_temperature(sampled):
    """Frequencies of the actions in many copies of a frame, against the softmax of the logits over the temperature."""
    frame, n = images(1, (3, SIZE, SIZE)), 4_000
    policy = sampled.policy
    logits, _ = policy.act(frame, LSTMState(th.zeros(1, HIDDEN), th.zeros(1, HIDDEN)))
    old_bias = policy.actor_critic.actor.bias.data.clone()
    try:
        policy.actor_critic.actor.bias.data += th.tensor([1.0, 0.5, 0.0, -1.0]) - logits[0]  # make them these
        for temperature in (0.5, 1.0, 3.0):
            policy.eval_temperature = temperature
            actions, _ = sampled.predict(frame.repeat(n, axis=0))
            expected = th.softmax(th.tensor([1.0, 0.5, 0.0, -1.0]) / temperature, 0).numpy()
            errors = (np.bincount(actions, minlength=4) / n - expected) / np.sqrt(expected * (1 - expected) / n)
            assert np.abs(errors).max() < 4.5, (temperature, errors)
        assert (sampled.predict(frame.repeat(n, axis=0), deterministic=True)[0] == 0).all()
        policy.eval_temperature = 0.0
        assert (sampled.predict(frame.repeat(n, axis=0))[0] == 0).all()
    finally:
        policy.actor_critic.actor.bias.data = old_bias


def test_default_is_to_sample_at_half_temperature():
    assert IRIS.__init__.__defaults__ is not None
    model = tiny(FrameEnv())
    assert model.policy.eval_temperature == model.eval_temperature == 0.5
    actions, _ = model.predict(np.zeros((200, SIZE, SIZE, 3), dtype=np.uint8))
    assert len(set(actions)) == 3


def test_it_changes_nothing():
    model = tiny(FrameEnv()).learn(8)
    model.policy.world_model.train()  # as in its training phase
    model.policy.tokenizer.train()
    modes = {name: module.training for name, module in model.policy.named_modules()}
    before = parameters(model), steps_in_buffer(model), th.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    own = model._rng.bit_generator.state
    obs, starts = images(4, (3, SIZE, SIZE)), np.array([True, False, False, True])
    _, state = model.predict(obs)
    inputs = obs.copy(), starts.copy(), np.array(state)
    for deterministic in (True, False):
        model.predict(obs, state, starts, deterministic)
    assert {name: module.training for name, module in model.policy.named_modules()} == modes
    assert_equal(before[0], parameters(model))
    assert_equal(before[1], steps_in_buffer(model))
    assert th.equal(before[2], th.get_rng_state())
    assert np.array_equal(before[3], np.random.get_state()[1])
    assert before[4] == random.getstate()
    assert own == model._rng.bit_generator.state
    for value, given in zip((obs, starts, np.array(state)), inputs, strict=True):
        np.testing.assert_array_equal(value, given)
    assert all(parameter.grad is None or not parameter.grad.isnan().any() for parameter in model.policy.parameters())


@pytest.mark.parametrize("n_envs", [1, 2])
def test_predict_in_a_callback_does_not_change_the_run(n_envs):
    """Not the LSTM state of the running collection, either."""
    runs, actions = [], []
    for predict in (False, True):
        env = frame_envs(n_envs)
        model = decided(tiny(env))

        def callback(local, _, predict=predict):
            if predict:
                local["self"].predict(local["new_obs"])
                local["self"].predict(images(3, (3, SIZE, SIZE)), deterministic=True)
            return True

        runs.append(model.learn(12, callback=callback))
        actions.append([frame_env(env, i).actions for i in range(n_envs)])
    assert actions[0] == actions[1]
    assert_equal(parameters(runs[0]), parameters(runs[1]))


def test_training_uses_no_networks_in_training_mode():
    """``predict`` right after ``learn`` has no dropout, and neither has the collection."""
    model = tiny(FrameEnv(), policy_kwargs={"dropout": 0.9}).learn(8)
    assert not any(module.training for module in model.policy.modules())
    tokens = th.zeros(1, 2, model.policy.tokenizer.tokens_per_frame, dtype=th.int64)
    with th.no_grad():
        first, second = (model.policy.world_model(tokens, tokens[:, :, 0]) for _ in range(2))
    assert th.equal(first.token_logits, second.token_logits)
    assert set(NETWORKS) == {name for name, _ in model.policy.named_children()}


@pytest.mark.parametrize(
    "obs, pattern",
    [
        (images(1)[0].astype(np.float32), "observation.*float32.*uint8"),
        (images(1)[0] > 5, "observation.*bool.*uint8"),
        (images(1)[0].astype(np.int64), "observation.*int64.*uint8"),
        (images(1, (3, 12, 16))[0], r"observation.*\(3, 12, 16\).*\(3, 16, 12\).*\(3, 8, 8\)"),
        (images(1, (1, 16, 12)), r"observation.*\(1, 1, 16, 12\)"),
        (images(1, (16, 12))[0], r"observation.*\(16, 12\)"),
        (images(1)[None], r"observation.*\(1, 1, 3, 16, 12\)"),
        (np.uint8(3), r"observation.*\(\)"),
        ((images(1)[0], {}), r"observation.*env\.reset\(\)"),
        ((images(1), {}), r"observation.*env\.reset\(\)"),
        ({"image": images(1)}, "observation.*object"),
        (None, "observation.*object"),
    ],
)
def test_wrong_observations(model, obs, pattern):
    with pytest.raises(ValueError, match=pattern):
        model.predict(obs)


ZEROS = np.zeros((1, 2, HIDDEN), dtype=np.float32)


@pytest.mark.parametrize(
    "state",
    [
        (ZEROS,),
        (ZEROS, ZEROS, ZEROS),
        (ZEROS[0], ZEROS[0]),
        (ZEROS[:, :1], ZEROS[:, :1]),
        (ZEROS, ZEROS[:, :1]),
        (ZEROS[:, :, :3], ZEROS[:, :, :3]),
        (ZEROS.repeat(2, axis=0),) * 2,
        (None, None),
        (ZEROS.astype(str), ZEROS.astype(str)),
        (ZEROS.astype(object), ZEROS),
        ZEROS,
        3,
        "state",
        {"h": ZEROS, "c": ZEROS},
    ],
)
def test_wrong_states(model, state):
    with pytest.raises(ValueError, match=r"state .*\(1, 2, 16\)"):
        model.predict(images(2), state)


@pytest.mark.parametrize("starts", [True, [True], [True] * 3, np.zeros(3), ["a", "b"], [None, None]])
def test_wrong_episode_starts(model, starts):
    with pytest.raises(ValueError, match=r"episode_start=.* 2 observations"):
        model.predict(images(2), None, starts)


def test_state_as_array(model):
    """Both parts stacked are as good as a tuple of them."""
    _, state = act(model, images(2))
    np.testing.assert_array_equal(act(model, images(2), np.stack(state))[1], act(model, images(2), state)[1])


def test_own_random_stream_follows_the_seed():
    predicted = []
    for seed in (1, 1, 2):
        model = tiny(FrameEnv(), seed=seed)
        obs = np.zeros((50, SIZE, SIZE, 3), dtype=np.uint8)
        predicted.append({"actions": model.predict(obs)[0]})
        assert (predicted[-1]["actions"] != model.predict(obs)[0]).any()  # the stream moves on
    assert_equal(predicted[0], predicted[1])
    assert differing(predicted[0], predicted[2]) == {"actions"}
