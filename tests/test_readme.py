"""The README's Python runs as it stands, but for fewer steps and a small checkpoint of another game."""

import re
from pathlib import Path

import numpy as np
import pytest
from stable_baselines3 import PPO

from benchmarks import compare
from sb3_iris import IRIS

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "tests" / "data" / "reference_small.pt"  # of 4 actions, as Breakout has


@pytest.mark.filterwarnings("ignore")
def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    first, atari, reference, checkpoints, laptop, dream = blocks
    monkeypatch.chdir(tmp_path)
    names: dict = {}

    assert "learn(100_000" in first
    exec(first.replace("learn(100_000", "learn(8"), names)
    assert (tmp_path / "iris_pong.zip").exists()
    assert names["model"].num_timesteps == 8 and names["model"].policy.image_space.shape == (3, 64, 64)

    exec(atari.replace('"Pong"', '"Breakout"'), names)
    assert names["env"].observation_space.shape == names["eval_env"].observation_space.shape == (64, 64, 3)

    exec(reference.replace('"Pong.pt"', f"{str(CHECKPOINT)!r}"), names)
    action, _ = names["model"].predict(names["eval_env"].reset())
    assert action.shape == (1,) and 0 <= action[0] < 4

    once = checkpoints.replace("learn(100_000", "learn(8").replace("Callback(5_000", "Callback(4")
    assert once.count("8") == 1 and "Callback(4" in once
    exec(once, names)
    assert names["model"].num_timesteps == 8
    assert len(list((tmp_path / "runs" / "pong").glob("checkpoint_*"))) == 2
    exec(once, names)  # the run is over: taken up, it has nothing left to do
    assert names["model"].num_timesteps == 8

    assert "learn(8_000" in laptop
    exec(laptop.replace("learn(8_000", "learn(8"), names)
    model = names["model"]
    assert isinstance(model, IRIS) and model.policy.tokenizer.robust
    preset = compare.settings("iris", "CrazyClimber", "laptop")
    assert model.n_envs == preset["n_envs"] and preset["learning_rate"] == "lin_1e-3"
    assert callable(model.learning_rate) and model.learning_rate(0.5) == 0.5e-3
    defaults = {"image_size": 64, "channel_multipliers": [1, 1, 1, 1, 1]}
    assert {**defaults, **model.policy_kwargs} == preset["policy_kwargs"]
    for name in preset.keys() - {*compare.OURS, "policy", "policy_kwargs", "learning_rate"}:
        assert getattr(model, name) == preset[name], name

    exec(dream, names)
    assert isinstance(names["ppo"], PPO)
    observations = names["dream"].reset()
    assert observations.shape == (64, 3, 64, 64) and observations.dtype == np.uint8


def test_commands_and_files_of_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^make ([a-z-]+)", text, flags=re.MULTILINE))
    assert targets == {"demo", "test"}
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}: " in makefile for target in targets)
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", text) + re.findall(r"`(benchmarks/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
