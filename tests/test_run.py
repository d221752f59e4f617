"""``learn``: how many env steps, when which gradient steps, and what the callbacks hear of it."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecEnvWrapper, VecFrameStack

from sb3_iris import IRIS, CnnLstmPolicy, iris
from sb3_iris.atari_wrappers import make_atari_env
from sb3_iris.buffers import SequenceReplayBuffer, Starts
from sb3_iris.tokenizer import BaseTokenizer
from tests.presets import (
    NETWORKS,
    NO_TRAINING,
    SIZE,
    EventLog,
    FrameEnv,
    GradientSteps,
    assert_equal,
    differing,
    frame_env,
    frame_envs,
    parameters,
    steps_in_buffer,
    tiny,
)


@pytest.mark.parametrize(
    "height, width, channels, channel_first, n_envs, n_stack, image_size",
    [
        (8, 8, 1, False, 1, 1, 8),
        (8, 8, 4, False, 1, 1, None),
        (8, 8, 3, True, 2, 1, 8),
        (16, 16, 3, False, 2, 2, 8),
        (84, 84, 1, False, 1, 4, 8),
        (84, 84, 4, True, 2, 1, 16),
        (84, 60, 3, False, 1, 1, 8),
        (8, 16, 1, True, 2, 2, None),
        (10, 12, 3, False, 1, 1, 12),
    ],
)
def test_image_envs(height, width, channels, channel_first, n_envs, n_stack, image_size):
    def make_env() -> FakeImageEnv:
        return FakeImageEnv(
            screen_height=height, screen_width=width, n_channels=channels, channel_first=channel_first, action_dim=3
        )

    env = make_vec_env(make_env, n_envs=n_envs)
    if n_stack > 1:
        env = VecFrameStack(env, n_stack)
    model = tiny(env, policy_kwargs={"image_size": image_size})
    before = parameters(model)
    assert model.learn(7) is model
    assert model.num_timesteps == model.replay_buffer.size() * n_envs == math.ceil(7 / n_envs) * n_envs
    side = (height, width) if image_size is None else (image_size, image_size)
    assert model.replay_buffer.obs_shape == (channels * n_stack, *side)
    after = {name: value for name, value in parameters(model).items() if name in before}
    assert differing(before, after) == {"tokenizer", "world_model", "actor_critic"}

    obs = env.reset()  # as the env gives it, channels last where it does
    actions, state = model.predict(obs)
    assert actions.shape == (n_envs,) and state[0].shape == (1, n_envs, 16)


def test_frames_are_resized_by_area():
    """Shrunk to half, each pixel of the stored frames is the mean of four."""
    seen = []
    env = FakeImageEnv(screen_height=2 * SIZE, screen_width=2 * SIZE, n_channels=2)
    model = tiny(env, **NO_TRAINING)
    model.learn(6, callback=lambda local, _: seen.append(local["self"]._last_obs[0]) or True)
    stored = model.replay_buffer.observations[1:6, 0].astype(float)
    means = np.stack(seen[:5]).reshape(5, 2, SIZE, 2, SIZE, 2).mean((3, 5))
    assert np.abs(stored - means).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("n_envs", [1, 2, 3])
@pytest.mark.parametrize("total", [0, 1, 7, 8, 9, 12])
@pytest.mark.parametrize("train_freq", [1, 4, 100])
def test_number_of_env_steps(n_envs, total, train_freq):
    env = frame_envs(n_envs)
    model = tiny(env, train_freq=train_freq, **NO_TRAINING)
    model.learn(total)
    expected = math.ceil(total / n_envs)  # of each environment
    assert [frame_env(env, i).n_steps for i in range(n_envs)] == [expected] * n_envs
    assert model.num_timesteps == expected * n_envs
    assert model.replay_buffer.size() == expected


@pytest.mark.parametrize("total, expected", [(1e1, 10), (np.int64(6), 6), (6.5, 7)])
def test_number_of_env_steps_as_float(total, expected):
    model = tiny(FrameEnv(), train_freq=100, **NO_TRAINING)
    model.learn(total)
    assert model.num_timesteps == expected


@pytest.mark.parametrize("n_envs", [1, 2])
def test_schedule_of_gradient_steps(n_envs):
    model = tiny(
        frame_envs(n_envs),
        tokenizer_learning_starts=4,
        world_model_learning_starts=8,
        actor_critic_learning_starts=13,
        tokenizer_gradient_steps=3,
        world_model_gradient_steps=2,
        actor_critic_gradient_steps=1,
        final_training_epochs=2,
    )
    steps = GradientSteps(model)
    model.learn(20)
    t, w, a = (["tokenizer"] * 3, ["world_model"] * 2, ["actor_critic"])
    # one phase after each 4 steps, and two more at the end
    assert steps.names == t + (t + w) + (t + w) + (t + w + a) + (t + w + a) + 2 * (t + w + a)
    assert steps.timesteps == [4] * 3 + [8] * 5 + [12] * 5 + [16] * 6 + [20] * 6 + [20] * 12
    assert model._n_updates == len(steps.names)


def test_networks_that_do_not_train_stay_as_they_are():
    model = tiny(FrameEnv(), world_model_learning_starts=100, actor_critic_gradient_steps=0)
    before = parameters(model)
    model.learn(8)
    after = {name: value for name, value in parameters(model).items() if name in before}
    assert differing(before, after) == {"tokenizer"}
    assert model._n_updates == 3


def test_final_phases_in_which_nothing_is_trained_are_left_out(tmp_path):
    """Nor do they fill the log."""
    late = {f"{network}_learning_starts": 100 for network in NETWORKS}
    model = tiny(FrameEnv(), final_training_epochs=5, **late)
    model.set_logger(configure(str(tmp_path), ["json"]))
    with pytest.warns(UserWarning, match="will not be trained"):
        model.learn(8)
    assert model._n_updates == 0 and len((tmp_path / "progress.json").read_text().splitlines()) == 2


@pytest.mark.parametrize("context", [th.no_grad, th.inference_mode])
def test_training_without_gradients_is_an_error(context):
    """As in SB3, and not networks that stay as they are."""
    model = tiny(FrameEnv())
    with context(), pytest.raises(RuntimeError, match=r"does not require grad|[Ii]nference"):
        model.learn(8)


@pytest.mark.parametrize(
    ("name", "value"), [("train_freq", 0), ("exploration_rate", 7), ("eval_temperature", -1.0), ("sequence_length", 5)]
)
def test_hyperparameters_changed_since_are_checked(name, value):
    model = tiny(FrameEnv())
    setattr(model, name, value)
    with pytest.raises(ValueError, match=f"{name}={value}"):
        model.learn(4)
    assert model.num_timesteps == 0


def test_no_final_training():
    model = tiny(FrameEnv(), final_training_epochs=0)
    steps = GradientSteps(model)
    model.learn(8)
    assert steps.names == 2 * list(NETWORKS)


def test_no_steps():
    """Nothing to play, nothing to train on: not even the final phases."""
    model = tiny(FrameEnv())
    steps = GradientSteps(model)
    model.learn(0)
    assert len(steps.names) == 0
    model.learn(4)
    assert len(steps.names) == 6
    model.learn(0, reset_num_timesteps=False)
    assert len(steps.names) == 6


def test_going_on_and_starting_again():
    env = frame_envs(length=100)
    model = tiny(env)
    steps = GradientSteps(model)
    model.learn(6)
    assert frame_env(env).n_resets == 1
    assert len(steps.names) == 3 * 3  # after 4 and 6 steps, and one final phase
    model.learn(7, reset_num_timesteps=False)
    assert model.num_timesteps == frame_env(env).n_steps == 13
    assert frame_env(env).n_resets == 1
    assert len(steps.names) == 3 * 6
    # one long episode
    assert model.replay_buffer.episodes.tolist() == [[0, 0, 13]]

    model.learn(5)
    assert model.num_timesteps == 5
    assert frame_env(env).n_steps == 18
    assert frame_env(env).n_resets == 2
    assert model.replay_buffer.episodes.tolist() == [[0, 0, 13], [0, 13, 5]]


def test_one_run_in_two_calls_plays_the_same_steps():
    """Without training, ``learn(11)`` is the same as ``learn(4)`` and ``learn(7, reset_num_timesteps=False)``."""
    actions = []
    for totals in ([11], [4, 7]):
        env = frame_envs()
        model = tiny(env, train_freq=4, burn_in=5, **NO_TRAINING)
        for total in totals:
            model.learn(total, reset_num_timesteps=False)
        actions.append(frame_env(env).actions)
    assert len(set(actions[0])) > 1
    assert actions[0] == actions[1]


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("stop_at", [2, 6, 8, 12])  # at the first step, within an epoch, at its end, at the very end
def test_callback_stops(stop_at, n_envs):
    env = frame_envs(n_envs)
    model = tiny(env)
    steps, log = GradientSteps(model), EventLog(stop_at)
    assert model.learn(12, callback=log) is model
    assert model.num_timesteps == stop_at
    assert frame_env(env).n_steps == stop_at // n_envs
    phases = (stop_at - 1) // 4  # those that came before the step
    assert len(steps.names) == 3 * phases
    assert max(steps.timesteps, default=0) < stop_at
    assert log.events[-3:] == ["step", "rollout_end", "training_end"]

    model.learn(4, reset_num_timesteps=False)  # and goes on when asked to
    assert model.num_timesteps == stop_at + 4


@pytest.mark.parametrize("n_envs, total", [(1, 10), (2, 10), (3, 10)])
def test_callback_events(n_envs, total):
    model = tiny(frame_envs(n_envs), final_training_epochs=2)
    log = EventLog()
    model.learn(total, callback=log)
    # collections of 4 steps rounded up to a multiple of n_envs, the last one of what is left
    per_collection = math.ceil(4 / n_envs)
    per_run = math.ceil(total / n_envs)
    sizes = [per_collection] * (per_run // per_collection)
    sizes += [per_run % per_collection] if per_run % per_collection else []
    expected = ["training_start"]
    for size in sizes:
        expected += ["rollout_start", *["step"] * size, "rollout_end"]
    assert log.events == [*expected, "training_end"]
    assert log.timesteps == list(range(n_envs, per_run * n_envs + 1, n_envs))
    assert log.n_calls == per_run


def test_training_is_between_collections():
    """Gradient steps come behind ``on_rollout_end`` and before the next ``on_rollout_start``."""
    model = tiny(FrameEnv())
    log = EventLog()
    optimizer = model.policy.actor_critic_optimizer
    optimizer.register_step_post_hook(lambda *_: log.events.append("gradient_step"))
    model.learn(8, callback=log)
    epoch = ["rollout_start", *["step"] * 4, "rollout_end", "gradient_step"]
    assert log.events == ["training_start", *epoch, *epoch, "gradient_step", "training_end"]


def test_kinds_of_callbacks():
    logs = [EventLog() for _ in range(4)]
    calls = []
    model = tiny(FrameEnv(), **NO_TRAINING)
    model.learn(2, callback=logs[0])
    model.learn(2, callback=logs[1:3])
    model.learn(2, callback=CallbackList([logs[3]]))
    assert [log.n_calls for log in logs] == [2] * 4
    model.learn(3, callback=lambda local, _: calls.append(sorted(local)) or len(calls) < 2)
    assert len(calls) == 2 and {"self", "new_obs", "rewards", "dones", "infos", "actions"} <= set(calls[0])


def linear(progress: float) -> float:
    return 1e-3 * progress


@pytest.mark.parametrize(
    "learning_rate, expected",
    [(linear, [8e-4, 6e-4, 4e-4, 2e-4, 0]), (3e-4, [3e-4] * 5), (0, [0] * 5), (lambda progress: 2e-3, [2e-3] * 5)],
)
def test_learning_rate_of_all_optimizers(learning_rate: float | Callable, expected: list[float]):
    model = tiny(FrameEnv(), learning_rate=learning_rate, final_training_epochs=2)
    steps = GradientSteps(model)
    before = parameters(model)
    model.learn(12)
    # 3 epochs of 4 steps, then 2 phases that count like 4 steps each: 20 in all
    assert steps.names == 5 * list(NETWORKS)
    np.testing.assert_allclose(steps.learning_rates, np.repeat(expected, 3), atol=1e-12)
    if learning_rate == 0:
        assert_equal(before, {name: value for name, value in parameters(model).items() if name in before})


def test_schedule_goes_on_like_sb3():
    """With ``reset_num_timesteps=False`` the progress is that of all calls together."""
    model = tiny(FrameEnv(), learning_rate=linear, final_training_epochs=0)
    model.learn(4)
    steps = GradientSteps(model)
    model.learn(12, reset_num_timesteps=False)
    np.testing.assert_allclose(steps.learning_rates[::3], [5e-4, 2.5e-4, 0], atol=1e-12)


def test_progress_bars(capsys, monkeypatch):
    model = tiny(FrameEnv())
    with monkeypatch.context() as context:
        context.setattr(iris, "tqdm", None)  # which starts a thread for bars that nobody sees
        model.learn(8)
    assert capsys.readouterr().err == ""
    model.learn(8, progress_bar=True)
    err = capsys.readouterr().err
    for text in ("env steps", "8/8", "tokenizer", "world model", "actor critic"):
        assert text in err

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        model.learn(8, progress_bar=True, callback=fail)
    capsys.readouterr()
    model.learn(8)
    assert capsys.readouterr().err == ""


def test_interrupted_training_phase():
    """After Ctrl-C between two gradient steps of the world model no dropout is left on, and the next call goes on."""
    model = tiny(FrameEnv(), policy_kwargs={"dropout": 0.5}, world_model_gradient_steps=2)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.policy.world_model_optimizer.register_step_post_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.learn(12)
    hook.remove()
    assert model.num_timesteps == 4
    assert not any(module.training for module in model.policy.modules())
    modes = []
    model.learn(
        8,
        reset_num_timesteps=False,
        callback=lambda local, _: modes.append(any(module.training for module in local["self"].policy.modules())) or True,
    )
    assert model.num_timesteps == 12 and modes == [False] * 8


def test_policy_by_name_and_class():
    for policy in ("CnnPolicy", "CnnLstmPolicy", CnnLstmPolicy):
        model = IRIS(policy, FrameEnv(), policy_kwargs=tiny(FrameEnv()).policy_kwargs, perceptual_loss=None)
        assert type(model.policy) is CnnLstmPolicy


def test_game_of_atari(tmp_path):
    """Pong from the emulator through collection, all three training phases, imagination, saving, loading and acting."""
    env = make_atari_env("Pong", n_envs=2, seed=0, image_size=16)
    model = tiny(env, policy_kwargs={"image_size": 16})
    steps = GradientSteps(model)
    model.learn(12)
    assert steps.names == 4 * list(NETWORKS)
    assert model.replay_buffer.observations[:6].std() > 0
    model.save(tmp_path / "pong")
    loaded = IRIS.load(tmp_path / "pong", env=env)
    obs = env.reset()
    actions, state = loaded.predict(obs, deterministic=True)
    expected, _ = model.predict(obs, deterministic=True)
    np.testing.assert_array_equal(actions, expected)
    for _ in range(3):
        obs, _, dones, _ = env.step(actions)
        actions, state = loaded.predict(obs, state, dones)
    loaded.learn(4, reset_num_timesteps=False)
    assert loaded.num_timesteps == 16


def test_env_by_name():
    """The game as it is registered: 210x160 pixels, resized to the networks' size."""
    model = tiny("ALE/Pong-v5", **NO_TRAINING)
    model.learn(3)
    assert model.replay_buffer.obs_shape == (3, SIZE, SIZE)
    assert model.action_space.n == 6


def test_frozen_tokenizer_stays_as_it_is() -> None:
    """Training phases at or past the given step leave it alone, those before do not."""
    model = tiny(FrameEnv(), tokenizer_learning_starts=4, tokenizer_learning_stops=8, world_model_learning_starts=0)
    weights = [parameter.clone() for parameter in model.policy.tokenizer.parameters()]
    model.learn(4)  # its final training phase included
    trained = [parameter.clone() for parameter in model.policy.tokenizer.parameters()]
    assert not all(th.equal(old, new) for old, new in zip(weights, trained, strict=True))
    model.learn(8, reset_num_timesteps=False)
    assert all(th.equal(old, new) for old, new in zip(trained, model.policy.tokenizer.parameters(), strict=True))


@pytest.mark.parametrize(
    "share, rewarded_share, n_envs, expected",
    [
        (0.0, 0.0, 1, (0, 8, 0)),
        (0.45, 0.0, 1, (4, 8, 0)),
        (1.0, 0.0, 3, (8, 3, 0)),
        (1.0, 0.25, 3, (6, 3, 2)),
        (0.5, 0.5, 1, (2, 8, 4)),
        (0.5, 1.0, 1, (0, 8, 8)),
    ],
)
@pytest.mark.parametrize("name, method", [("world_model", "sample_tokens"), ("actor_critic", "sample_contexts")])
def test_shares_of_a_batch(name, method, share, rewarded_share, n_envs, expected, monkeypatch):
    """Batches of eight; the last two collections are of four steps each, over all environments."""
    asked = []
    original = getattr(SequenceReplayBuffer, method)

    def sample(*args):
        asked.append(args[-1])
        return original(*args)

    monkeypatch.setattr(SequenceReplayBuffer, method, sample)
    settings = {f"{name}_recent_share": share, f"{name}_batch_size": 8, "rewarded_share": rewarded_share}
    model = tiny(frame_envs(n_envs), sequence_length=3, imagination_horizon=5, **settings).learn(8)
    within = model.sequence_length if name == "world_model" else model.imagination_horizon
    assert set(asked) == {Starts(*expected, within)}


@pytest.mark.parametrize("reward", [np.inf, -np.inf, np.nan, 1e39])
def test_rewards_that_are_no_numbers(reward):
    """A checkpoint with them could not be read, and their signs mean nothing."""
    model = tiny(frame_envs(bonus=reward))
    with pytest.raises(ValueError, match=r"env gave the rewards \[(inf|-inf|nan)\] after 0 steps.*finite"):
        model.learn(8)
    assert model.replay_buffer.size() == 0


def test_rewards_that_are_too_large_to_keep():
    class Large(VecEnvWrapper):
        def reset(self):
            return self.venv.reset()

        def step_wait(self):
            obs, rewards, dones, infos = self.venv.step_wait()
            return obs, np.full(len(rewards), 1e39), dones, infos  # float64, as SubprocVecEnv gives

    with pytest.raises(ValueError, match=r"env gave the rewards \[1e\+39\] after 0 steps.*finite"):
        tiny(Large(frame_envs())).learn(8)


def test_burn_in_of_many_environments_is_encoded_in_parts(monkeypatch):
    sizes = []
    encode = BaseTokenizer.encode

    def spy(tokenizer: BaseTokenizer, frames: th.Tensor) -> th.Tensor:
        sizes.append(len(frames))
        return encode(tokenizer, frames)

    monkeypatch.setattr(BaseTokenizer, "encode", spy)
    model = tiny(frame_envs(20, length=None), burn_in=30, buffer_size=2_000, train_freq=20 * 31, **NO_TRAINING)
    model.learn(2 * 20 * 31)
    assert [n for n in sizes if n > 20] == 2 * [256, 256, 88]  # what is played is read 20 at a time


@pytest.mark.parametrize("n_envs, final_epochs", [(1, 0), (1, 2), (3, 0), (16, 0), (16, 1), (16, 4)])
def test_progress_of_many_environments(n_envs, final_epochs):
    """It falls to 0 and not below, though environments together take more steps than were asked for."""
    seen: list[float] = []

    def schedule(progress: float) -> float:
        seen.append(progress)
        return 1e-3 * progress**0.5

    model = tiny(frame_envs(n_envs), learning_rate=schedule, final_training_epochs=final_epochs)
    seen.clear()
    model.learn(20)
    assert seen == sorted(seen, reverse=True) and seen[-1] == 0 and seen[0] < 1


def test_dones_that_the_env_refills():
    """What it hands out is its own memory."""

    class Refills(VecEnvWrapper):
        def reset(self) -> Any:
            self.dones = np.zeros(self.num_envs, dtype=bool)
            return self.venv.reset()

        def step_wait(self) -> Any:
            observations, rewards, dones, infos = self.venv.step_wait()
            self.dones[:] = dones
            return observations, rewards, self.dones, infos

    runs = [tiny(wrap(frame_envs(2))).learn(24) for wrap in (Refills, lambda env: env)]
    assert_equal(*map(steps_in_buffer, runs))
    assert steps_in_buffer(runs[0])["episode_starts"][:, 0].tolist() == [t % 5 == 0 for t in range(12)]
