"""
The RL Zoo's commands with ``iris`` as one of their algorithms, as a user calls them.

In processes of their own, since importing ``rl_zoo3`` changes Gymnasium for everybody else, and takes seconds: the commands of
a test share one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from stable_baselines3.common.save_util import load_from_zip_file

from benchmarks import runs

pytest.importorskip("rl_zoo3")

BENCHMARKS = Path(runs.__file__).parent
PATIENCE = 300  # seconds after which a process has hung
ENV = "MinAtar/Breakout-v1"
NETWORKS = ("tokenizer", "world_model", "actor_critic")
POLICY_KWARGS = (
    "policy_kwargs:dict(image_size=None, codebook_size=16, codebook_dim=8, tokenizer_channels=4, channel_multipliers=(1, 1), "
    "n_res_blocks=1, attention_resolutions=(), n_layers=1, n_heads=2, embed_dim=16, lstm_hidden_size=16)"
)
TINY = [
    *("train_freq:20", "buffer_size:500", "imagination_horizon:2", "final_training_epochs:1", "n_envs:2"),
    *(f"{name}_{what}" for name in NETWORKS for what in ("gradient_steps:1", "learning_starts:20", "batch_size:2")),
]


# As `python SCRIPT ARGUMENTS` for one command after another
RUN = """
import json, runpy, sys
from pathlib import Path
for sys.argv in json.loads(sys.argv[1]):
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
    print("END OF COMMAND", flush=True)
"""


def commands(*all_arguments: list[str], folder: Path) -> list[str]:
    """What commands print, one after another; they must succeed."""
    argv = [[str(BENCHMARKS / script), "--algo", "iris", *arguments] for script, *arguments in all_arguments]
    result = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(argv)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.split("END OF COMMAND")[:-1]


def test_train_continue_and_enjoy(tmp_path: Path) -> None:
    """Train with evaluations, checkpoints and logs; continue with ``-i``; watch what came out."""
    options = ["--env", ENV, "-n", "80", "--seed", "1", "--device", "cpu"]
    written = ["--eval-freq", "40", "--eval-episodes", "2", "--save-freq", "40", "--tensorboard-log", "tb", "--progress"]
    folder = tmp_path / "logs" / "iris" / "MinAtar-Breakout-v1_1"
    agent = str(folder / "MinAtar-Breakout-v1.zip")
    watch = ["--env", ENV, "-f", "logs", "--exp-id", "1", "-n", "60", "--no-render"]
    trained, continued, watched, _ = commands(
        ["train.py", *options, *written, "--save-replay-buffer", "-params", *TINY, POLICY_KWARGS],
        ["train.py", *options, "--eval-freq", "-1", "-i", agent, "-params", *TINY],
        ["enjoy.py", *watch, "--stochastic"],
        ["enjoy.py", "--record-video", *watch],
        folder=tmp_path,
    )
    assert f"Loading hyperparameters from: {BENCHMARKS / 'hyperparams' / 'iris.yml'}" in trained
    for name in ("MinAtar-Breakout-v1.zip", "best_model.zip", "rl_model_40_steps.zip", "rl_model_80_steps.zip"):
        assert (folder / name).is_file()
    assert np.load(folder / "evaluations.npz")["results"].shape == (2, 2)
    assert list((tmp_path / "tb").glob("**/events.out.tfevents.*"))
    with open(folder / "MinAtar-Breakout-v1" / "config.yml") as file:
        config = dict(yaml.unsafe_load(file))
    # What was given, and beside it what the settings file has for this game
    in_file = yaml.safe_load((BENCHMARKS / "hyperparams" / "iris.yml").read_text())[ENV]
    assert config["train_freq"] == 20 and config["gamma"] == in_file["gamma"]
    data, _, _ = load_from_zip_file(folder / "MinAtar-Breakout-v1.zip")
    assert data is not None
    assert data["num_timesteps"] == 80 and data["policy_kwargs"]["codebook_size"] == 16 and data["seed"] == 1

    assert "Loading pretrained agent" in continued and "Loading replay buffer" in continued
    again, _, _ = load_from_zip_file(tmp_path / "logs" / "iris" / "MinAtar-Breakout-v1_2" / "MinAtar-Breakout-v1.zip")
    assert again is not None
    assert again["_n_updates"] > data["_n_updates"]

    assert "Mean reward" in watched
    assert (folder / "videos" / "final-model-iris-MinAtar-Breakout-v1-step-0-to-step-60.mp4").stat().st_size > 0


def test_optimize(tmp_path: Path) -> None:
    """A search with two trials, and a training with what the second one tried."""
    study = ["--env", ENV, "-n", "60", "--storage", "study.log", "--study-name", "study"]
    search = ["-optimize", "--n-trials", "2", "--n-evaluations", "1", "--eval-episodes", "1", "--no-optim-plots"]
    searched, _ = commands(
        ["train.py", *study, *search, "--optimization-log-path", "trials", "-params", *TINY, POLICY_KWARGS],
        ["train.py", *study, "--trial-id", "1", "--eval-freq", "-1", "-params", *TINY, POLICY_KWARGS],
        folder=tmp_path,
    )
    assert "Number of finished trials:  2" in searched and "Best trial:" in searched
    trial, _, _ = load_from_zip_file(tmp_path / "trials" / "trial_1" / "best_model.zip")
    assert trial is not None and trial["final_training_epochs"] == 0  # nothing is trained that is not evaluated
    data, _, _ = load_from_zip_file(tmp_path / "logs" / "iris" / "MinAtar-Breakout-v1_2" / "MinAtar-Breakout-v1.zip")
    assert data is not None
    assert 0.9 <= data["gamma"] <= 0.997 and data["gamma"] != 0.97
    assert data["final_training_epochs"] == 1  # only the search does without
    assert 0.7 <= data["gae_lambda"] <= 0.99 and 3e-5 <= data["learning_rate"](1.0) <= 3e-3


@pytest.mark.parametrize(
    ("env", "given"), [("ALE/Freeway-v5", 0), pytest.param("FreewayNoFrameskip-v4", None, marks=pytest.mark.slow)]
)
def test_atari_preprocessing(tmp_path: Path, env: str, given: int | None) -> None:
    """Both names of a game get the paper's frames in training and evaluation, beside arguments that are given."""
    options = ["-n", "40", "--eval-freq", "40", "--eval-episodes", "1", "--eval-env-kwargs", "max_num_frames_per_episode:200"]
    networks = POLICY_KWARGS.replace("image_size=None", "image_size=8")
    check = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from benchmarks import train; import rl_zoo3.exp_manager as m\n"
        "make = m.ExperimentManager.create_envs\n"
        "def create_envs(self, *args, **kwargs):\n"
        "    env = make(self, *args, **kwargs)\n"
        "    game = env.get_attr('unwrapped')[0]\n"
        "    ale = game.ale\n"
        "    print('ENV', env.observation_space.shape, game._frameskip, ale.getFloat('repeat_action_probability'),\n"
        "          ale.getInt('max_num_frames_per_episode'), len(ale.getMinimalActionSet()) == env.action_space.n,\n"
        "          env.env_is_wrapped(m.gym.Wrapper)[0], game.spec.kwargs.get('difficulty'))\n"
        "    return env\n"
        "m.ExperimentManager.create_envs = create_envs\n"
        "train.plug_in(); train.rl_zoo3.train.train()\n"
    )
    (tmp_path / "check.py").write_text(check)
    kwargs = [] if given is None else ["--env-kwargs", f"difficulty:{given}"]
    params = ["-params", *TINY, networks]
    result = subprocess.run(
        [sys.executable, "check.py", str(BENCHMARKS.parent), "--algo", "iris", "--env", env, *options, *kwargs, *params],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    seen = {line for line in result.stdout.splitlines() if line.startswith("ENV")}
    assert seen == {f"ENV (3, 64, 64) 1 0.0 {frames} True True {given}" for frames in (200, 20_000)}
    data, _, _ = load_from_zip_file(next(tmp_path.glob(f"logs/iris/{env.replace('/', '-')}_1/*Freeway*.zip")))
    assert data is not None
    assert data["temperature"] == 0.01
