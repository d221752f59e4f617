"""The comparison: the same environments and steps for all algorithms, and a report of what there is."""

import csv
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from benchmarks import compare, minatar_env, runs
from benchmarks.car_racing_env import SETTINGS, wrap_car_racing

HARDWARE = {"gpu": None, "cpu": "x", "cpus": 2}
NETWORKS = ("tokenizer", "world_model", "actor_critic")


def spec(algo: str, **config: Any) -> dict[str, Any]:
    settings = {**compare.settings(algo, "MinAtar/Breakout"), **config}
    if algo == "iris":
        settings |= {f"{name}_gradient_steps": 1 for name in NETWORKS} | {f"{name}_batch_size": 2 for name in NETWORKS}
        settings |= {f"{name}_learning_starts": 100 for name in NETWORKS} | {"final_training_epochs": 1}
    return {"benchmark": "compare", "agent": algo, "env": "MinAtar/Breakout", "seed": 0, "steps": 240, "eval_games": 2} | {
        "config": settings
    }


@pytest.mark.parametrize("algo", list(compare.ALGOS))
def test_every_algorithm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algo: str) -> None:
    """Each is trained for exactly the steps asked for, in environments of its seed alone, and evaluated on as many games."""
    config = {"learning_starts": 100} if "dqn" in algo else {"n_steps": 8} if "ppo" in algo else {}
    deterministic_evaluations: list[bool] = []
    seeds: list[int] = []

    def evaluate(model: Any, env: VecEnv, n_games: int, deterministic: bool, **kwargs: Any) -> Any:
        deterministic_evaluations.append(deterministic)
        return evaluate_policy(model, env, n_games, deterministic, **kwargs)

    class Env(minatar_env.RenderedObservation):
        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            seeds.extend([] if seed is None else [seed])
            return super().reset(seed=seed, options=options)

    monkeypatch.setattr(compare, "evaluate_policy", evaluate)
    monkeypatch.setattr(minatar_env, "RenderedObservation", Env)
    runs.create({tmp_path: spec(algo, **config) | {"seed": 3}})
    runs.work(tmp_path, "benchmarks.compare:play", {"device": "cpu"})
    data = runs.read(tmp_path)
    n_envs = 1 if "dqn" in algo else 8
    assert seeds == [*range(3_000, 3_000 + n_envs), 1_003_000, 1_003_001]
    assert deterministic_evaluations == [False]
    assert data["status"] == "done" and data["steps"] == 240
    assert len(data["evaluation_games"]) == 2 and len(data["training_games"]) > 3
    scores = sum(game["score"] for game in data["training_games"])
    assert scores <= sum(data["training_rewards"]) <= scores + 8  # what the last games of up to eight have come to
    assert compare.ALGOS[algo].load(tmp_path / "model.zip").num_timesteps == 240
    if algo == "iris":
        with open(tmp_path / "progress.csv", encoding="utf-8", newline="") as file:
            last = list(csv.DictReader(file))[-1]
        assert int(last["time/total_timesteps"]) == 240 and float(last["rollout/ep_len_mean"]) > 1
    assert compare.ALGOS[algo].load(tmp_path / "model.zip")._n_updates > 0  # type: ignore[attr-defined]


def test_car_racing() -> None:
    """Four frames a step, of whose rewards the signs are given, without what time costs; the game's own score is counted."""
    raw = gym.make(compare.CAR_RACING, continuous=False)
    raw.reset(seed=5)
    env = compare.make_env(compare.CAR_RACING, 1, seed=5, evaluation=False)
    env.reset()
    assert env.observation_space.shape == (3, 96, 96) and env.action_space == gym.spaces.Discrete(5)
    signs = []
    for step in range(25):
        action = 3 if step % 2 else 0  # gas
        frames, given = zip(*(raw.step(action)[:2] for _ in range(4)), strict=True)
        observations, rewards, _, _ = env.step(np.array([action]))
        np.testing.assert_array_equal(np.asarray(observations)[0].transpose(1, 2, 0), np.maximum(frames[2], frames[3]))
        assert rewards[0] == (sum(map(float, given)) > 0)  # a piece of track gives some three points
        assert env.get_attr("rewards")[0][-4:] == list(given)  # the monitor's
        signs.append(rewards[0])
    assert 0 < sum(signs) < 25

    class Given(gym.Env):
        observation_space, action_space = raw.observation_space, raw.action_space

        def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
            return np.zeros((96, 96, 3), np.uint8), {}

        def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            return np.zeros((96, 96, 3), np.uint8), -100.0, True, False, {}

    field = wrap_car_racing(Given())
    field.reset()
    assert field.step(0)[1:4] == (-1.0, True, False)


def test_settings_of_car_racing_are_those_of_its_environment() -> None:
    settings = compare.settings("iris", compare.CAR_RACING)
    assert settings["env_wrapper"] == f"{wrap_car_racing.__module__}.{wrap_car_racing.__name__}"
    assert settings["env_kwargs"] == SETTINGS
    for algo in compare.ALGOS:
        if algo != "iris":
            assert compare.settings(algo, compare.CAR_RACING) != compare.settings(algo, "Pong")


def test_rewards_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their signs are counted, each at the part of the run in which it came, and the report draws them per 1,000 steps."""
    pytest.importorskip("rliable")
    from benchmarks import report

    path = tmp_path / "ppo" / "seed_0"
    runs.create({path: spec("ppo") | {"steps": 1000}})
    run = runs.Run(path)
    run.data |= {"training_games": [], "training_rewards": [0] * compare.CURVE_POINTS}
    progress = compare.Progress(run, stop=True)
    for step, rewards in ((8, [50.0, -2.0, 7.0]), (40, [1.0, 0.0]), (48, [1.0]), (1000, [3.0, 3.0]), (1008, [0.0, -1.0])):
        progress.num_timesteps = step
        progress.locals = {"infos": [], "rewards": np.array(rewards)}
        assert progress._on_step() == (step < 1000)
    assert run.data["training_rewards"] == [2, 1, *[0] * (compare.CURVE_POINTS - 3), 1]
    run.data |= {"status": "done", "score": 0.0, "seconds": {"training": 1.0}, "sessions": [{"hardware": HARDWARE}]}
    run.save()
    figures: list[Figure] = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure))
    compare.report(tmp_path, reps=50)
    of_games, of_rewards = figures[0].axes
    assert not of_games.lines
    steps, per_thousand = map(np.asarray, of_rewards.lines[0].get_data())
    np.testing.assert_allclose(steps[[0, 1, -1]], [40, 80, 1000])
    np.testing.assert_allclose(per_thousand, np.array(run.data["training_rewards"]) * 25)


@pytest.mark.parametrize("algo", ["iris", "dqn", "recurrent_ppo"])
def test_evaluation_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algo: str) -> None:
    """Interrupted in the evaluation, a run is not trained again, and plays the games that it would have played anyway."""
    config = {"learning_starts": 100} if algo == "dqn" else {}
    results = []
    for folder in (tmp_path / "whole", tmp_path / "interrupted"):
        runs.create({folder: spec(algo, **config) | {"eval_games": 12}})
        if folder.name == "interrupted":
            with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
                context.setattr(compare, "evaluate_policy", stop_halfway)
                runs.work(folder, "benchmarks.compare:play", {"device": "cpu"})
            assert runs.read(folder)["status"] == "evaluating"
            monkeypatch.setattr(compare, "train", None)
        runs.work(folder, "benchmarks.compare:play", {"device": "cpu"})
        results.append(runs.read(folder))
    whole, interrupted = results
    assert whole["evaluation_games"] == interrupted["evaluation_games"] and len(whole["evaluation_games"]) == 12
    assert interrupted["status"] == "done" and interrupted["steps"] == 240 and len(interrupted["training_games"]) > 3


def stop_halfway(*args: Any, callback: Any, **kwargs: Any) -> None:
    """In place of SB3's evaluation, which it stops after five games."""

    def stop(variables: dict[str, Any], everywhere: dict[str, Any]) -> None:
        callback(variables, everywhere)
        if len(variables["episode_rewards"]) == 5:
            raise KeyboardInterrupt

    evaluate_policy(*args, **kwargs | {"callback": stop})


def test_planes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Baselines, not IRIS, may see what MinAtar gives: a plane for each kind of object, in training and evaluation."""
    env = compare.make_env("MinAtar/Seaquest", 1, seed=3, evaluation=True, planes=True)
    game = gym.make("MinAtar/Seaquest-v1")
    action_space: Any = game.action_space
    seen, (planes, _) = np.asarray(env.reset()), game.reset(seed=3)
    assert seen.shape == (1, 10, 10, 10)
    for _ in range(50):
        np.testing.assert_array_equal(seen[0], 255 * planes.transpose(2, 0, 1))
        action = action_space.sample()
        (seen, _, dones, _), (planes, *_) = env.step(np.array([action])), game.step(action)  # type: ignore[assignment]
        if dones[0]:
            break
    command = "compare.py --env MinAtar/Breakout --seeds 0 --steps 64 --eval-games 1 --device cpu --planes"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--algos", "ppo", "--out", str(tmp_path)])
    pytest.importorskip("rliable")
    assert compare.main() == 0
    assert compare.ALGOS["ppo"].load(tmp_path / "ppo" / "seed_0" / "model.zip").observation_space.shape == (4, 10, 10)
    assert "| ppo, planes | 1 of 1 |" in (tmp_path / "compare.md").read_text()
    for wrong in (["--algos", "ppo", "iris"], ["--algos", "ppo", "--env", "Pong"]):
        monkeypatch.setattr(sys, "argv", [*command.split(), *wrong, "--out", str(tmp_path)])
        with pytest.raises(ValueError, match="--planes: this is for MinAtar and what learns there beside IRIS"):
            compare.main()


def test_random_play(tmp_path: Path) -> None:
    """What it scores is what the same actions score in the same games; nothing is trained."""
    runs.create({tmp_path: spec("random") | {"seed": 3}})
    runs.work(tmp_path, "benchmarks.compare:play", {"device": "cpu"})
    data = runs.read(tmp_path)
    env = compare.make_env("MinAtar/Breakout", 2, compare.EVALUATION_SEED + 3000, evaluation=True)
    env.action_space.seed(3)
    env.reset()
    scores: dict[int, float] = {}  # of the first game of each of two, in the order in which they end
    while len(scores) < 2:
        _, _, _, infos = env.step(np.array([env.action_space.sample() for _ in range(2)]))
        for n, info in enumerate(infos):
            if "episode" in info:
                scores.setdefault(n, info["episode"]["r"])
    assert data["status"] == "done" and data["steps"] == 0
    assert [game["score"] for game in data["evaluation_games"]] == list(scores.values())
    assert data["score"] == np.mean(list(scores.values()))
    assert not (tmp_path / "model.zip").exists()


def test_one_action(tmp_path: Path) -> None:
    """The chicken that always goes up, which is the second action of three, gets where the others do not."""
    runs.create({tmp_path: spec("one_action") | {"env": "MinAtar/Freeway", "seed": 1}})
    runs.work(tmp_path, "benchmarks.compare:play", {"device": "cpu"})
    data = runs.read(tmp_path)
    env = compare.make_env("MinAtar/Freeway", 2, compare.EVALUATION_SEED + 1000, evaluation=True)
    env.reset()
    for _ in range(1000):
        _, _, _, infos = env.step(np.array([1, 1]))
    scores = [info["episode"]["r"] for info in infos]
    assert data["status"] == "done" and data["steps"] == 0 and data["action"] == 1
    assert [game["score"] for game in data["evaluation_games"]] == scores and max(scores) > 0


def test_same_environment() -> None:
    """Beside stacking frames and taking signs of rewards, all algorithms see the same."""
    plain = compare.make_env("Asterix", 1, seed=3, evaluation=False)
    other = compare.make_env("Asterix", 1, seed=3, evaluation=False, frame_stack=4, sign_rewards=True)
    first: Any = plain.reset()
    second: Any = other.reset()
    assert first.shape == (1, 3, 64, 64) and second.shape == (1, 12, 64, 64)
    rewards = []
    rng = np.random.default_rng(0)
    for _ in range(400):
        action = rng.integers(plain.action_space.n, size=1)  # type: ignore[attr-defined]
        first, reward, done, _ = plain.step(action)
        second, sign, same_done, _ = other.step(action)
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second)[:, -3:])
        assert sign == np.sign(reward) and done == same_done
        rewards.append(float(reward[0]))
    assert max(rewards) > 1
    scored = compare.make_env("Asterix", 1, seed=3, evaluation=True, frame_stack=4, sign_rewards=True)
    assert not any(isinstance(env, compare.SignRewards) for env in (scored, scored.venv))  # type: ignore[attr-defined]


def test_settings() -> None:
    """Every baseline has settings for both kinds of environment, and IRIS has those of its file."""
    sections = yaml.safe_load((compare.HERE / "hyperparams" / "iris.yml").read_text())
    assert compare.settings("iris", "Pong") == sections["atari"]
    assert compare.settings("iris", "Freeway")["temperature"] == 0.01
    assert compare.settings("iris", "Pong", "laptop") == sections["atari-laptop"]
    assert compare.settings("iris", "Freeway", "laptop") == sections["atari-laptop"] | {"temperature": 0.01}
    assert compare.settings("dqn", "Pong", "laptop") == compare.settings("dqn", "Pong")
    baselines = yaml.safe_load((compare.HERE / "hyperparams" / "baselines.yml").read_text())
    for section, env in (("minatar", "MinAtar/Breakout"), ("atari", "Pong"), ("car_racing", compare.CAR_RACING)):
        for algo in {*compare.ALGOS} - {"iris"}:
            assert compare.settings(algo, env) == baselines[section][algo]


def finished(folder: Path, algo: str, seed: int, score: float | None) -> None:
    path = folder / algo / f"seed_{seed}"
    runs.create({path: spec(algo) | {"seed": seed}})
    data = runs.read(path)
    if score is not None:
        games = [{"step": 10 * i, "score": score, "frames": 9} for i in range(1, 25)]
        data |= {"status": "done", "score": score, "seconds": {"training": 7200.0}, "training_games": games}
        data["sessions"] = [{"hardware": HARDWARE, "commit": f"abc{seed}"}]
    runs.write_json(path / "run.json", data)


def test_report(tmp_path: Path) -> None:
    pytest.importorskip("rliable")
    for seed, score in enumerate((1.0, 2.0, 3.0, 10.0)):
        finished(tmp_path, "iris", seed, score)
    finished(tmp_path, "ppo", 0, 5.0)
    finished(tmp_path, "ppo", 1, None)
    finished(tmp_path, "dqn", 0, None)
    markdown = compare.report(tmp_path, reps=50)
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in markdown.splitlines() if line.startswith("| ")}
    iris = lines["iris"].split(" | ")
    assert iris[1] == "4 of 4" and iris[2].startswith("4.00 [") and iris[3].startswith("2.50 [") and iris[4] == "2.00"
    assert lines["ppo"].split(" | ")[1:4] == ["1 of 2", "5.00", "-"]  # no interval of one run, no quarters of less than four
    assert lines["dqn"] == "| dqn | 0 of 1 | - | - | - | - |"
    assert "qrdqn" not in lines
    assert "Code: abc0, abc1, abc2, abc3." in markdown
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in compare.report(tmp_path, 3.0, reps=50).splitlines()}
    assert lines["Algorithm"].endswith("| Steps to 3 |")
    assert lines["iris"].endswith("| > 240, > 240, 20, 20 |") and lines["dqn"] == "| dqn | 0 of 1 | - | - | - | - | - |"
    assert (tmp_path / "compare.png").is_file() and (tmp_path / "compare.pdf").is_file()


def test_report_of_what_is_not_one_thing(tmp_path: Path) -> None:
    pytest.importorskip("rliable")
    finished(tmp_path, "iris", 0, 1.0)
    finished(tmp_path, "ppo", 0, 1.0)
    runs.create({tmp_path / "iris" / "seed_1": spec("iris") | {"seed": 1, "config": {"gamma": 0.5}}})
    with pytest.raises(ValueError, match="runs of iris with different settings"):
        compare.report(tmp_path, reps=50)
    shutil.rmtree(tmp_path / "iris" / "seed_1")
    shutil.copytree(tmp_path / "iris" / "seed_0", tmp_path / "iris" / "copy")
    with pytest.raises(ValueError, match=r"iris with the same seed twice: \[0, 0\]"):
        compare.report(tmp_path, reps=50)


@pytest.mark.parametrize(
    ("algos", "assignment", "message"),
    [
        ("ppo", "gamma=0.5", "--set gamma=0.5: these are settings of IRIS, which is not among --algos"),
        ("iris", "nonsense=3", "--set: .*unexpected keyword argument 'nonsense'"),
        ("iris", "policy_kwargs.nonsense=3", "policy_kwargs has nonsense=3, but its names must be among"),
        ("iris", "n_envs=0", "--set n_envs=0: must be a whole number"),
        ("iris", "gamma=3", r"gamma=3 must be a number in \[0, 1\]"),
        ("iris", "ent_coef.x=3", "--set ent_coef.x=3: ent_coef is 0.005, with no settings in it"),
    ],
)
def test_bad_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algos: str, assignment: str, message: str) -> None:
    """Before anything is written: the corrected command would be of another protocol than what is there."""
    monkeypatch.setattr(
        sys, "argv", ["compare.py", "--algos", algos, "--seeds", "0", "--set", assignment, "--out", str(tmp_path / "out")]
    )
    with pytest.raises(ValueError, match=message):
        compare.main()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("env", "message"), [("MinAtar/Pong", "MinAtar/ and one of"), ("Pongg", "not an Atari game")])
def test_unknown_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: str, message: str) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", "--out", str(tmp_path / "out"), "--env", env])
    with pytest.raises(ValueError, match=message):
        compare.main()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("env", "name"), [("ALE/Amidar-v5", "Amidar"), ("MinAtar/Freeway-v1", "MinAtar/Freeway")])
def test_names_as_in_gymnasium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: str, name: str) -> None:
    """The same run by either name."""
    specs: list[dict[Path, dict[str, Any]]] = []
    monkeypatch.setattr(runs, "create", specs.append)
    monkeypatch.setattr(runs, "run_all", lambda *args: 0)
    monkeypatch.setattr(compare, "report", lambda out, reach: "")
    for given in (env, name):
        monkeypatch.setattr(sys, "argv", ["compare.py", "--out", str(tmp_path / "out"), "--env", given])
        assert compare.main() == 0
    assert specs[0] == specs[1] and {spec["env"] for spec in specs[0].values()} == {name}


@pytest.mark.parametrize(("env", "preset"), [("Pong", "desktop"), ("MinAtar/Breakout", "laptop")])
def test_unknown_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: str, preset: str) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", "--out", str(tmp_path / "out"), "--env", env, "--preset", preset])
    with pytest.raises(ValueError, match=f"--preset {preset}: it must be one of paper, laptop, smoke"):
        compare.main()
    assert not (tmp_path / "out").exists()


def test_change():
    """Values as in YAML, below others where there are dots; nothing else changes, nor the settings they were copied from."""
    shared = {"ent_coef": 0.1, "policy_kwargs": {"n_layers": 2, "embed_dim": 64}}
    config = dict(shared)
    for assignment in (
        "policy_kwargs.n_layers=3",
        "policy_kwargs.image_size=null",
        "burn_in=4",
        "a.b=1.5",
        "a.c=1e-3",
        "a.d=lin_1e-3",
    ):
        compare.change(config, assignment)
    expected_kwargs = {"n_layers": 3, "embed_dim": 64, "image_size": None}
    assert config == {
        "ent_coef": 0.1,
        "policy_kwargs": expected_kwargs,
        "burn_in": 4,
        "a": {"b": 1.5, "c": 0.001, "d": "lin_1e-3"},
    }
    assert shared == {"ent_coef": 0.1, "policy_kwargs": {"n_layers": 2, "embed_dim": 64}}
    for wrong in ("ent_coef", "=3", "policy_kwargs.=3"):
        with pytest.raises(ValueError, match=re.escape(f"--set {wrong}: give NAME=VALUE")):
            compare.change(config, wrong)


def test_settings_given_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--set A --set B`` is ``--set A B``: none is left out in silence."""
    command = "compare.py --algos iris random --seeds 0 --steps 30 --eval-games 1 --device cpu --set train_freq=16 gamma=0.5"
    steps = [f"{name}_gradient_steps=0" for name in NETWORKS]
    monkeypatch.setattr(sys, "argv", [*command.split(), "--set", *steps, "--out", str(tmp_path)])
    assert compare.main() == 0
    config = runs.read(tmp_path / "iris" / "seed_0")["spec"]["config"]
    assert (config["train_freq"], config["gamma"]) == (16, 0.5)
    assert all(config[f"{name}_gradient_steps"] == 0 for name in NETWORKS)
    assert runs.read(tmp_path / "random" / "seed_0")["spec"]["config"] == {}
