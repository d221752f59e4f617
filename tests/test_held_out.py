"""Figures about steps not trained on: right by hand, left out where undefined, and without a trace in the training."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure

from sb3_iris import IRIS
from sb3_iris.buffers import SequenceReplayBuffer
from sb3_iris.held_out import EPOCHS, HORIZON, MISSED_REWARDS, HeldOut, real_rewards
from tests.corridor import Corridor, model_of
from tests.presets import SIZE, FrameEnv, assert_equal, frame_envs, parameters, steps_in_buffer, tiny

LENGTH = 5  # steps of FrameEnv's episodes


def predicting(reward: int, end: bool, env: Any = None, **kwargs: Any) -> IRIS:
    """A model whose world model predicts this reward and this end in every step, whatever the training."""
    model = tiny(FrameEnv() if env is None else env, learning_rate=0.0, **kwargs)
    for head, certain in ((model.policy.world_model.reward_head, reward + 1), (model.policy.world_model.end_head, int(end))):
        last = head[-1]
        assert isinstance(last, th.nn.Linear)
        last.weight.data.zero_()
        last.bias.data[certain] = 100.0
    return model


def look(model: IRIS, n_steps: int, held_out: HeldOut | None = None) -> dict[str, float]:
    """What is logged of so many newest steps."""
    model.set_logger(configure(None, []))
    (held_out or HeldOut()).look(model, n_steps)
    return dict(model.logger.name_to_value)


@pytest.mark.parametrize(
    "n_envs, kwargs",
    [
        (1, {"policy_kwargs": {"dropout": 0.5}}),
        (3, {"train_freq": 9, "policy_kwargs": {"robust_tokenizer": True}}),
        (1, {"train_freq": 30, "buffer_size": 45}),  # overwritten, and imagined far past the context
    ],
)
def test_training_is_the_same_without(monkeypatch, n_envs, kwargs):
    """Bit for bit: networks, optimizers, what was played and all random streams."""
    runs, streams, logged = [], [], []
    for scored in (True, False):
        if not scored:
            monkeypatch.setattr(HeldOut, "look", lambda *args: None)
        model = tiny(frame_envs(n_envs, length=None), **kwargs)
        model.set_logger(configure(None, []))
        model.learn(90, log_interval=None)
        runs.append({**parameters(model), **steps_in_buffer(model)})
        torch_streams = {"torch": th.get_rng_state(), "policy": model.policy._generator.get_state()}
        streams.append({**torch_streams, "model": str(model._rng.bit_generator.state)})
        logged.append(set(model.logger.name_to_value))
    assert_equal(*runs)
    assert_equal(*streams)
    assert {key.split("/")[0] for key in logged[0] - logged[1]} == {"held_out", "actor_critic", "time"}


def test_figures_by_hand():
    """Eight whole episodes: segments one step ahead cover each step, imagined ones compare the last two of each episode."""
    model = predicting(1, True).learn(9 * LENGTH)
    assert model.sequence_length == LENGTH - 1
    figures = look(model, 8 * LENGTH)
    steps = {name: array[LENGTH:, 0].reshape(8, LENGTH, *array.shape[2:]) for name, array in steps_in_buffer(model).items()}
    signs = np.sign(steps["rewards"])
    n_plus, n_not_zero = (signs == 1).sum(), (signs != 0).sum()
    assert 0 < n_plus < n_not_zero < signs.size
    assert figures["held_out/reward_accuracy"] == pytest.approx(n_plus / signs.size)
    assert figures["held_out/end_accuracy"] == pytest.approx(1 / LENGTH)
    assert figures["held_out/reward_precision"] == n_plus / signs.size
    assert figures["held_out/reward_recall"] == n_plus / n_not_zero
    assert figures["held_out/end_precision"] == 1 / LENGTH
    assert figures["held_out/end_recall"] == 1

    with th.no_grad():  # the four steps and the one that follow one another in each episode
        tokens = model._encode(steps["observations"])
        right = n_predicted = changed_right = n_changed = 0
        for part in (tokens[:, :4], tokens[:, 4:]):
            n = part.shape[1]
            actions = th.as_tensor(steps["actions"][:, 5 - n :] if n == 1 else steps["actions"][:, :4])
            predicted = model.policy.world_model(part, actions).token_logits.argmax(-1)[:, :-1]
            right += (predicted == part.flatten(1)[:, 1:]).sum().item()
            n_predicted += predicted.numel()
            for t, k in np.ndindex(n - 1, part.shape[2]):
                now, before = part[:, t + 1, k], part[:, t, k]
                changed_right += ((predicted[:, (t + 1) * part.shape[2] + k - 1] == now) & (now != before)).sum().item()
                n_changed += (now != before).sum().item()
    assert figures["held_out/token_accuracy"] == pytest.approx(right / n_predicted)
    assert 0 < n_changed < n_predicted and 0 < changed_right
    assert figures["held_out/changed_token_accuracy"] == pytest.approx(changed_right / n_changed)

    last = signs[:, 3:]
    assert figures["held_out/horizon"] == LENGTH - 1
    assert figures["held_out/imagined_reward_accuracy"] == figures["held_out/imagined_reward_precision"] == (last == 1).mean()
    assert figures["held_out/imagined_reward_recall"] == (last == 1).sum() / (last != 0).sum()
    assert figures["held_out/imagined_end_accuracy"] == figures["held_out/imagined_end_precision"] == 0.5
    assert figures["held_out/imagined_end_recall"] == 1
    assert 0 <= figures["held_out/imagined_token_accuracy"] <= 1
    assert figures["time/held_out_seconds"] > 0


def test_rare_events_are_added_up_over_epochs():
    model = predicting(1, False).learn(9 * LENGTH)
    signs = np.sign(steps_in_buffer(model)["rewards"][:, 0])
    held_out = HeldOut()
    recalls = []
    for n_steps in (20, 5, *[10] * EPOCHS):
        figures = look(model, n_steps, held_out)
        recalls.append((n_steps, figures["held_out/reward_recall"]))
    for i, (_, recall) in enumerate(recalls):
        seen = np.concatenate([signs[-n_steps:] for n_steps, _ in recalls[max(i - EPOCHS + 1, 0) : i + 1]])
        assert recall == (seen == 1).sum() / (seen != 0).sum()
    assert len({recall for _, recall in recalls}) > 2
    ten = signs[-10:]
    assert recalls[-1][1] == (ten == 1).sum() / (ten != 0).sum()  # the first two have been forgotten
    assert figures["held_out/reward_accuracy"] == pytest.approx((ten == 1).mean())  # not rare: of the newest steps alone


class NoReward(FrameEnv):
    rewards = (0.0, 0.0, 0.0)


def test_undefined_figures_are_not_logged():
    """Neither a reward nor an end, real or predicted; then predicted ones that never are."""
    model = predicting(0, False, NoReward(length=None)).learn(40)
    figures = look(model, 30)
    expected = {f"{name}_accuracy" for name in ("token", "reward", "end")}
    expected |= {f"imagined_{name}" for name in expected} | {"horizon", "changed_token_accuracy"}
    assert {key for key in figures if key.startswith("held_out")} == {f"held_out/{name}" for name in expected}
    assert figures["held_out/horizon"] == HORIZON  # five times the context
    for name in ("reward", "end"):
        assert figures[f"held_out/imagined_{name}_accuracy"] == figures[f"held_out/{name}_accuracy"] == 1
    figures = look(predicting(1, True, NoReward(length=None)).learn(40), 30)
    assert figures["held_out/reward_precision"] == figures["held_out/imagined_end_precision"] == 0
    assert not any(key.endswith("recall") for key in figures)


def test_steps_without_an_event_are_no_hits():
    """Real rewards and ends that were never predicted: their recall is 0, not the share of steps that are right."""
    figures = look(predicting(0, False).learn(9 * LENGTH), 8 * LENGTH)
    for name in ("reward", "end", "imagined_reward", "imagined_end"):
        assert figures[f"held_out/{name}_recall"] == 0 and f"held_out/{name}_precision" not in figures
    assert figures["held_out/end_accuracy"] == pytest.approx(1 - 1 / LENGTH)


def test_one_step_alone():
    """It has no frame to compare with after it."""
    figures = look(predicting(1, True).learn(9 * LENGTH), 1)
    assert figures["held_out/horizon"] == 1 and "held_out/imagined_token_accuracy" not in figures
    assert {"held_out/imagined_reward_accuracy", "held_out/token_accuracy"} <= figures.keys()
    assert "held_out/changed_token_accuracy" not in figures


def test_a_learned_game():
    model = model_of(Corridor)
    assert model.num_timesteps == 600
    figures = look(model, 600)
    for name in ("token_accuracy", "reward_accuracy", "end_accuracy", "reward_recall", "reward_precision", "end_recall"):
        assert figures[f"held_out/{name}"] > 0.85, name
    assert figures["held_out/imagined_token_accuracy"] > 0.85
    blind = model_of(Corridor, world_model_gradient_steps=1)
    assert look(blind, 600)["held_out/token_accuracy"] < 0.7


def read(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "progress.json").read_text().splitlines()]


def test_when_it_is_logged(tmp_path):
    """Only behind a collection, of a world model that has been trained before, and only while the actor-critic is trained."""
    model = tiny(FrameEnv(), world_model_learning_starts=9, actor_critic_learning_starts=16)
    model.set_logger(configure(str(tmp_path), ["json"]))
    model.learn(24)
    rows = read(tmp_path)
    assert [row["time/total_timesteps"] for row in rows] == [4, 8, 12, 16, 20, 24, 24]
    assert ["world_model/loss" in row for row in rows] == [False, False, *[True] * 5]
    scored = [False] * 3 + [True] * 3 + [False]
    for key in ("held_out/token_accuracy", "held_out/imagined_token_accuracy", "time/held_out_seconds"):
        assert [key in row for row in rows] == scored
    assert ["actor_critic/real_reward" in row for row in rows] == scored
    signs = np.sign(steps_in_buffer(model)["rewards"][:, 0])
    starts = [t for t in range(23) if t % LENGTH < LENGTH - 1 or t < 20]  # two steps long, or one at an episode's end
    sums = [signs[t : t + (1 if t % LENGTH == LENGTH - 1 else 2)].sum() for t in starts]
    assert model.imagination_horizon == 2 and rows[5]["actor_critic/real_reward"] == pytest.approx(np.mean(sums))


def test_steps_of_before_are_not_scored(tmp_path):
    """A run taken up between a collection and its training phase scores what it collects itself."""
    model = tiny(FrameEnv()).learn(8)
    assert model._learn_progress is not None
    model._learn_progress.epoch_end, model._learn_progress.final_epochs_left = 8, 1
    model.save_checkpoint(tmp_path / "run")
    resumed = IRIS.resume(tmp_path / "run", FrameEnv(), device="cpu")
    resumed.set_logger(configure(str(tmp_path), ["json"]))
    resumed.learn(8)
    assert len(read(tmp_path)) == 2 and not any(key.startswith("held_out") for row in read(tmp_path) for key in row)


# --- Real rewards --------------------------------------------------------------------------------------------------------


def filled_buffer(n_steps: int, buffer_size: int) -> SequenceReplayBuffer:
    """Two environments with episodes of 1 to 9 steps, of which every third is truncated."""
    rng = np.random.default_rng(0)
    buffer = SequenceReplayBuffer(
        2 * buffer_size, spaces.Box(0, 255, (1, SIZE, SIZE), np.uint8), spaces.Discrete(2), "cpu", n_envs=2
    )
    starts, left, episode = np.ones(2, dtype=bool), rng.integers(1, 10, size=2), 0
    for _ in range(n_steps):
        left -= 1
        ends = left == 0
        truncated = ends & (episode % 3 == 0)
        frames = np.zeros((2, 1, SIZE, SIZE), dtype=np.uint8)
        buffer.add(frames, np.zeros(2), rng.choice([-3.0, 0.0, 0.5], 2), ends & ~truncated, truncated, starts)
        episode += int(ends.sum())
        left[ends] = rng.integers(1, 10, size=ends.sum())
        starts = ends
    return buffer


@pytest.mark.parametrize("buffer_size", [300, 64])
@pytest.mark.parametrize("horizon", [2, 6, 20])
def test_real_rewards(horizon, buffer_size):
    """Against a plain loop over all windows; each is counted once, by the collection that completes it."""
    for n_rows in (1, 7, 60):
        buffer = filled_buffer(70, buffer_size)
        order = np.arange(buffer.n_added - buffer.size(), buffer.n_added) % buffer.buffer_size
        expected = []
        for env in range(2):
            rewards, ends, cuts = (a[order, env] for a in (buffer.rewards, buffer.terminations, buffer.truncations))
            for start in range(len(order)):
                total = 0.0
                for t in range(start, min(start + horizon, len(order))):
                    total += np.sign(rewards[t])
                    if ends[t] or t == start + horizon - 1:
                        if t >= len(order) - n_rows:
                            expected.append(total)
                        break
                    if cuts[t]:
                        break
        total, n_windows = real_rewards(buffer, n_rows, horizon)
        assert n_windows == len(expected) and total == pytest.approx(sum(expected))
        assert n_windows > 0 or n_rows == 1


# --- The warning ---------------------------------------------------------------------------------------------------------


def test_rewards_never_predicted_are_warned_of_once():
    model = predicting(0, False)
    with pytest.warns(UserWarning, match=r"does not see rewards coming.*robust_tokenizer=True") as caught:
        model.learn(4 * (EPOCHS + 15))
    said = [str(warning.message) for warning in caught if "rewards coming" in str(warning.message)]
    assert len(said) == 1
    signs = np.sign(steps_in_buffer(model)["rewards"][4:, 0])
    n_phases = EPOCHS
    while (signs[: 4 * n_phases] != 0).sum() < MISSED_REWARDS:
        n_phases += 1
    assert f"trained in {n_phases} phases" in said[0] and f"the last {(signs[:4 * n_phases] != 0).sum()} rewards" in said[0]


@pytest.mark.parametrize("reward, n_epochs", [(0, EPOCHS), (1, EPOCHS + 15), (-1, EPOCHS + 15)])
def test_no_warning_before_time_or_of_rewards_that_are_predicted(reward, n_epochs):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*rewards coming")
        predicting(reward, False).learn(4 * n_epochs)


def test_no_warning_of_games_without_rewards():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*rewards coming")
        predicting(0, False, make_vec_env(NoReward)).learn(4 * (EPOCHS + 15))
