"""What is logged under which key, in all of SB3's formats."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.logger import configure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_iris import IRIS
from tests.presets import NETWORKS, FrameEnv, frame_envs, tiny

COMMON = {
    "rollout/ep_rew_mean",
    "rollout/ep_len_mean",
    "time/fps",
    "time/episodes",
    "time/time_elapsed",
    "time/total_timesteps",
    "train/learning_rate",
    "train/n_updates",
    "time/collection_seconds",
    *(f"time/{network}_seconds" for network in NETWORKS),
}
NOT_IN_TENSORBOARD = {"time/episodes", "time/time_elapsed", "time/total_timesteps", "train/n_updates"}  # as in SB3
OF_NETWORKS = {
    "tokenizer": "loss reconstruction_loss codebook_loss commitment_loss codebook_usage codebook_perplexity varying_positions "
    "moving_error",
    "world_model": "loss token_loss reward_loss end_loss token_accuracy reward_accuracy end_accuracy",
    "actor_critic": "loss policy_gradient_loss value_loss entropy imagined_return value",
}
KEYS = COMMON | {f"{network}/{name}" for network in NETWORKS for name in [*OF_NETWORKS[network].split(), "grad_norm"]}


def run(folder: Path, formats: list[str], total: int = 16, **kwargs: Any) -> IRIS:
    model = tiny(frame_envs(bonus=3.0), learning_rate=lambda progress: 1e-3 * (1 + progress), **kwargs)
    model.set_logger(configure(str(folder), formats))
    return model.learn(total)


def read_json(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "progress.json").read_text().splitlines()]


def read_csv(folder: Path) -> list[dict[str, float]]:
    with open(folder / "progress.csv") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def read_tensorboard(folder: Path) -> dict[str, list]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {key: events.Scalars(key) for key in events.Tags()["scalars"]}


def test_keys_and_values(tmp_path, capsys):
    model = run(tmp_path, ["stdout", "csv", "json", "tensorboard"])
    rows, table, scalars = read_json(tmp_path), read_csv(tmp_path), read_tensorboard(tmp_path)
    # at the first log no episode is over yet
    assert KEYS - set(rows[0]) == {"rollout/ep_rew_mean", "rollout/ep_len_mean"}
    for of_format in (rows, table):
        assert all(set(row) >= KEYS for row in of_format[1:4])
        assert KEYS - set(of_format[4]) == {"time/collection_seconds"}  # the final training phase plays no more
    assert set(scalars) >= KEYS - NOT_IN_TENSORBOARD
    assert not set(scalars) & NOT_IN_TENSORBOARD
    out = capsys.readouterr().out
    for key in KEYS:
        group, name = key.split("/")
        assert f"| {group}/" in out and f"|    {name}" in out

    # an epoch after every 4 steps and one more: each is logged, in all formats alike
    steps = [4, 8, 12, 16, 16]
    assert [row["time/total_timesteps"] for row in rows] == steps
    assert [row["time/total_timesteps"] for row in table] == steps
    assert [event.step for event in scalars["world_model/loss"]] == steps
    assert [row["train/n_updates"] for row in rows] == [3, 6, 9, 12, 15]
    assert [row["time/episodes"] for row in rows] == [0, 1, 2, 3, 3]
    np.testing.assert_allclose([event.value for event in scalars["train/learning_rate"]], 1e-3 * (2 - np.arange(1, 6) / 5))
    for key in ("actor_critic/value", "tokenizer/grad_norm", "train/learning_rate"):
        np.testing.assert_allclose([row[key] for row in rows], [row[key] for row in table])
        np.testing.assert_allclose([row[key] for row in rows], [event.value for event in scalars[key]], rtol=1e-5)

    returns = [info["r"] for info in model.ep_info_buffer]
    assert len(returns) == 3 and rows[-1]["rollout/ep_rew_mean"] == pytest.approx(np.mean(returns))
    assert rows[-1]["rollout/ep_len_mean"] == 5
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
        for name in ("token_accuracy", "reward_accuracy", "end_accuracy"):
            assert 0 <= row[f"world_model/{name}"] <= 1
        assert 1 <= row["tokenizer/codebook_perplexity"] <= 16
        assert 1 / 16 <= row["tokenizer/codebook_usage"] <= 1
        assert 0 < row["actor_critic/entropy"] <= math.log(3) + 1e-5
        assert all(row[f"{network}/grad_norm"] > 0 for network in NETWORKS)
        assert all(value > 0 for key, value in row.items() if key.endswith("_seconds"))
        assert row["time/fps"] >= 0


def test_losses_add_up(tmp_path):
    """The sums of the terms are the losses, as means over the gradient steps of a phase."""
    run(tmp_path, ["json"], **{f"{network}_gradient_steps": 3 for network in NETWORKS}, ent_coef=0.2)
    for row in read_json(tmp_path):
        t, w, a = ({key.split("/")[1]: row[key] for key in row if key.startswith(network)} for network in NETWORKS)
        assert t["loss"] == pytest.approx(t["reconstruction_loss"] + t["codebook_loss"] + t["commitment_loss"], rel=1e-4)
        assert w["loss"] == pytest.approx(w["token_loss"] + w["reward_loss"] + w["end_loss"], rel=1e-4)
        assert a["loss"] == pytest.approx(a["policy_gradient_loss"] + a["value_loss"] - 0.2 * a["entropy"], rel=1e-3, abs=1e-5)


def test_perceptual_loss_is_logged(tmp_path):
    run(tmp_path, ["json"], total=4, perceptual_loss=lambda x, x_hat: (x - x_hat).square() * 0 + 0.25)
    row = read_json(tmp_path)[-1]
    assert row["tokenizer/perceptual_loss"] == pytest.approx(0.25)


def test_networks_that_do_not_train_log_nothing(tmp_path):
    run(tmp_path, ["json"], world_model_learning_starts=9, actor_critic_learning_starts=100)
    rows = read_json(tmp_path)
    assert ["world_model/loss" in row for row in rows] == [False, False, True, True, True]
    assert not any(key.startswith("actor_critic") or key == "time/actor_critic_seconds" for row in rows for key in row)


@pytest.mark.parametrize("log_interval, expected", [(1, 5), (2, 2), (5, 1), (6, 0), (None, 0)])
def test_log_interval(log_interval, expected, tmp_path):
    model = tiny(FrameEnv(), world_model_gradient_steps=0, actor_critic_gradient_steps=0)
    model.set_logger(configure(str(tmp_path), ["json"]))
    model.learn(16, log_interval=log_interval)  # 4 epochs and a final training phase
    assert len(read_json(tmp_path)) == expected


def test_tensorboard_log(tmp_path):
    """Runs are numbered like SB3's; ``reset_num_timesteps=False`` goes on in the same folder."""
    model = tiny(FrameEnv(), tensorboard_log=str(tmp_path), final_training_epochs=0)
    model.learn(4)
    model.learn(4, reset_num_timesteps=False)
    model.learn(4, tb_log_name="mine")
    assert {path.name for path in tmp_path.iterdir()} == {"IRIS_1", "mine_1"}
    assert [event.step for event in read_tensorboard(tmp_path / "IRIS_1")["tokenizer/loss"]] == [4, 8]
    assert [event.step for event in read_tensorboard(tmp_path / "mine_1")["tokenizer/loss"]] == [4]


def test_verbose(capsys):
    tiny(FrameEnv()).learn(4)
    assert capsys.readouterr().out == ""
    tiny(FrameEnv(), verbose=1).learn(4)
    out = capsys.readouterr().out
    assert "Using cpu device" in out and "total_timesteps" in out and "grad_norm" in out


def test_success_rate(tmp_path):
    """Environments that tell of success in their info get SB3's key for it."""

    class Success(FrameEnv):
        def step(self, action):
            obs, reward, terminated, truncated, _ = super().step(action)
            return obs, reward, terminated, truncated, {"is_success": self.episode % 2 == 0}

    model = tiny(Success(), **{f"{network}_gradient_steps": 0 for network in NETWORKS})
    model.set_logger(configure(str(tmp_path), ["json"]))
    model.learn(20)
    assert read_json(tmp_path)[-1]["rollout/success_rate"] == 0.5
