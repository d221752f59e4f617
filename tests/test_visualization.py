"""Looking into a model: pictures show what they say, reports count right, and looking changes nothing."""

import builtins
import io

import cv2
import imageio.v3
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.vec_env import VecTransposeImage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_iris.visualization import (
    SHORTEST_SIDE,
    WorldModelCallback,
    compare,
    comparison_video,
    reconstruction_grid,
    token_counts,
    token_histogram,
    write_video,
)
from sb3_iris.world_model_env import reconstruct
from sb3_iris.world_model_report import WorldModelReport
from tests.corridor import corridor_images, learned_model, position_in
from tests.presets import SIZE, FrameEnv, assert_equal, frame_envs, parameters, steps_in_buffer, tiny


def test_reconstruction_grid():
    model = learned_model()
    images = corridor_images(0, 3)
    grid = reconstruction_grid(model, images)
    factor = SHORTEST_SIDE // SIZE
    assert grid.shape == (3 * SHORTEST_SIDE, 2 * SHORTEST_SIDE, 3) and grid.dtype == np.uint8
    small = grid[::factor, ::factor].reshape(3, SIZE, 2, SIZE, 3).transpose(0, 2, 4, 1, 3)  # row, column, (C, H, W)
    reconstructions = reconstruct(model, images)
    assert np.array_equal(small[0], images)
    assert np.array_equal(small[1], reconstructions)
    assert np.array_equal(small[2], np.abs(images.astype(int) - reconstructions.astype(int)))
    assert small[2].mean() < 20


def test_token_counts():
    model = learned_model()
    images = corridor_images(0, 1, 2, 3, 3)
    counts = token_counts(model, images)
    tokens = model.policy.tokenizer.encode(model.policy.to_frames(images))
    assert counts.tolist() == [int((tokens == v).sum()) for v in range(16)]
    picture = token_histogram(np.array([0, 4, 1]), height=8, bar=2)
    dark = (picture[..., 0] == 80).sum(0)
    assert dark.tolist() == [8, 8, 4, 4, 0, 0]


def test_comparison():
    """The imagined game goes where the real one goes; a game that the actions do not fit goes where the actions go."""
    model = learned_model()
    generator = th.Generator().manual_seed(0)
    comparison = compare(model, corridor_images(1, 2, 1, 2), np.array([1, 0, 1]), np.zeros(3), 0, generator)
    assert [position_in(image) for image in comparison.imagined] == [1, 2, 1, 2]
    assert comparison.imagined_rewards.tolist() == [0, 0, 0] and not comparison.imagined_ends.any()
    over = compare(model, corridor_images(2, 1, 0), np.array([1, 1]), np.zeros(2), 0, generator)
    assert over.imagined_rewards.tolist() == [0, 1] and over.imagined_ends.tolist() == [False, True]
    actor_critic, state, values = model.policy.actor_critic, model.policy.actor_critic.initial_state(1), []
    for image in over.imagined:
        output = actor_critic(model.policy.to_frames(image[None]), state)
        state = output.state
        values.append(output.values.item())
    assert over.values == pytest.approx(values, abs=1e-4)  # the frames are rounded to bytes
    assert np.ptp(values) > 1e-3 and abs(over.values[0] - comparison.values[0]) > 1e-3  # not the same whatever is seen


def test_comparison_video(monkeypatch):
    texts = []
    put_text = cv2.putText
    monkeypatch.setattr(cv2, "putText", lambda image, text, *args: (texts.append(text), put_text(image, text, *args))[1])
    model = learned_model()
    comparison = compare(model, corridor_images(2, 3, 3), np.array([1, 1]), np.array([0, 1.5]), temperature=0)
    video = comparison_video(comparison)
    assert video.shape == (3, SHORTEST_SIDE + 48, 2 * SHORTEST_SIDE, 3)
    factor = SHORTEST_SIDE // SIZE
    for t in range(3):
        left, right = np.split(video[t, :SHORTEST_SIDE], 2, axis=1)
        assert np.array_equal(left[::factor, ::factor].transpose(2, 0, 1), comparison.real[t])
        assert np.array_equal(right[::factor, ::factor].transpose(2, 0, 1), comparison.imagined[t])
    values = [f"value {value:+.2f}" for value in comparison.values]
    assert texts[:4] == ["real", "imagined", "", values[0]]
    assert texts[4:10] == ["real", "action 1", "reward +0", "imagined", "reward +0", values[1]]
    assert texts[10:] == ["real", "action 1", "reward +1.5", "imagined", "reward +1", values[2] + "  END"]
    texts.clear()
    comparison_video(comparison._replace(imagined_ends=np.array([True, False])))  # over is over
    assert [text.endswith("END") for text in texts if text.startswith("value")] == [False, True, True]


def test_write_video(tmp_path):
    frames = np.random.default_rng(0).integers(256, size=(4, 16, 24, 1), dtype=np.uint8).repeat(3, -1)  # gray: exact in a GIF
    write_video(tmp_path / "video.gif", frames)
    assert np.array_equal(imageio.v3.imread(tmp_path / "video.gif"), frames)
    file = io.BytesIO()
    write_video(file, frames)
    assert file.getvalue() == (tmp_path / "video.gif").read_bytes()


def test_missing_packages(monkeypatch, tmp_path):
    original = builtins.__import__

    def no_extras(name, *args, **kwargs):
        if name.split(".")[0] in ("imageio", "matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    columns = [np.zeros(2) for _ in WorldModelReport._fields]
    monkeypatch.setattr(builtins, "__import__", no_extras)
    with pytest.raises(ImportError, match=r"imageio: pip install 'sb3_iris\[extra\]'"):
        write_video(tmp_path / "video.gif", np.zeros((1, 2, 2, 3), dtype=np.uint8))
    with pytest.raises(ImportError, match=r"matplotlib: pip install 'sb3_iris\[extra\]'"):
        WorldModelReport(*columns).plot(tmp_path / "report.png")


def test_callback_in_several_calls_of_learn(tmp_path):
    """It looks as often as in one."""
    callback = WorldModelCallback(freq=8, folder=tmp_path)
    model = tiny(FrameEnv())
    for _ in range(6):
        model.learn(4, callback, reset_num_timesteps=False)
    assert {path.name.split("_")[1] for path in tmp_path.iterdir()} == {"8", "16", "24"}
    tiny(FrameEnv()).learn(12, callback)  # another run
    assert callback.n_looks == 4


def test_callback(tmp_path):
    """It looks when it should, writes to both places, and the run is the one without it."""
    plain = tiny(VecTransposeImage(frame_envs(2))).learn(24)
    model = tiny(VecTransposeImage(frame_envs(2)), tensorboard_log=str(tmp_path / "tensorboard"))
    callback = WorldModelCallback(freq=8, folder=tmp_path / "pictures", n_frames=3, horizon=4)
    model.learn(24, callback=callback)
    assert callback.n_looks == 3
    names = {f"step_{n}_{what}" for n in (8, 16, 24) for what in ("reconstruction.png", "tokens.png", "imagined.gif")}
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == names
    grid = cv2.imread(str(tmp_path / "pictures" / "step_8_reconstruction.png"))
    assert grid.shape == (3 * SHORTEST_SIDE, 3 * SHORTEST_SIDE, 3)
    video = imageio.v3.imread(tmp_path / "pictures" / "step_24_imagined.gif")
    assert video.shape == (5, 2 * (SHORTEST_SIDE + 48), 2 * SHORTEST_SIDE, 3)  # horizon 4: five frames; two segments
    events = EventAccumulator(str(tmp_path / "tensorboard" / "IRIS_1"), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    for tag in ("world_model/imagined", "world_model/reconstruction"):
        assert [event.step for event in events.Images(tag)] == [8, 16, 24]
    gif = events.Images("world_model/imagined")[2].encoded_image_string
    assert np.array_equal(imageio.v3.imread(gif), video)
    histograms = events.Histograms("world_model/tokens")
    assert [event.step for event in histograms] == [8, 16, 24]
    assert histograms[0].histogram_value.num == 64 * 4  # frames times tokens
    assert_equal(parameters(plain), parameters(model))
    assert_equal(steps_in_buffer(plain), steps_in_buffer(model))


@pytest.mark.parametrize("name", ["freq", "n_frames", "horizon", "n_segments"])
def test_bad_callback_arguments(name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        WorldModelCallback(**{name: 0})
