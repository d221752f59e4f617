"""Checkpoints: what is in them, and that a run which is taken up from one is the run that was never stopped."""

import copy
import gc
import json
import pickle
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from sb3_iris import IRIS, CnnLstmPolicy, RunCheckpointCallback
from sb3_iris.buffers import BLOCK_STEPS
from sb3_iris.checkpoint_folder import MANIFEST, find_checkpoints
from sb3_iris.visualization import WorldModelCallback
from tests.presets import (
    NO_TRAINING,
    SIZE,
    FrameEnv,
    GradientSteps,
    assert_equal,
    frame_envs,
    parameters,
    steps_in_buffer,
    tiny,
)


class ClockEnv(gym.Env):
    """
    Episodes of four steps that depend on nothing but their actions, so that a new episode is the one that would have come.
    """

    observation_space = gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        self.t, self.sum = 0, 0
        return self._frame(), {}

    def _frame(self) -> np.ndarray:
        frame = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
        frame[: 2 * self.t] = 30 * self.sum
        return frame

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        self.sum += int(action)
        return self._frame(), float(action - 1), self.t == 4, False, {}


def clocks(n_envs: int = 1) -> VecEnv:
    return make_vec_env(ClockEnv, n_envs)


def everything(model: IRIS) -> dict[str, Any]:
    """All that a run consists of."""
    keys = np.random.get_state(legacy=True)
    arrays: dict[str, Any] = {**parameters(model), **{f"buffer.{name}": a for name, a in steps_in_buffer(model).items()}}
    arrays |= {name: getattr(model, name) for name in ("num_timesteps", "_episode_num", "_n_updates")}
    arrays["returns"] = [info["r"] for info in model.ep_info_buffer or ()]
    arrays["lengths"] = [info["l"] for info in model.ep_info_buffer or ()]
    arrays["progress"] = model._current_progress_remaining
    arrays["random.torch"] = th.get_rng_state()
    arrays["random.policy"] = model.policy._generator.get_state()
    arrays["random.numpy"] = [*keys[1], *keys[2:]]  # type: ignore[misc, index]
    arrays["random.python"] = random.getstate()[1]
    for name, stream in (("model", model._rng), ("actions", model.action_space.np_random)):
        arrays[f"random.{name}"] = str(stream.bit_generator.state)
    return arrays


class Stopped(Exception):
    """What a test stops a run with."""


class StopAfterCheckpoint(RunCheckpointCallback):
    """Stops the run once there is a checkpoint, unless that is the one at its end."""

    def _save_if_due(self) -> None:
        before = self._position
        super()._save_if_due()
        if self._position != before:
            raise Stopped


def in_pieces(folder: Path, total: int, n_envs: int, save_freq: int = 4, **kwargs: Any) -> tuple[IRIS, int]:
    """A run that is stopped at each of its checkpoints and taken up by another model; number of pieces."""
    again = {name: value for name, value in kwargs.items() if callable(value)}
    model = tiny(clocks(n_envs), **kwargs)
    for n_pieces in range(1, 100):
        try:
            return model.learn(total, StopAfterCheckpoint(save_freq, folder)), n_pieces
        except Stopped:
            for draw in (random.random, np.random.rand, lambda: th.rand(3)):  # another process is elsewhere in its streams
                draw()
            model = IRIS.resume(folder, clocks(n_envs), device="cpu", **again)
    raise AssertionError("no end")


@pytest.mark.parametrize(
    "n_envs, total, pieces, kwargs",
    [
        (1, 24, 6 + 3, {"final_training_epochs": 3, "learning_rate": 3e-4}),
        (2, 48, 6 + 1, {"train_freq": 8, "final_training_epochs": 1, "buffer_size": 24}),  # overwritten
        (1, 16, 4 + 2, {"final_training_epochs": 2, "learning_rate": lambda progress: 1e-3 * progress**2}),
        (
            1,
            14,
            3 + 1,
            {"final_training_epochs": 1, "policy_kwargs": {"robust_tokenizer": True}},
        ),  # the last epoch is half a one
        (1, 16, 4 + 1, {"tokenizer_learning_stops": 9}),
        (1, 16, 4 + 1, {"amp": "bfloat16"}),
        (1, 16, 4 + 1, {"policy_kwargs": {"patch_tokenizer": True}}),
    ],
)
def test_resumed_run_is_the_uninterrupted_one(tmp_path, n_envs, total, pieces, kwargs):
    """Stopped after each collection and after each final training phase, it has the same of everything, bit for bit."""
    whole = tiny(clocks(n_envs), **kwargs).learn(total)
    expected = everything(whole)
    model, n_pieces = in_pieces(tmp_path, total, n_envs, **kwargs)
    assert n_pieces == pieces + 1
    if total % 4:  # an episode that is running at the end was cut off when the last piece began
        expected["buffer.truncations"][-1] = True
    assert_equal(everything(model), expected)
    assert model.replay_buffer.pos == whole.replay_buffer.pos and model.replay_buffer.full == whole.replay_buffer.full
    np.testing.assert_array_equal(model.replay_buffer.episodes, whole.replay_buffer.episodes)
    again = IRIS.resume(tmp_path, clocks(n_envs), device="cpu", **{k: v for k, v in kwargs.items() if callable(v)})
    assert_equal(everything(again.learn(total)), expected)  # it was at its end, so there is nothing left to do


def test_the_comparison_sees_a_lost_stream(tmp_path, monkeypatch):
    """The test above can fail: with any random stream of its own, a resumed run is another one."""
    expected = everything(tiny(clocks()).learn(16))
    for stream in ("_rng", "torch"):
        with monkeypatch.context() as patch:
            restore = IRIS.resume

            def resume(*args: Any, stream: str = stream, restore: Any = restore, **kwargs: Any) -> IRIS:
                model = restore(*args, **kwargs)
                if stream == "_rng":
                    model._rng = np.random.default_rng(5)
                else:
                    th.manual_seed(5)
                return model

            patch.setattr(IRIS, "resume", resume)
            model, _ = in_pieces(tmp_path / stream, 16, 1)
        assert not np.array_equal(everything(model)["actor_critic.actor.weight"], expected["actor_critic.actor.weight"])


def test_pending_training_phase_with_any_env(tmp_path):
    """An env that cannot be taken up starts a new episode; the training phases before it steps again are the same."""
    learned = {}

    class Save(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            assert isinstance(self.model, IRIS)
            if self.num_timesteps == 18:
                self.model.save_checkpoint(tmp_path)
                learned.update(parameters(self.model))

    model = tiny(frame_envs(2), train_freq=6, final_training_epochs=4).learn(18, Save())
    resumed = IRIS.resume(tmp_path, frame_envs(2), device="cpu")
    assert_equal(parameters(resumed), learned)
    steps = GradientSteps(resumed)
    resumed.learn(18)
    assert len(steps.names) == 3 * (1 + 4)
    assert_equal(parameters(resumed), parameters(model))


def test_new_episode_follows(tmp_path):
    """What was running is truncated where it was cut, and no segment goes across."""
    model = tiny(frame_envs(2), train_freq=6, **NO_TRAINING)
    model.learn(14)  # episodes of 5 steps each: 5 + 2
    model.save_checkpoint(tmp_path)
    env = frame_envs(2)
    resumed = IRIS.resume(tmp_path, env, device="cpu")
    assert resumed.replay_buffer.truncations[:7].tolist() == [[False] * 2] * 6 + [[True] * 2]
    resumed.learn(6, reset_num_timesteps=False)
    buffer = resumed.replay_buffer
    assert resumed.num_timesteps == 20 and buffer.size() == 10
    assert buffer.episode_starts[:10, 0].nonzero()[0].tolist() == [0, 5, 7]
    assert not buffer.terminations[6].any()
    # the env does not begin with the episodes that its seed began with
    assert not np.array_equal(buffer.observations[7], buffer.observations[0])


class FrozenAt(BaseCallback):
    """Writes a checkpoint within a collection."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__()
        self.folder, self.step = folder, step

    def _on_step(self) -> bool:
        if self.num_timesteps == self.step:
            self.model.save_checkpoint(self.folder)  # type: ignore[attr-defined]
        return True


@pytest.mark.parametrize("step", [1, 5, 6, 8, 9])
def test_saved_within_a_collection(tmp_path, step):
    """The rest of the collection follows, then its training phase; no step and no gradient step is missing or double."""
    model = tiny(FrameEnv(), final_training_epochs=2).learn(10, FrozenAt(tmp_path, step))
    resumed = IRIS.resume(tmp_path, FrameEnv(), device="cpu")
    assert resumed.num_timesteps == step
    resumed.learn(10)
    assert resumed.num_timesteps == 10 and resumed.replay_buffer.size() == 10
    assert resumed._n_updates == model._n_updates == 3 * (3 + 2)


# --- The folder ----------------------------------------------------------------------------------------------------------


def frame_files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("frames_*")}


def test_only_new_frames_are_written(tmp_path):
    model = tiny(FrameEnv(), buffer_size=50, **NO_TRAINING)
    model.learn(20).save_checkpoint(tmp_path)
    first = frame_files(tmp_path)
    assert len(first) == 2  # one block, twice
    model.learn(10, reset_num_timesteps=False)
    model.save_checkpoint(tmp_path)
    second = frame_files(tmp_path)
    assert len(second) == 4 and first.items() < second.items()
    model.save_checkpoint(tmp_path)
    assert frame_files(tmp_path) == second
    model.learn(45, reset_num_timesteps=False)  # the first block is overwritten, and half of the second
    for _ in range(2):
        model.save_checkpoint(tmp_path)
    last = frame_files(tmp_path)
    assert not first.keys() & last.keys() and (second.keys() - first.keys()) < last.keys() and len(last) == 4
    resumed = IRIS.resume(tmp_path, FrameEnv(), device="cpu")
    assert_equal(without_truncations(resumed), without_truncations(model))
    resumed.learn(1, reset_num_timesteps=False)
    resumed.save_checkpoint(tmp_path)  # goes on writing where the other stopped
    assert set(frame_files(tmp_path)) - set(last) and last.items() <= frame_files(tmp_path).items()
    other = tmp_path / "other"
    resumed.save_checkpoint(other)  # which has nothing yet
    assert_equal(without_truncations(IRIS.resume(other, FrameEnv(), device="cpu")), without_truncations(resumed))


def without_truncations(model: IRIS) -> dict[str, np.ndarray]:
    """The replay buffer but for what taking up a run changes in it."""
    return {name: array for name, array in steps_in_buffer(model).items() if name != "truncations"}


def test_last_two_are_kept(tmp_path):
    model = tiny(FrameEnv(), **NO_TRAINING)
    paths = [model.learn(3, reset_num_timesteps=False).save_checkpoint(tmp_path) for _ in range(4)]
    assert [path.name for path in paths[2:]] == ["checkpoint_000003_9_steps", "checkpoint_000004_12_steps"]
    assert find_checkpoints(tmp_path) == [paths[3], paths[2]]
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith("frames")} == {
        "lock",
        paths[2].name,
        paths[3].name,
    }
    assert IRIS.resume(paths[2], FrameEnv(), device="cpu").num_timesteps == 9  # a certain one


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[: len(content) // 2] if how == "truncated" else content)
    if how == "gone":
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "flipped", "gone"])
@pytest.mark.parametrize("name", [MANIFEST, "networks.npz", "replay.npz"])
def test_falls_back(tmp_path, name, how):
    model = tiny(FrameEnv(), **NO_TRAINING)
    first, second = (model.learn(3, reset_num_timesteps=False).save_checkpoint(tmp_path) for _ in range(2))
    damage(second / name, how)
    with pytest.warns(UserWarning, match=rf"{second.name} is damaged: its {name}.*Going on from.*{first.name}"):
        resumed = IRIS.resume(tmp_path, FrameEnv(), device="cpu")
    assert resumed.num_timesteps == 3
    # what is written next does not push out the good one while the damaged one stays
    third = resumed.save_checkpoint(tmp_path)
    assert find_checkpoints(tmp_path) == [third, first]
    for path in (first, third):
        damage(path / name, how)
    with pytest.raises(ValueError, match=rf"{third.name} is damaged.*{first.name} is damaged"):
        IRIS.resume(tmp_path, FrameEnv(), device="cpu")


@pytest.mark.parametrize("how", ["truncated", "flipped", "gone"])
def test_damaged_frames(tmp_path, how):
    """All checkpoints use them, so there are two of each; what is damaged is mended by the next checkpoint."""
    model = tiny(FrameEnv(), **NO_TRAINING).learn(6)
    model.save_checkpoint(tmp_path)
    original, copy = sorted(tmp_path.glob("frames_*"), key=lambda path: len(path.name))
    for path in (original, copy):
        damage(path, how)
        assert_equal(without_truncations(IRIS.resume(tmp_path, FrameEnv(), device="cpu")), without_truncations(model))
        model.save_checkpoint(tmp_path)
        assert original.read_bytes() == copy.read_bytes()
    damage(original, how)
    damage(copy, how)
    with pytest.raises(ValueError, match=rf"{original.name} is missing or not as it was written, and so is its copy"):
        IRIS.resume(tmp_path, FrameEnv(), device="cpu")
    model.save_checkpoint(tmp_path)  # the frames are still in memory
    assert_equal(without_truncations(IRIS.resume(tmp_path, FrameEnv(), device="cpu")), without_truncations(model))


def test_folder_is_removed_in_between(tmp_path):
    model = tiny(FrameEnv(), **NO_TRAINING).learn(6)
    model.save_checkpoint(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    model.save_checkpoint(tmp_path / "run")
    assert IRIS.resume(tmp_path / "run", FrameEnv(), device="cpu").num_timesteps == 6


def test_leftovers_are_removed(tmp_path):
    model = tiny(FrameEnv(), **NO_TRAINING).learn(6)
    (tmp_path / ".new").mkdir()
    (tmp_path / ".new" / "networks.npz").write_bytes(b"half")
    (tmp_path / ".frames").write_bytes(b"half")
    (tmp_path / "frames_0_0123456789abcdef.npz").write_bytes(b"nobody's")
    model.save_checkpoint(tmp_path)
    assert not (tmp_path / ".new").exists() and not (tmp_path / ".frames").exists()
    assert not (tmp_path / "frames_0_0123456789abcdef.npz").exists()


def test_links_are_not_followed(tmp_path):
    """Neither a lock nor a checkpoint leads out of the folder."""
    (tmp_path / "precious").mkdir()
    precious = tmp_path / "precious" / MANIFEST
    precious.write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoint_000001_5_steps").symlink_to(precious.parent)
    (folder / ".new").symlink_to(precious.parent)
    (folder / ".frames").symlink_to(precious)
    (folder / "lock").symlink_to(precious)
    model = tiny(FrameEnv(), **NO_TRAINING).learn(6)
    with pytest.raises(ValueError, match="lock is a link"):
        model.save_checkpoint(folder)
    (folder / "lock").unlink()
    with pytest.raises(OSError):
        model.save_checkpoint(folder)
    (folder / ".new").unlink()
    for _ in range(3):
        model.save_checkpoint(folder)
    assert precious.read_text() == "mine"


# --- What resume asks for ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny(FrameEnv(), final_training_epochs=2, gamma=0.9, stats_window_size=7).learn(8, RunCheckpointCallback(4, folder))
    return folder


def test_arguments(saved):
    model = IRIS.resume(saved, FrameEnv(), device="cpu", gamma=0.5, tensorboard_log=None)
    assert model.gamma == 0.5 and model.final_training_epochs == 2 and model.seed == 0
    assert model.ep_info_buffer is not None and model.ep_info_buffer.maxlen == 7
    assert [info["l"] for info in model.ep_info_buffer] == [5]
    for kwargs, message in (
        ({"gamma": 2}, r"checkpoint_.*gamma=2"),
        ({"buffer_size": 500}, "buffer_size=500 cannot be changed: it is 300"),
        ({"sequence_length": 5}, "sequence_length=5 cannot be changed: it is 4"),
        ({"nonsense": 1}, "nonsense: IRIS has no such argument"),
        ({"policy_kwargs": {"embed_dim": 32}}, r"must be float32"),
        ({"policy": "MlpPolicy"}, "MlpPolicy"),
    ):
        with pytest.raises(ValueError, match=message):
            IRIS.resume(saved, FrameEnv(), device="cpu", **kwargs)
    with pytest.raises(ValueError, match="env=None"):
        IRIS.resume(saved, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"n_envs.*\[1, 3, 3, 8, 8\].*env has \[2, "):
        IRIS.resume(saved, frame_envs(2))
    with pytest.raises(ValueError, match="no checkpoint in it"):
        IRIS.resume(saved / "nowhere", FrameEnv())


class OtherPolicy(CnnLstmPolicy):
    """A class of the user's own."""


def test_what_is_code_must_be_given_again(tmp_path):
    model = IRIS(
        OtherPolicy, FrameEnv(), learning_rate=lambda _: 1e-3, policy_kwargs=tiny(FrameEnv()).policy_kwargs, device="cpu"
    )
    model.save_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"learning_rate, policy: code.*IRIS\.resume\(path, env, learning_rate="):
        IRIS.resume(tmp_path, FrameEnv())
    resumed = IRIS.resume(tmp_path, FrameEnv(), device="cpu", learning_rate=1e-3, policy=OtherPolicy)
    assert type(resumed.policy) is OtherPolicy and resumed.learning_rate == 1e-3
    assert_equal(parameters(model), parameters(resumed))


def test_learn_after_resume(saved):
    """The same call goes on with the run; another number of steps is a question; more steps are a call of their own."""
    model = IRIS.resume(saved, FrameEnv(), device="cpu")
    with pytest.raises(ValueError, match=r"total_timesteps=9, but.*learn\(8\).*reset_num_timesteps=False"):
        model.learn(9)
    assert model.learn(8).num_timesteps == 8 and model._n_updates == 3 * (2 + 2)
    assert model.learn(4, reset_num_timesteps=False).num_timesteps == 12
    assert model._n_updates == 3 * (2 + 2 + 1 + 2)
    assert model.learn(4).num_timesteps == 4  # from the second call on all is as always
    more = IRIS.resume(saved, FrameEnv(), device="cpu").learn(4, reset_num_timesteps=False)
    assert more.num_timesteps == 12 and more._n_updates == 3 * (2 + 2 + 1 + 2)


def test_never_trained(tmp_path):
    model = tiny(FrameEnv())
    model.save_checkpoint(tmp_path)
    resumed = IRIS.resume(tmp_path, FrameEnv(), device="cpu")
    assert_equal(parameters(model), parameters(resumed))
    assert resumed.learn(8).num_timesteps == 8


def test_loaded_after_a_checkpoint(tmp_path):
    """SB3's files know nothing of checkpoints."""
    model = tiny(FrameEnv()).learn(8, RunCheckpointCallback(4, tmp_path / "run"))
    model.save(tmp_path / "model")
    loaded = IRIS.load(tmp_path / "model", env=FrameEnv())
    assert loaded.learn(4, reset_num_timesteps=False).num_timesteps == 12


def test_logger_goes_on(tmp_path):
    """Steps in the log count on, and TensorBoard has one run."""
    log, folder = str(tmp_path / "log"), tmp_path / "run"
    model = tiny(clocks(), tensorboard_log=log)
    with pytest.raises(Stopped):
        model.learn(12, StopAfterCheckpoint(8, folder))
    IRIS.resume(folder, clocks(), device="cpu").learn(12)
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["IRIS_1"]
    assert len(list((tmp_path / "log" / "IRIS_1").iterdir())) == 2
    model = IRIS.resume(folder, clocks(), device="cpu")
    model.set_logger(configure(str(tmp_path / "csv"), ["json"]))
    model.learn(12)
    rows = [json.loads(line) for line in (tmp_path / "csv" / "progress.json").read_text().splitlines()]
    assert [row["time/total_timesteps"] for row in rows] == [8, 12, 12]


# --- The callback --------------------------------------------------------------------------------------------------------


def test_when_the_callback_saves(tmp_path):
    """At ends of collections, in the final training phases and at the end of the call; once each."""
    positions = []

    class Watch(RunCheckpointCallback):
        def _save(self) -> None:
            before = self._position
            super()._save()
            if self._position != before:
                positions.append(self._position)

    tiny(FrameEnv(), final_training_epochs=5).learn(20, [Watch(8, tmp_path)])
    assert positions == [(8, 1), (16, 3), (20, 6), (20, 8), (20, 10)]
    for save_freq in (0, 2.5, True):
        with pytest.raises(ValueError, match="save_freq"):
            RunCheckpointCallback(save_freq, tmp_path)  # type: ignore[arg-type]


def test_callback_that_stops_the_run(tmp_path):
    """The end of a call that a callback stopped has a checkpoint, and the same call goes on from there."""

    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.num_timesteps != 6

    tiny(FrameEnv()).learn(12, [Stop(), RunCheckpointCallback(100, tmp_path)])
    resumed = IRIS.resume(tmp_path, FrameEnv(), device="cpu")
    assert resumed.num_timesteps == 6
    assert resumed.learn(12)._n_updates == 3 * (3 + 1)


@pytest.mark.parametrize("buffer_size", [20, 1_000])
@pytest.mark.parametrize("with_model", [False, True])
def test_replay_buffer_of_another_size(tmp_path, buffer_size, with_model):
    """A loaded replay buffer keeps the size that it has in its file, and a run that is taken up has it too."""
    played = tiny(frame_envs(2), buffer_size=buffer_size).learn(40)
    if with_model:
        played.save(tmp_path / "model", include=["replay_buffer"])
        model = IRIS.load(tmp_path / "model", frame_envs(2), device="cpu", buffer_size=300)
    else:
        played.save_replay_buffer(tmp_path / "buffer")
        model = tiny(frame_envs(2), buffer_size=300)
        model.load_replay_buffer(tmp_path / "buffer")
    model.learn(4, reset_num_timesteps=False).save_checkpoint(tmp_path / "run")
    resumed = IRIS.resume(tmp_path / "run", frame_envs(2), device="cpu")
    assert resumed.replay_buffer.buffer_size == buffer_size // 2
    rows = np.arange(model.replay_buffer.n_added - model.replay_buffer.size(), model.replay_buffer.n_added)
    for name in ("observations", "actions", "rewards", "episode_starts"):
        ours, theirs = (getattr(m.replay_buffer, name)[rows % (buffer_size // 2)] for m in (resumed, model))
        assert np.array_equal(ours, theirs), name


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model(tmp_path, copied):
    """A model that writes checkpoints can be copied like others, once it has no env: few of those can."""
    model = tiny(FrameEnv()).learn(8, RunCheckpointCallback(4, tmp_path))
    model.env = None
    twin = copied(model)
    assert_equal(parameters(twin), parameters(model))
    assert model._checkpoint_locks.keys() == {tmp_path} and twin._checkpoint_locks != model._checkpoint_locks
    twin.set_env(frame_envs())
    assert twin.learn(4, reset_num_timesteps=False).num_timesteps == 12


# --- Properties ----------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n_envs=st.integers(1, 3),
    rows=st.integers(5, 40),
    steps=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    length=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip_of_any_run(tmp_path, n_envs, rows, steps, length, seed):
    """Checkpoints at any moments, buffers of any size, filled or not: the last one gives back what was there."""
    folder = tmp_path / str(len(list(tmp_path.iterdir())))  # the same seed may come again
    model = tiny(frame_envs(n_envs, length=length), buffer_size=rows * n_envs, seed=seed, **NO_TRAINING)
    for n in steps:
        model.learn(n * n_envs, reset_num_timesteps=False)
        model.save_checkpoint(folder)
    expected = everything(model)
    resumed = IRIS.resume(folder, frame_envs(n_envs, length=length), device="cpu")
    found = everything(resumed)
    cut = found.pop("buffer.truncations") != expected.pop("buffer.truncations")
    assert cut.sum() <= n_envs
    assert_equal(found, expected)
    assert (resumed.replay_buffer.pos, resumed.replay_buffer.full) == (model.replay_buffer.pos, model.replay_buffer.full)
    if model.replay_buffer.size():
        np.testing.assert_array_equal(resumed.replay_buffer.episodes, model.replay_buffer.episodes)


def test_many_blocks(tmp_path):
    """More steps than a block of frames has."""
    model = tiny(FrameEnv(), buffer_size=2 * BLOCK_STEPS, **NO_TRAINING)
    buffer, rng = model.replay_buffer, np.random.default_rng(0)
    for n in range(3 * BLOCK_STEPS - 50):
        frame = rng.integers(256, size=(1, 3, SIZE, SIZE), dtype=np.uint8)
        buffer.add(frame, np.array([n % 3]), np.array([n]), np.array([n % 7 == 6]), np.array([False]), np.array([n % 7 == 0]))
        if n in (400, 1_900):
            model.save_checkpoint(tmp_path)
    model.save_checkpoint(tmp_path)
    resumed = IRIS.resume(tmp_path, FrameEnv(), device="cpu")
    assert_equal(without_truncations(resumed), without_truncations(model))


def test_no_warnings_of_its_own(tmp_path):
    model = tiny(FrameEnv(), **NO_TRAINING).learn(6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_checkpoint(tmp_path)
        IRIS.resume(tmp_path, FrameEnv(), device="cpu")


class PassesOn(IRIS):
    """As users write subclasses."""

    def __init__(self, *args: Any, bonus: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bonus = bonus


class KeepsNothing(IRIS):
    """An argument that leaves no trace."""

    def __init__(self, policy: Any, env: Any, bonus: float, **kwargs: Any) -> None:
        super().__init__(policy, env, **kwargs)


def test_subclass(tmp_path):
    """What it passes on to ``IRIS`` is in the checkpoint too."""
    original = tiny(FrameEnv())
    kwargs = {name: getattr(original, name) for name in ("train_freq", "sequence_length", "burn_in", "imagination_horizon")}
    kwargs |= {"policy_kwargs": original.policy_kwargs, "buffer_size": 50, "gamma": 0.75, "device": "cpu", **NO_TRAINING}
    model = PassesOn("CnnPolicy", FrameEnv(), bonus=2.0, **kwargs)
    model.learn(6).save_checkpoint(tmp_path / "passes_on")
    resumed = PassesOn.resume(tmp_path / "passes_on", FrameEnv(), device="cpu")
    assert (resumed.bonus, resumed.gamma, resumed.num_timesteps) == (2.0, 0.75, 6)
    KeepsNothing("CnnPolicy", FrameEnv(), 2.0, **kwargs).learn(6).save_checkpoint(tmp_path / "keeps_nothing")
    with pytest.raises(ValueError, match=r"bonus: .* must be given again"):
        KeepsNothing.resume(tmp_path / "keeps_nothing", FrameEnv(), device="cpu")
    assert KeepsNothing.resume(tmp_path / "keeps_nothing", FrameEnv(), device="cpu", bonus=2.0).gamma == 0.75


def test_path_of_the_log(tmp_path):
    tiny(FrameEnv(), tensorboard_log=tmp_path / "logs").learn(8).save_checkpoint(tmp_path / "run")
    assert IRIS.resume(tmp_path / "run", FrameEnv(), device="cpu").tensorboard_log == str(tmp_path / "logs")


def test_what_the_env_says_of_its_episodes(tmp_path):
    """Whatever it is, it costs no checkpoint; what JSON cannot name is left out."""

    class Env(FrameEnv):
        def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
            *others, info = super().step(action)
            return *others, {**info, "visits": {np.int64(action): 1, "all": np.float32(2)}}  # type: ignore[return-value]

    model = tiny(Monitor(Env(), info_keywords=("visits",))).learn(8)
    model.save_checkpoint(tmp_path)
    resumed = IRIS.resume(tmp_path, Monitor(Env(), info_keywords=("visits",)), device="cpu")
    assert model.ep_info_buffer is not None and resumed.ep_info_buffer is not None
    assert [info["r"] for info in resumed.ep_info_buffer] == [info["r"] for info in model.ep_info_buffer] != []
    assert resumed.ep_info_buffer[0]["visits"] == {"all": 2}


def test_folder_of_another_run(tmp_path):
    """Its checkpoints stay; one that comes from there, or has written there, may write."""
    holders = [tiny(FrameEnv()).learn(8, RunCheckpointCallback(4, tmp_path))]
    before = [path.name for path in find_checkpoints(tmp_path)]
    env = FrameEnv()
    for other in (tiny(env), tiny(env)):  # the second time no model holds the folder
        with pytest.raises(ValueError, match=r"has checkpoints of another run.*IRIS\.resume"):
            other.learn(8, RunCheckpointCallback(4, tmp_path))
        with pytest.raises(ValueError, match=r"has checkpoints of another run.*IRIS\.resume"):
            other.save_checkpoint(tmp_path)
        holders.clear()
    assert env.n_steps == 0
    assert [path.name for path in find_checkpoints(tmp_path)] == before
    resumed = IRIS.resume(tmp_path, FrameEnv(), device="cpu")
    resumed.learn(8, RunCheckpointCallback(4, tmp_path), reset_num_timesteps=False)
    resumed.learn(8, RunCheckpointCallback(4, tmp_path), reset_num_timesteps=False)
    resumed.save_checkpoint(tmp_path / "copy")
    resumed.learn(4, reset_num_timesteps=False).save_checkpoint(tmp_path)  # one may write to several folders in turns
    assert find_checkpoints(tmp_path)[0].name.endswith("_28_steps")


@pytest.mark.parametrize("make", [lambda path: RunCheckpointCallback(4, path), lambda path: WorldModelCallback(4, path)])
@pytest.mark.parametrize("nested", [False, True])
def test_inside_a_callback_that_knows_steps_only(tmp_path, make, nested):
    callback = make(tmp_path)
    env = FrameEnv()
    with pytest.raises(ValueError, match=r"in EveryNTimesteps would do nothing.*Give it to learn"):
        tiny(env).learn(8, EveryNTimesteps(4, CallbackList([callback]) if nested else callback))
    assert env.n_steps == 0


def test_files_are_closed(tmp_path):
    """Nothing to hear of a model that is gone, and its folder is free."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = tiny(FrameEnv())
        model.save_checkpoint(tmp_path)
        del model
        gc.collect()
    assert not [warning for warning in caught if issubclass(warning.category, ResourceWarning)]
