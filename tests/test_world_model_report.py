"""How far the dream can be trusted: reports count right, and asking for one changes nothing."""

import cv2
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env

from sb3_iris.world_model_env import reconstruct
from sb3_iris.world_model_report import world_model_report
from tests.corridor import LENGTH, Corridor, corridor_frame, corridor_images, learned_model, model_of
from tests.presets import FrameEnv


@pytest.mark.parametrize("n_envs", [1, 4])
def test_report_of_a_learned_game(n_envs):
    model = learned_model()
    before = model.policy._generator.get_state()
    report = world_model_report(model, make_vec_env(Corridor, n_envs), n_steps=200, horizon=6)
    assert th.equal(model.policy._generator.get_state(), before)
    assert report.n_segments[0] == 200 and (np.diff(report.n_segments) < 0).all()
    assert (report.frame_error < 0.3 * report.repeat_error).all()
    assert (report.reconstruction_error < report.frame_error + 1e-4).all()  # a wrong token may look as good
    assert (report.token_accuracy > 0.9).all()
    for column in (report.reward_precision, report.reward_recall, report.end_precision, report.end_recall):
        assert (column > 0.8).all()
    again = world_model_report(model, make_vec_env(Corridor, n_envs), n_steps=200, horizon=6)
    assert all(np.array_equal(ours, theirs, equal_nan=True) for ours, theirs in zip(report, again, strict=True))


def test_report_counts(monkeypatch, tmp_path):
    """Against figures by hand, for a dream that always sees an end, reward 1 and the frame stand still."""
    model = learned_model()

    class StillGame:
        max_frames = 3
        kept_frames = 1

        def __init__(self, *args, **kwargs):
            pass

        def reset(self, tokens):
            self.tokens = tokens
            self.frames = model.policy.tokenizer.decode(tokens)

        def step(self, actions):
            return th.ones(len(actions)), th.ones(len(actions), dtype=th.bool), self.frames

    monkeypatch.setattr(model, "_imagined_game", StillGame)
    monkeypatch.setattr(model.policy, "predict", lambda obs, *args, **kwargs: (np.ones(len(obs), dtype=int), None))

    class FromLeft(Corridor):
        """Episodes from the left end: 0, 1, 2, 3, reward 1."""

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.position = 0
            return corridor_frame(0), {}

        def step(self, action):
            return super().step(1)  # whatever exploration says

    report = world_model_report(model, FromLeft(), n_steps=2 * LENGTH, horizon=5)
    assert report.n_segments.tolist() == [8, 6, 4, 2, 0]
    images = corridor_images(0, 1, 2, 3)
    # two cells of four differ between any two positions
    assert report.repeat_error[:3] == pytest.approx([0.5, 0.5, 0.5])
    pairs = [np.abs(reconstruct(model, images[:-h]) / 255 - images[h:] / 255).mean() for h in (1, 2, 3)]
    assert report.frame_error[:3] == pytest.approx(pairs, abs=0.002)
    floors = [np.abs(reconstruct(model, images[h:]) / 255 - images[h:] / 255).mean() for h in (1, 2, 3)]
    assert report.reconstruction_error[:3] == pytest.approx(floors, abs=0.002)
    # one segment in LENGTH, then in LENGTH - 1 ..., meets the end at that horizon
    assert report.reward_precision[:4] == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1])
    assert report.end_precision[:4] == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1])
    assert report.reward_recall[:4].tolist() == report.end_recall[:4].tolist() == [1, 1, 1, 1]
    assert all(np.isnan(column[4]) for column in report[1:]) and np.isnan(report.frame_error[3])
    table = report.table().splitlines()
    assert len(table) == 7 and table[0].startswith("| horizon | segments | frame error |")
    assert table[-1] == "| 5 | 0 |" + " - |" * 8
    assert {line.count("|") for line in table} == {11}
    report.plot(tmp_path / "report.png")
    assert cv2.imread(str(tmp_path / "report.png")).shape == (400, 1200, 3)


def test_report_of_another_game():
    with pytest.raises(ValueError, match="actions"):
        world_model_report(learned_model(), FrameEnv())

    class Larger(Corridor):
        pass

    larger = Larger()
    larger.observation_space = type(larger.observation_space)(0, 255, (16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match=r"shape \(3, 16, 16\), but the model was made for \(3, 8, 8\)"):
        world_model_report(learned_model(), larger)
    with pytest.raises(ValueError, match="n_steps=0"):
        world_model_report(learned_model(), Corridor(), n_steps=0)


class ToAndFro(Corridor):
    """The cell goes to and fro by itself, which no frame shows but one at an end; every third step is the same either way."""

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        self.direction = int(self.np_random.choice([-1, 1]))
        self.t = 0
        return observation, info

    def step(self, action):
        self.t += 1
        if not 0 <= self.position + self.direction < LENGTH:
            self.direction *= -1
        self.position += self.direction
        return corridor_frame(self.position), 0.0, False, self.t == 30, {}


def test_half_a_context_remembers_what_one_frame_does_not_show():
    """Past the context the default goes on like a sliding window, while a restart from one frame forgets the way."""
    model = model_of(ToAndFro, world_model_gradient_steps=1_200, sequence_length=6)
    half, window, restart = (
        world_model_report(model, make_vec_env(ToAndFro, 4), n_steps=300, horizon=13, kept_frames=kept).token_accuracy[8::3]
        for kept in (None, 5, 1)
    )
    assert (half > 0.95).all() and (window > 0.95).all()
    assert (restart < 0.75).all()
