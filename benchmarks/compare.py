"""
IRIS against PPO, DQN, QR-DQN and RecurrentPPO: the same environment, number of env steps and evaluation, several seeds::

    python benchmarks/compare.py --env MinAtar/Breakout --steps 10000 --out runs/compare --jobs 2
    python benchmarks/compare.py --env Pong --steps 100000 --algos iris dqn --seeds 0 1 2 --out runs/compare_pong

``--env`` is a game of MinAtar or an Atari game. Among the algorithms are random play and ``one_action``, which holds the
action that did best in a few games. Settings are those of ``iris.yml`` and ``baselines.yml`` in ``hyperparams/``; on a CPU,
Atari games want ``--preset laptop``.
``--set`` changes single settings of IRIS, for an ablation::

    python benchmarks/compare.py --algos iris --set policy_kwargs.actor_critic_input=frames --out runs/frames

Writes ``compare.md`` and the curves into ``--out``, and what each run logs into the run's ``progress.csv``. The same command
goes on after an interruption: finished runs and trained models stay, others begin anew. ``--report`` writes the report of what
is there and runs nothing. How many steps the others need for a score of IRIS's::

    python benchmarks/compare.py --algos ppo dqn --steps 300000 --reach 7.76 --out runs/longer
"""

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch as th
import yaml
from gymnasium import spaces
from sb3_contrib import QRDQN, RecurrentPPO
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecFrameStack, VecTransposeImage
from torch import nn

matplotlib.use("Agg")

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import atari100k, car_racing_env, runs
from sb3_iris import IRIS
from sb3_iris.atari_wrappers import make_atari_env

HERE = Path(__file__).resolve().parent
ALGOS: dict[str, type[BaseAlgorithm]] = {
    "iris": IRIS,
    "ppo": PPO,
    "dqn": DQN,
    "qrdqn": QRDQN,
    "recurrent_ppo": RecurrentPPO,
}
PLAYERS = (*ALGOS, "random", "one_action")
CURVE_POINTS = 25
SEED_STRIDE = 1_000  # between the first environments of two seeds, so that no two runs have an environment in common
# Not the constructor's
OURS = ("n_envs", "n_timesteps", "env_wrapper", "env_kwargs", "frame_stack", "sign_rewards", "planes")
CAR_RACING = car_racing_env.NAME
MINATAR = ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders")
EVALUATION_SEED = 1_000_000
EVALUATION_ENVS = 10  # games at once
TRIAL_GAMES = 10  # of each action, before the best one is held


class MinAtarCnn(BaseFeaturesExtractor):
    """
    The network of MinAtar's paper, for images too small for SB3's: a 3x3 convolution of 16 filters and a layer of 128.

    :param observation_space: Images, channels first.
    """

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, features_dim=128)
        channels, height, width = observation_space.shape
        self.network = nn.Sequential(
            nn.Conv2d(channels, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * (height - 2) * (width - 2), 128), nn.ReLU()
        )

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.network(observations)


class SignRewards(VecEnvWrapper):
    """Gives the sign of each reward, as is usual when a baseline is trained on Atari; scores are counted inside."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        obs, rewards, dones, infos = self.venv.step_wait()
        return obs, np.sign(rewards), dones, infos


class RandomPlayer:
    """
    Uniformly random actions, with the ``predict`` of SB3's models.

    :param action_space: Of one environment.
    :param seed: Seed of the actions.
    """

    def __init__(self, action_space: spaces.Space, seed: int) -> None:
        self.action_space = action_space
        self.action_space.seed(seed)

    def predict(self, observation: np.ndarray, state: Any = None, *args: Any, **kwargs: Any) -> tuple[np.ndarray, None]:
        return np.array([self.action_space.sample() for _ in observation]), None


class OneAction:
    """
    Always the same action, with the ``predict`` of SB3's models.

    :param action: The action.
    """

    def __init__(self, action: int) -> None:
        self.action = action

    def predict(self, observation: np.ndarray, state: Any = None, *args: Any, **kwargs: Any) -> tuple[np.ndarray, None]:
        return np.full(len(observation), self.action), None


class Progress(BaseCallback):
    """
    Writes down every finished game and what rewards come (games can be longer than a run), and stops after the steps that all
    algorithms get (what PPO has collected since its last update is then left over, less than one of its rollouts).

    :param run: The run.
    :param stop: Whether to stop; IRIS ends by itself, and trains on after its last step.
    """

    def __init__(self, run: runs.Run, stop: bool) -> None:
        super().__init__()
        self.run = run
        self.stop = stop

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                game = {"step": self.num_timesteps, "score": float(info["episode"]["r"]), "frames": int(info["episode"]["l"])}
                self.run.data["training_games"].append(game)
        point = min((self.num_timesteps - 1) * CURVE_POINTS // self.run.spec["steps"], CURVE_POINTS - 1)
        self.run.data["training_rewards"][point] += int(np.sign(self.locals["rewards"]).sum())
        self.run.data["steps"] = self.num_timesteps
        self.run.save(at_most_every=10)
        return not self.stop or self.num_timesteps < self.run.spec["steps"]


def settings(algo: str, env: str, preset: str = "paper") -> dict[str, Any]:
    """
    :param algo: Name in ``PLAYERS``.
    :param env: Environment.
    :param preset: IRIS's settings for an Atari game, a name from ``atari100k.presets``.
    :return: What the settings files say.
    """
    kind, _, game = env.rpartition("/")
    if algo not in ALGOS:
        return {}
    if algo == "iris":
        if kind == "MinAtar":
            return yaml.safe_load(atari100k.SETTINGS.read_text())[f"MinAtar/{game}-v1"]
        if env == CAR_RACING:
            return yaml.safe_load(atari100k.SETTINGS.read_text())[env]
        return atari100k.section(preset, env)
    section = "minatar" if kind == "MinAtar" else "car_racing" if env == CAR_RACING else "atari"
    return yaml.safe_load((HERE / "hyperparams" / "baselines.yml").read_text())[section][algo]


def change(config: dict[str, Any], assignment: str) -> None:
    """
    Change one setting.

    :param config: Settings.
    :param assignment: Name, ``=`` and a value in YAML; dots lead into dicts, as in ``policy_kwargs.n_layers=3``.
    :raises ValueError: If it is of another form.
    """
    path, equals, value = assignment.partition("=")
    *folders, name = path.split(".")
    if not equals or not all((*folders, name)):
        raise ValueError(f"--set {assignment}: give NAME=VALUE, for instance ent_coef=0.01")
    for folder in folders:
        inner = config.get(folder) or {}
        if not isinstance(inner, dict):
            raise ValueError(f"--set {assignment}: {folder} is {inner!r}, with no settings in it")
        config[folder] = dict(inner)  # a copy, as sections of the file share them
        config = config[folder]
    config[name] = yaml.safe_load(value)
    if isinstance(config[name], str):
        with contextlib.suppress(ValueError):  # 1e-3 is a word in YAML 1.1
            config[name] = float(config[name])


def check_settings(env: str, config: dict[str, Any]) -> None:
    """
    Build IRIS once, on the CPU.

    :param env: Environment.
    :param config: IRIS's settings.
    :raises ValueError: If IRIS does not take them.
    """
    n_envs = config.get("n_envs", 1)
    if isinstance(n_envs, bool) or not isinstance(n_envs, int) or n_envs < 1:
        raise ValueError(f"--set n_envs={n_envs!r}: must be a whole number of at least 1")
    kwargs = atari100k.with_schedules({name: value for name, value in config.items() if name not in OURS})
    vec_env = make_env(env, n_envs, 0, False)
    try:
        IRIS(env=vec_env, device="cpu", **kwargs)
    except TypeError as error:  # a name that it does not know
        raise ValueError(f"--set: {error}") from None
    finally:
        vec_env.close()


def make_env(
    env: str,
    n_envs: int,
    seed: int,
    evaluation: bool,
    frame_stack: int = 1,
    sign_rewards: bool = False,
    planes: bool = False,
) -> VecEnv:
    """
    :param env: Environment.
    :param n_envs: How many at once.
    :param seed: Seed of the first.
    :param evaluation: Whether scores are counted rather than learned from.
    :param frame_stack: Frames in an observation.
    :param sign_rewards: Whether to give the sign of rewards only.
    :param planes: Whether to show MinAtar's planes instead of what it renders.
    :return: The environments, channels first.
    """
    if env.startswith("MinAtar/"):
        from benchmarks.minatar_env import make_minatar

        game = env.removeprefix("MinAtar/")
        vec_env = make_vec_env(lambda: make_minatar(game, planes=planes), n_envs, seed=seed)
    elif env == CAR_RACING:
        vec_env = make_vec_env(
            env, n_envs, seed=seed, wrapper_class=car_racing_env.wrap_car_racing, env_kwargs=dict(car_racing_env.SETTINGS)
        )
    else:
        vec_env = make_atari_env(env, n_envs, seed=seed, evaluation=evaluation)
    if sign_rewards and not evaluation:
        vec_env = SignRewards(vec_env)
    if frame_stack > 1:
        vec_env = VecFrameStack(vec_env, frame_stack)
    return vec_env if planes else VecTransposeImage(vec_env)


def play(run: runs.Run, device: str = "auto") -> None:
    """
    Train and evaluate one algorithm with one seed.

    :param run: The run.
    :param device: Device of the networks.
    """
    spec, data = run.spec, run.data
    env, algo, config = spec["env"], spec["agent"], dict(spec["config"])
    model: BaseAlgorithm | None
    if algo in ALGOS and data["status"] == "evaluating":  # it was interrupted there
        model = ALGOS[algo].load(run.folder / "model.zip", device=device)
    else:
        data.update(status="training", steps=0, training_games=[], evaluation_games=[], seconds={})
        run.save()
        began = time.monotonic()
        model = train(run, config, device) if algo in ALGOS else None
        data["seconds"]["training"] = time.monotonic() - began
        data["status"] = "evaluating"
        run.save()

    began = time.monotonic()
    n_games = spec["eval_games"]
    n_envs, seed = min(EVALUATION_ENVS, n_games), EVALUATION_SEED + spec["seed"] * SEED_STRIDE
    eval_env = make_env(env, n_envs, seed, True, config.get("frame_stack", 1), planes=config.get("planes", False))
    player: Any = model or RandomPlayer(eval_env.action_space, spec["seed"])
    if algo == "one_action":
        data["action"] = best_action(env, spec["seed"] * SEED_STRIDE)
        player = OneAction(data["action"])
    if model is not None:
        model.set_random_seed(seed)  # the same games whether it has just been trained or was loaded

    def note(scores: list[float], frames: list[int]) -> None:
        games = zip(scores, frames, strict=True)
        data["evaluation_games"] = [{"score": float(score), "frames": int(length)} for score, length in games]

    def progress(variables: dict[str, Any], _: dict[str, Any]) -> None:
        note(variables["episode_rewards"], variables["episode_lengths"])
        run.save(at_most_every=10)

    note(*evaluate_policy(player, eval_env, n_games, False, callback=progress, return_episode_rewards=True))  # type: ignore[misc]
    eval_env.close()
    data["seconds"]["evaluation"] = time.monotonic() - began
    data["score"] = float(np.mean([game["score"] for game in data["evaluation_games"]]))
    data["status"] = "done"
    run.save()


def best_action(env: str, seed: int) -> int:
    """
    :param env: Environment.
    :param seed: Seed of the first game.
    :return: The action with the highest mean score when it is held.
    """
    vec_env = make_env(env, TRIAL_GAMES, seed, True)
    scores = []
    for action in range(vec_env.action_space.n):  # type: ignore[attr-defined]
        vec_env.seed(seed)
        scores.append(evaluate_policy(OneAction(action), vec_env, TRIAL_GAMES)[0])  # type: ignore[arg-type]
    vec_env.close()
    return int(np.argmax(scores))


def train(run: runs.Run, config: dict[str, Any], device: str) -> BaseAlgorithm:
    """
    Train one algorithm and keep its model.

    :param run: The run.
    :param config: Its settings.
    :param device: Device of the networks.
    :return: The trained algorithm.
    """
    spec = run.spec
    env, algo = spec["env"], spec["agent"]
    seed = spec["seed"] * SEED_STRIDE
    stack, sign, planes = config.get("frame_stack", 1), config.get("sign_rewards", False), config.get("planes", False)
    vec_env = make_env(env, config["n_envs"], seed, False, stack, sign, planes)
    kwargs = atari100k.with_schedules({name: value for name, value in config.items() if name not in OURS})
    if algo != "iris" and env.startswith("MinAtar/"):
        kwargs["policy_kwargs"] = {"features_extractor_class": MinAtarCnn, **kwargs.get("policy_kwargs", {})}
    make: Callable[..., BaseAlgorithm] = ALGOS[algo]
    model = make(env=vec_env, seed=spec["seed"], device=device, **kwargs)
    vec_env.seed(seed)  # again: the model has seeded them from its own seed on, and those of the next seed begin one further
    model.set_logger(configure(str(run.folder), ["csv"]))
    run.data["training_rewards"] = [0] * CURVE_POINTS  # sums of their signs, each of as many steps
    model.learn(spec["steps"], callback=Progress(run, stop=algo != "iris"))
    vec_env.close()
    model.save(run.folder / "model.zip")
    return model


def check_alike(out: Path, of_algo: list[dict[str, Any]]) -> None:
    """
    :param out: Folder with the runs.
    :param of_algo: Runs of one algorithm.
    :raises ValueError: If they differ in settings, or do not differ in seeds.
    """
    algo = of_algo[0]["spec"]["agent"]
    if any(data["spec"]["config"] != of_algo[0]["spec"]["config"] for data in of_algo):
        raise ValueError(f"{out} has runs of {algo} with different settings in it: report each by itself")
    seeds = [data["spec"]["seed"] for data in of_algo]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{out} has {algo} with the same seed twice: {sorted(seeds)}")


def report(out: Path, reach: float | None = None, reps: int = 2_000) -> str:
    """
    Write ``compare.md`` and the curves.

    :param out: Folder with the runs.
    :param reach: Score for which to say when each run's training games came to it.
    :param reps: Bootstrap samples.
    :return: The report in Markdown.
    :raises ValueError: If there are no runs, or runs of different protocols, or of an algorithm with different settings.
    """
    from rliable import metrics

    from benchmarks.report import curve_values, estimate, intervals, save, steps_to, table

    found = runs.find(out)
    protocols = {
        (d["spec"].get("benchmark"), d["spec"].get("env"), d["spec"]["steps"], d["spec"]["eval_games"]) for d in found
    }
    if len(protocols) > 1 or next(iter(protocols))[0] != "compare":
        raise ValueError(f"{out} has runs of other or of several protocols in it: {sorted(map(str, protocols))}")
    _, env, steps, eval_games = protocols.pop()
    rows = []
    commits: set[str] = set()
    header = ["Algorithm", "Runs", "Mean score", "IQM", "Hours a run", "On"]
    if reach is not None:
        header.append(f"Steps to {reach:g}")
    figure, (of_games, of_rewards) = plt.subplots(1, 2, figsize=(11, 4))
    at = np.linspace(0, steps, CURVE_POINTS + 1)[1:]

    def estimates(scores: np.ndarray) -> np.ndarray:
        return np.array([metrics.aggregate_mean(scores), metrics.aggregate_iqm(scores)])

    for algo in PLAYERS:
        of_algo = [data for data in found if data["spec"]["agent"] == algo]
        done = [data for data in of_algo if data["status"] == "done"]
        if not of_algo:
            continue
        check_alike(out, of_algo)
        name = f"{algo}, planes" if of_algo[0]["spec"]["config"].get("planes") else algo
        if not done:
            rows.append([name, f"0 of {len(of_algo)}", *["-"] * (len(header) - 2)])
            continue
        points, bounds = intervals({algo: np.array([[data["score"]] for data in done])}, estimates, reps)
        cells = [estimate(points[algo][i], bounds[algo][:, i], len(done), 2) for i in range(2)]
        if len(done) < 4:
            cells[1] = "-"  # the middle half of so few is all of them
        hours = np.mean([sum(data["seconds"].values()) for data in done]) / 3600
        commits.update(session.get("commit") or "an unknown commit" for data in done for session in data["sessions"])
        machines = [session["hardware"] for data in done for session in data["sessions"]]
        on = ", ".join(dict.fromkeys(str(machine["gpu"] or machine["cpu"]) for machine in machines))
        rows.append([name, f"{len(done)} of {len(of_algo)}", *cells, f"{hours:.2f}", on])
        games = [[(game["step"], game["score"]) for game in data["training_games"]] for data in done]
        if reach is not None:
            needed = [steps_to(curve, reach, eval_games) for curve in games]
            rows[-1].append(", ".join(f"> {steps:,}" if step is None else f"{step:,}" for step in needed))
        # Runs of older versions have no rewards
        rewards = [np.array(data.get("training_rewards", [np.nan] * CURVE_POINTS)) for data in done]
        for axes, curves in (
            (of_games, [curve_values(curve, at) for curve in games]),
            (of_rewards, [curve * CURVE_POINTS / steps * 1000 for curve in rewards]),
        ):
            cube = np.array(curves)[:, None]  # (runs, 1, steps)
            known = ~np.isnan(cube).any(axis=(0, 1))
            if known.any():
                mean, band = intervals({algo: cube[..., known]}, lambda scores: scores.mean(axis=(0, 1)), min(reps, 500))
                axes.plot(at[known], mean[algo], label=name)
                axes.fill_between(at[known], *band[algo], alpha=0.2)
    of_games.set_ylabel("score, mean of the last 10 training games")
    of_rewards.set_ylabel("sum of reward signs per 1,000 steps")
    for axes in (of_games, of_rewards):
        axes.set_xlabel("env steps")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    save(figure, out / "compare")
    notes = [
        f"Scores of {eval_games} games after training, actions sampled. Square brackets: 95 % bootstrap interval over runs; "
        "of two or three runs that is from the least to the most, which says less."
    ]
    if commits:
        notes.append(f"Code: {', '.join(sorted(commits))}.")
    if reach is not None:
        notes.append(f"Steps: the first after which {eval_games} training games in a row had that mean, run by run.")
    markdown = f"# {env}, {steps:,} env steps\n\n{' '.join(notes)}\n\n{table(header, rows)}\n![Curves](compare.png)\n"
    (out / "compare.md").write_text(markdown, encoding="utf-8")
    return markdown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs and of the report")
    parser.add_argument(
        "--env", default="MinAtar/Breakout", help="MinAtar/GAME, CarRacing-v3 or an Atari game (default: MinAtar/Breakout)"
    )
    parser.add_argument("--algos", nargs="+", default=PLAYERS, choices=PLAYERS, help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--steps", type=int, default=10_000, help="env steps a run (default: 10000)")
    parser.add_argument("--eval-games", type=int, default=100, help="games after training (default: 100)")
    parser.add_argument(
        "--preset", default="paper", help="IRIS's settings for an Atari game, as in atari100k.py (default: paper)"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="settings of IRIS that differ, in YAML"
    )
    parser.add_argument("--planes", action="store_true", help="baselines see MinAtar's planes instead of what it renders")
    parser.add_argument("--report", action="store_true", help="only write the report of what is there")
    parser.add_argument("--reach", type=float, metavar="SCORE", help="report the env steps that runs need for this score")
    runs.add_arguments(parser)
    args = parser.parse_args()
    if not args.report:
        if min(args.steps, args.eval_games, args.jobs) < 1 or min(args.seeds) < 0:
            raise ValueError("--steps, --eval-games and --jobs must be at least 1, and --seeds at least 0")
        args.env = re.sub(r"^ALE/(.+)-v5$|^(MinAtar/.+)-v1$", r"\1\2", args.env)  # Gymnasium's names
        kind, _, game = args.env.rpartition("/")
        if kind not in ("", "MinAtar") or (kind == "MinAtar" and game not in MINATAR):
            raise ValueError(
                f"--env {args.env}: give {CAR_RACING}, an Atari game, or MinAtar/ and one of {', '.join(MINATAR)}"
            )
        presets = atari100k.presets()
        is_atari = kind == "" and args.env != CAR_RACING
        if args.preset not in presets or (not is_atari and args.preset != "paper"):
            raise ValueError(f"--preset {args.preset}: it must be one of {', '.join(presets)}, and is for Atari games only")
        if is_atari:
            make_atari_env(args.env).close()  # complains about an unknown game
        if args.set and "iris" not in args.algos:
            raise ValueError(f"--set {' '.join(args.set)}: these are settings of IRIS, which is not among --algos")
        if args.planes and (kind != "MinAtar" or not {*args.algos} <= {*ALGOS} - {"iris"}):
            raise ValueError("--planes: this is for MinAtar and what learns there beside IRIS, so name such --algos")
        specs = {}
        for seed in dict.fromkeys(args.seeds):
            for algo in dict.fromkeys(args.algos):
                spec = {"benchmark": "compare", "agent": algo, "env": args.env, "seed": seed, "steps": args.steps}
                config = dict(settings(algo, args.env, args.preset)) | ({"planes": True} if args.planes else {})
                for assignment in args.set if algo == "iris" else []:
                    change(config, assignment)
                spec |= {"eval_games": args.eval_games, "config": config}
                specs[args.out / algo / f"seed_{seed}"] = spec
        runs.check(specs)
        if args.set:  # else they are those of the file
            check_settings(args.env, next(spec["config"] for spec in specs.values() if spec["agent"] == "iris"))
        if args.ray_address:
            runs.check_ray(args.ray_address)
        runs.create(specs)
        status = runs.run_all(list(specs), "benchmarks.compare:play", {}, args)
    else:
        status = 0
    print(report(args.out, args.reach))
    return status


if __name__ == "__main__":
    runs.main(main)
