"""SB3's vectorised environments and their wrappers around the algorithm."""

import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import get_system_info
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    VecVideoRecorder,
)

from tests.presets import (
    NO_TRAINING,
    SIZE,
    FrameEnv,
    assert_equal,
    frame_env,
    frame_envs,
    parameters,
    steps_in_buffer,
    tiny,
)


def test_subprocesses_give_the_same_run():
    models = []
    for vec_env_cls in (DummyVecEnv, SubprocVecEnv):
        env = make_vec_env(FrameEnv, n_envs=2, vec_env_cls=vec_env_cls)
        assert type(env) is vec_env_cls
        models.append(tiny(env).learn(12))
        env.close()
    assert_equal(parameters(models[0]), parameters(models[1]))
    assert_equal(steps_in_buffer(models[0]), steps_in_buffer(models[1]))


def test_vec_monitor():
    env = VecMonitor(DummyVecEnv([FrameEnv] * 2))
    model = tiny(env, **NO_TRAINING)
    model.learn(22)
    assert [info["l"] for info in model.ep_info_buffer] == [5] * 4
    rewards = model.replay_buffer.rewards[:10].T.reshape(4, 5).sum(1)  # by environment, then by episode
    np.testing.assert_allclose(sorted(info["r"] for info in model.ep_info_buffer), sorted(rewards))


@pytest.mark.parametrize("transposed", [False, True])
def test_frame_stack(transposed):
    """Two frames of 3 channels: the older ones come first."""
    env = frame_envs(2)
    stacked = VecFrameStack(VecTransposeImage(env), 2) if transposed else VecFrameStack(env, 2)
    model = tiny(stacked, **NO_TRAINING)
    model.learn(8)
    frames = model.replay_buffer.observations[:4, :, :, 0, 0]  # (steps, n_envs, channels)
    assert frames.shape == (4, 2, 6)
    assert frames[:, :, ::3].tolist() == [[[max(t - 1, 0), t]] * 2 for t in range(4)]  # the channel of the step
    assert frames[:, :, 1::3].tolist() == [[[0, 1]] * 2] + [[[1, 1]] * 2] * 3  # of the episode
    actions, _ = model.predict(stacked.reset())
    assert actions.shape == (2,)


def test_more_channels_than_pixels():
    """SB3 takes an 8x8 image of 9 channels for an 8x9 image of 8 channels: not without a warning."""
    with pytest.warns(UserWarning, match=r"\(8, 8, 9\).*smallest axis"):
        tiny(VecFrameStack(frame_envs(), 3), policy_kwargs={"image_size": 8})


def test_vec_normalize():
    """The buffer holds the rewards of the environment: normalised ones could be too small, and clipped ones are others."""
    env = VecNormalize(frame_envs(2), norm_obs=False, clip_reward=1e-3)
    model = tiny(env)
    model.learn(20)
    actions, rewards = model.replay_buffer.actions[:10], model.replay_buffer.rewards[:10]
    assert set(np.unique(actions)) == {0, 1, 2}
    np.testing.assert_array_equal(rewards, np.array(FrameEnv.rewards)[actions])

    loaded_env = VecNormalize(frame_envs(2), norm_obs=False)
    model.set_env(loaded_env)
    assert model.get_vec_normalize_env() is loaded_env
    model.learn(4, reset_num_timesteps=False)
    assert model.num_timesteps == 24


def test_normalised_observations_are_refused():
    with pytest.raises(ValueError, match="norm_obs=False"):
        tiny(VecNormalize(frame_envs()))


def test_video(tmp_path):
    pytest.importorskip("moviepy", reason="SB3's video recorder needs it")
    env = make_vec_env(FrameEnv, env_kwargs={"render_mode": "rgb_array"})
    env = VecVideoRecorder(env, str(tmp_path), record_video_trigger=lambda step: step == 0, video_length=4)
    tiny(env, **NO_TRAINING).learn(6)
    env.close()
    (video,) = tmp_path.glob("*.mp4")
    assert video.stat().st_size > 0


def test_env_is_not_changed():
    """Frames that an environment writes over later stay as they were in the buffer."""

    class OneArray(FrameEnv):
        array = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)

        def _frame(self) -> np.ndarray:
            self.array[:] = super()._frame()
            return self.array

    class NoCopies(DummyVecEnv):
        def _obs_from_buf(self):
            return self.buf_obs[None]

    env = NoCopies([OneArray])
    model = tiny(env, **NO_TRAINING)
    model.learn(7)
    assert model.replay_buffer.observations[:7, 0, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 0, 1]


def test_wrapped_once():
    """A single environment gets SB3's usual wrappers; one that has them keeps them."""
    model = tiny(FrameEnv(), **NO_TRAINING)
    assert isinstance(model.get_env(), VecTransposeImage)
    assert model.get_env().env_is_wrapped(Monitor) == [True]
    env = VecTransposeImage(frame_envs())
    assert tiny(env).get_env() is env


def test_system_info():
    info, text = get_system_info(print_info=False)
    assert "Stable-Baselines3" in info and "PyTorch" in text


def test_same_frames_for_any_number_of_envs():
    """Environments do not mix: each column of the buffer is the story of one of them."""
    env = frame_envs(3)
    model = tiny(env, **NO_TRAINING)
    model.learn(36)
    for i in range(3):
        assert model.replay_buffer.actions[:12, i].tolist() == frame_env(env, i).actions
        assert model.replay_buffer.observations[:12, i, 0, 0, 0].tolist() == [t % 5 for t in range(12)]
        assert model.replay_buffer.observations[:12, i, 1, 0, 0].tolist() == [1 + t // 5 for t in range(12)]
    assert len({tuple(model.replay_buffer.observations[:12, i, 2, 0, 0]) for i in range(3)}) == 3
