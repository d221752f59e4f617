"""
The Atari 100k benchmark: IRIS on 26 games, 100,000 steps a run, scored on 100 whole games at the end::

    python benchmarks/atari100k.py --out runs/atari100k --dry-run             # the plan and its hours
    python benchmarks/atari100k.py --out runs/atari100k --jobs 2              # 26 games x 5 seeds, two at once
    python benchmarks/atari100k.py --out runs/atari100k --games Pong Breakout --seeds 0 1 2
    python benchmarks/atari100k.py --out /shared/atari100k --ray-address auto --gpus-per-run 0.5

A run is a folder with a ``run.json`` (every game's score, settings, versions, hardware, commit, hours), its ``log.txt``, its
``logs/`` for TensorBoard and, once trained, its ``model.zip``. The same command goes on where it was interrupted.

On a Slurm cluster, start Ray on the nodes of a job and give the sweep to it, with ``--out`` on storage that all nodes see::

    #!/bin/bash
    #SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=4 --cpus-per-task=32 --time=48:00:00
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    head=$(hostname --ip-address | cut -d' ' -f1)
    srun --nodes=1 --ntasks=1 -w "$SLURMD_NODENAME" \\
        ray start --head --node-ip-address="$head" --port=6379 --num-cpus="$SLURM_CPUS_PER_TASK" --block &
    sleep 30
    srun --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$SLURMD_NODENAME" \\
        ray start --address="$head:6379" --num-cpus="$SLURM_CPUS_PER_TASK" --block &
    sleep 30
    python benchmarks/atari100k.py --out /shared/atari100k --ray-address "$head:6379" --gpus-per-run 0.5 --cpus-per-run 4

The nodes need this program at the same path and the extras ``benchmarks`` and ``cluster`` installed. When the job's time is
over, submit it again: finished runs are skipped, the others go on.

Without Ray, all jobs of an array may have one and the same command: each takes runs that no other works on, and ends when none
is left. A job that is asked to stop writes checkpoints first if it is collecting; in a training phase its runs go back to the
last ones, so let ``--checkpoint-every`` be what you can afford to lose.
"""

import argparse
import json
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import LinearSchedule

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import runs
from sb3_iris import IRIS, RunCheckpointCallback
from sb3_iris.atari_wrappers import make_atari_env
from sb3_iris.checkpoint_folder import find_checkpoints

HERE = Path(__file__).resolve().parent
PUBLISHED = HERE / "data" / "atari100k_published.json"
SETTINGS = HERE / "hyperparams" / "iris.yml"
GAMES = tuple(json.loads(PUBLISHED.read_text())["random"])
FOR_THE_ZOO = ("policy", "n_envs", "n_timesteps", "env_wrapper", "env_kwargs")
EVALUATION_STEPS = 2_000  # guess of an evaluation game's length, for the projected hours only
SEED_STRIDE = 100_000  # between the seeds of two runs' environments and evaluation games


def presets() -> dict[str, str]:
    """Section of the settings file for each preset."""
    sections = yaml.safe_load(SETTINGS.read_text())
    return {"paper": "atari", **{name.removeprefix("atari-"): name for name in sections if name.startswith("atari-")}}


def section(preset: str, game: str) -> dict[str, Any]:
    """
    :param preset: ``"paper"`` or another name from ``presets``.
    :param game: Game, as in ``GAMES``.
    :return: What the settings file says, the environment's settings included.
    """
    sections = yaml.safe_load(SETTINGS.read_text())
    config = dict(sections[presets()[preset]])
    # What sets a game apart from the others in the paper sets it apart in every preset
    exception = sections.get(f"ALE/{game}-v5", {})
    return config | {name: value for name, value in exception.items() if value != sections["atari"].get(name)}


def settings(preset: str, game: str) -> dict[str, Any]:
    """
    :param preset: ``"paper"`` or another name from ``presets``.
    :param game: Game, as in ``GAMES``.
    :return: Arguments of ``IRIS``.
    """
    return {name: value for name, value in section(preset, game).items() if name not in FOR_THE_ZOO}


def with_schedules(config: dict[str, Any]) -> dict[str, Any]:
    """
    :param config: Settings in which ``lin_RATE``, as in the RL Zoo, is a value that falls from RATE to zero.
    :return: The same with schedules in place of those words.
    """
    words = {name: value for name, value in config.items() if isinstance(value, str) and value.startswith("lin_")}
    return config | {name: LinearSchedule(float(word.removeprefix("lin_")), 0.0, 1.0) for name, word in words.items()}


def make_spec(args: argparse.Namespace, game: str, seed: int) -> dict[str, Any]:
    """What is asked of one run; two runs of the same are the same but for chance."""
    n_envs = section(args.preset, game)["n_envs"]
    return {
        "benchmark": "atari100k",
        "agent": "IRIS",
        "game": game,
        # Left out where it is the paper's, so that folders from before go on
        **({"n_envs": n_envs} if n_envs > 1 else {}),
        "seed": seed,
        "preset": args.preset,
        "steps": args.steps,
        "eval_games": args.eval_games,
        "config": settings(args.preset, game),
    }


class Progress(BaseCallback):
    """
    Writes down every finished game of the training, and how far the run is.

    :param run: The run.
    """

    def __init__(self, run: runs.Run) -> None:
        super().__init__()
        self.run = run
        self._began = time.monotonic()
        self._before = run.data["seconds"]["training"]  # of earlier starts, with what they lost

    def note(self, steps: int) -> None:
        """How far the run is, and how long it took."""
        self.run.data["steps"] = steps
        self.run.data["seconds"]["training"] = self._before + time.monotonic() - self._began

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                game = {"step": self.num_timesteps, "score": float(info["episode"]["r"]), "frames": int(info["episode"]["l"])}
                self.run.data["training_games"].append(game)
        self.note(self.num_timesteps)
        self.run.save(at_most_every=10)
        return True

    def _on_rollout_end(self) -> None:
        self.run.save()  # before the checkpoint, which knows nothing of the games


def play(run: runs.Run, device: str = "auto", checkpoint_every: int = 5_000) -> None:
    """
    Train and evaluate, from wherever the run is.

    :param run: The run.
    :param device: Device of the networks.
    :param checkpoint_every: Env steps, or as many training phases, between two checkpoints.
    """
    final = run.folder / "model.zip"
    if not final.exists():
        train(run, device, checkpoint_every)
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)  # the model is final
    evaluate(run, IRIS.load(final, device=device))


def train(run: runs.Run, device: str, checkpoint_every: int) -> None:
    """From the last checkpoint, if there is one, to ``model.zip``."""
    spec, data = run.spec, run.data
    config = with_schedules(spec["config"])
    env = make_atari_env(spec["game"], spec.get("n_envs", 1))
    checkpoints = run.folder / "checkpoints"
    if find_checkpoints(checkpoints):
        schedules = {name: value for name, value in config.items() if callable(value)}  # these are in no checkpoint
        model = IRIS.resume(checkpoints, env, device=device, **schedules)
    else:
        model = IRIS("CnnPolicy", env, seed=spec["seed"], device=device, verbose=1, **config)
        # The model has seeded it from its own seed on, where the next seed begins one further
        env.seed(spec["seed"] * SEED_STRIDE)
    steps = model.num_timesteps
    # What came after the checkpoint is played again
    data["training_games"] = [game for game in data.get("training_games", []) if game["step"] <= steps]
    data.update(status="training", steps=steps, evaluation_games=[])
    data["sessions"][-1]["from_step"] = steps
    data.setdefault("seconds", {}).setdefault("training", 0.0)
    # Machines may differ: whether all starts so far had it
    data["perceptual_loss"] = model._perceptual_loss is not None and data.get("perceptual_loss", True)
    run.save()
    log = f"step_{steps:07d}_session_{len(data['sessions'])}"
    model.set_logger(configure(str(run.folder / "logs" / log), ["stdout", "csv", "tensorboard"]))
    progress = Progress(run)
    try:
        model.learn(spec["steps"], [progress, RunCheckpointCallback(checkpoint_every, checkpoints, verbose=1)])
    finally:  # asked to stop, it has written a checkpoint, behind whose step no game is played again
        progress.note(model.num_timesteps)
        run.save()
    model.save(run.folder / ".model.zip")
    data["status"] = "evaluating"
    run.save()
    runs.os.replace(run.folder / ".model.zip", run.folder / "model.zip")
    env.close()


def evaluate(run: runs.Run, model: IRIS) -> None:
    """Play the evaluation games that are still to play, one after another, and write each down."""
    spec, data = run.spec, run.data
    data["status"] = "evaluating"
    games = data["evaluation_games"]
    model.eval_temperature = spec["config"]["eval_temperature"]
    env = make_atari_env(spec["game"], evaluation=True)
    while len(games) < spec["eval_games"]:
        began = time.monotonic()
        seed = (spec["seed"] + 1) * SEED_STRIDE - 1 - len(games)
        env.seed(seed)  # each game its own, so that an interruption changes none
        model.policy.seed(seed)
        obs: Any = env.reset()
        state, start = None, np.ones(1, dtype=bool)
        while True:
            action, state = model.predict(obs, state=state, episode_start=start, deterministic=False)
            obs, _, start, infos = env.step(action)
            if "episode" in infos[0]:
                break
        episode = infos[0]["episode"]
        games.append({"score": float(episode["r"]), "frames": int(episode["l"]), "seed": seed})
        data["seconds"]["evaluation"] = data["seconds"].get("evaluation", 0.0) + time.monotonic() - began
        run.save()
    data["score"] = float(np.mean([game["score"] for game in games]))
    data["status"] = "done"
    run.save()
    env.close()


def projected_hours(spec: dict[str, Any], device: str) -> float:
    """
    Time a little of everything that a run consists of, on this machine.

    :param spec: The run.
    :param device: Device of the networks.
    :return: Hours of the whole run.
    """
    names = ("tokenizer", "world_model", "actor_critic")
    config = with_schedules(spec["config"])
    env = make_atari_env(spec["game"], spec.get("n_envs", 1))
    on_cpu = IRIS("CnnPolicy", env, device=device, **_shrunk(config)).device.type == "cpu"
    shares = {name: max(config[f"{name}_batch_size"] // 8, 1) if on_cpu else config[f"{name}_batch_size"] for name in names}
    small = _shrunk(config) | {f"{name}_batch_size": shares[name] for name in names}
    model = IRIS("CnnPolicy", env, device=device, **small)
    model.set_logger(configure(None, []))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A run of the paper's length")  # of these few gradient steps, that is
        model.learn(24, log_interval=None)  # the first time everything is slower
        model.learn(24, log_interval=None)
    seconds = model.logger.name_to_value
    epochs_in_all = spec["steps"] / config["train_freq"]
    total = seconds["time/collection_seconds"] / 24 * (spec["steps"] + EVALUATION_STEPS * spec["eval_games"])
    for name in names:
        epochs = max(epochs_in_all - config[f"{name}_learning_starts"] / config["train_freq"], 0)
        epochs += config["final_training_epochs"]
        per_step = seconds[f"time/{name}_seconds"] * config[f"{name}_batch_size"] / shares[name]
        total += epochs * config[f"{name}_gradient_steps"] * per_step
    return total / 3600


def _shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The same networks with one training phase of one gradient step each."""
    names = ("tokenizer", "world_model", "actor_critic")
    return {
        **config,
        "buffer_size": 1000,
        "train_freq": 24,
        "final_training_epochs": 0,
        **{f"{name}_learning_starts": 0 for name in names},
        **{f"{name}_gradient_steps": 1 for name in names},
    }


def print_plan(specs: dict[Path, dict[str, Any]], args: argparse.Namespace) -> None:
    """What is to do, and how long it may take."""
    there = {folder: runs.read(folder) for folder in specs if (folder / "run.json").exists()}
    for folder, spec in specs.items():
        status = there[folder]["status"] if folder in there else "new"
        print(f"{folder}: {spec['game']}, seed {spec['seed']}: {status}")
    done = [data for data in there.values() if data["status"] == "done"]
    to_do = len(specs) - len(done)
    if done:
        hours = float(np.mean([sum(data["seconds"].values()) for data in done])) / 3600
        origin = f"the mean of the {len(done)} done"
    else:
        hours = projected_hours(next(iter(specs.values())), args.device)
        origin = f"timed on this machine, with evaluation games of {EVALUATION_STEPS:,} steps"
    print(
        f"{len(specs)} runs of {args.steps:,} steps and {args.eval_games} evaluation games, preset {args.preset}: "
        f"{len(done)} done, {to_do} to do\n"
        f"about {hours:,.2f} hours a run ({origin}), {hours * to_do:,.1f} hours in all, "
        f"{hours * -(-to_do // args.jobs):,.1f} hours with --jobs {args.jobs} if they do not slow each other down"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--games", nargs="+", default=list(GAMES), help="default: all 26")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="default: 0 1 2 3 4, as in the paper")
    parser.add_argument("--steps", type=int, default=100_000, help="env steps a run (default: 100000)")
    parser.add_argument("--eval-games", type=int, default=100, help="whole games at the end (default: 100)")
    parser.add_argument(
        "--preset", default="paper", choices=presets(), help="settings in hyperparams/iris.yml (default: paper)"
    )
    parser.add_argument("--checkpoint-every", type=int, default=5_000, help="env steps between checkpoints (default: 5000)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its hours, and write nothing")
    runs.add_arguments(parser)
    args = parser.parse_args()
    for game in args.games:
        if game not in GAMES:
            raise ValueError(f"--games {game}: not a game of Atari 100k, which are {', '.join(GAMES)}")
    for name in ("steps", "eval_games", "checkpoint_every", "jobs"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if min(args.seeds) < 0:
        raise ValueError(f"--seeds {min(args.seeds)}: must be at least 0")
    specs = {
        args.out / game / f"seed_{seed}": make_spec(args, game, seed)
        for seed in dict.fromkeys(args.seeds)
        for game in dict.fromkeys(args.games)
    }
    runs.check(specs)
    if args.dry_run:
        print_plan(specs, args)
        return 0
    if args.ray_address:
        runs.check_ray(args.ray_address)  # before anything is written
    runs.create(specs)
    options = {"checkpoint_every": args.checkpoint_every}
    return runs.run_all(list(specs), "benchmarks.atari100k:play", options, args)


if __name__ == "__main__":
    runs.main(main)
