"""
What checkpoints stand, and what they and the replay buffer cost. Each command prints what it found::

    python benchmarks/soak.py kills                        # SIGKILL at random moments; the end must be that of a run without
    python benchmarks/soak.py frames Pong Breakout         # size and time of a checkpoint with 100,000 real frames
    python benchmarks/soak.py memory                       # of a run twice as long as its replay buffer
"""

import argparse
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sb3_iris import IRIS, RunCheckpointCallback
from sb3_iris.atari_wrappers import make_atari_env
from sb3_iris.buffers import SequenceReplayBuffer
from sb3_iris.checkpoint_folder import check_files, find_checkpoints

EPISODE = 4  # steps; collections end with an episode, so that a run which starts a new one is where it was
NETWORKS = ("tokenizer", "world_model", "actor_critic")
SETTINGS: dict[str, Any] = {
    "buffer_size": 200,  # overwritten several times
    "train_freq": 2 * EPISODE,
    "sequence_length": 4,
    "imagination_horizon": 2,
    "burn_in": 2,
    "final_training_epochs": 5,
    "perceptual_loss": None,
    "seed": 0,
    **{f"{name}_batch_size": 3 for name in NETWORKS},
    **{f"{name}_gradient_steps": 2 for name in NETWORKS},
    **{f"{name}_learning_starts": 0 for name in NETWORKS},
    "policy_kwargs": {
        "image_size": 8,
        "codebook_size": 16,
        "codebook_dim": 8,
        "tokenizer_channels": 4,
        "channel_multipliers": (1, 1, 1),
        "n_res_blocks": 1,
        "attention_resolutions": (),
        "n_layers": 1,
        "n_heads": 2,
        "embed_dim": 16,
        "lstm_hidden_size": 16,
    },
}


class ClockEnv(gym.Env):
    """Short episodes that depend on nothing but their actions, so that a new episode is the one that would have come."""

    observation_space = spaces.Box(0, 255, (8, 8, 3), np.uint8)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        self.t, self.sum = 0, 0
        return self._frame(), {}

    def _frame(self) -> np.ndarray:
        frame = np.zeros((8, 8, 3), dtype=np.uint8)
        frame[: 2 * self.t] = 30 * self.sum
        return frame

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        self.sum += int(action)
        return self._frame(), float(action - 1), self.t == EPISODE, False, {}


def digests(model: IRIS) -> dict[str, str]:
    """A fingerprint of everything that a run consists of, by name."""
    buffer = model.replay_buffer
    things: dict[str, Any] = dict(model.policy.state_dict())
    for name in NETWORKS:
        for index, state in getattr(model.policy, f"{name}_optimizer").state_dict()["state"].items():
            things |= {f"{name}_optimizer.{index}.{key}": value for key, value in state.items()}
    things |= {f"replay_buffer.{name}": array for name, array in buffer.outcomes().items()}
    things["replay_buffer.frames"] = buffer.observations
    things["random.torch"], things["random.policy"] = th.get_rng_state(), model.policy._generator.get_state()
    found = {name: hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest() for name, value in things.items()}
    counters = ("num_timesteps", "_n_updates", "_episode_num", "_current_progress_remaining")
    found |= {name: repr(getattr(model, name)) for name in counters}
    found |= {"buffer.pos": repr(buffer.pos), "random.model": repr(model._rng.bit_generator.state)}
    found |= {"random.python": repr(random.getstate()), "episodes": repr([info["r"] for info in model.ep_info_buffer or ()])}
    return found


def work(folder: Path, steps: int, where: Any) -> None:
    """The run, from wherever it is; what a process does."""
    th.set_num_threads(1)
    warnings.simplefilter("ignore")
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def watch() -> None:
        """Write down again and again what the main thread is doing: the innermost function of ours."""
        while True:
            frame: Any = sys._current_frames().get(main_thread)
            while frame is not None and "sb3_iris" not in frame.f_code.co_filename:
                frame = frame.f_back
            where.value = (frame.f_code.co_name if frame is not None else "start").encode()[:31]
            time.sleep(0.0005)

    threading.Thread(target=watch, daemon=True).start()
    env = make_vec_env(ClockEnv)
    model = (
        IRIS.resume(folder, env, device="cpu")
        if find_checkpoints(folder)
        else IRIS("CnnPolicy", env, device="cpu", **SETTINGS)
    )
    model.set_logger(configure(None, []))
    model.learn(steps, RunCheckpointCallback(SETTINGS["train_freq"], folder))
    lines = [f"{name} {value}" for name, value in sorted(digests(model).items())]
    temporary = folder / "result.new"
    temporary.write_text("\n".join(lines))
    os.replace(temporary, folder / "result.txt")


KINDS = {  # what the functions of ours that a kill may hit belong to
    "starting or resuming": {
        "start",
        "__init__",
        "resume",
        "_open",
        "_make_policy",
        "_setup_model",
        "_restore",
        "check_files",
        "fill_frames",
        "fill_outcomes",
        "_load_networks",
        "load",
    },
    "writing a checkpoint": {
        *(
            "save_checkpoint",
            "_write",
            "_write_new",
            "write_frames",
            "write_arrays",
            "sync",
            "sha256",
            "_put_in_place",
            "_mend",
            "_manifest",
        ),
        *("_network_arrays", "next_checkpoint", "find_checkpoints", "remove_old", "remove_leftovers", "manifest_digest"),
        *("frames_block", "outcomes", "intact_copy", "_is_intact", "_check_size", "_copies", "signals_deferred", "<genexpr>"),
    },
    "collecting": {"collect_rollouts", "act", "add", "latest", "_images", "step", "reset", "_frame"},
}


def kills(args: argparse.Namespace) -> int:
    """SIGKILL at random moments, until there were as many as asked for; then each run must have ended as one without."""
    context = multiprocessing.get_context("fork")  # a process each, which need not import everything again
    rng = random.Random(args.seed)
    where: Any = context.RawArray("c", 32)  # without a lock, which a killed process would keep
    hit: Counter[str] = Counter()
    functions: Counter[str] = Counter()
    n_kills = n_runs = n_without = repeated = 0
    lost: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=args.folder) as root:

        def start(folder: Path) -> Any:
            process = context.Process(target=work, args=(folder, args.steps, where), daemon=True)
            process.start()
            return process

        IRIS("CnnPolicy", make_vec_env(ClockEnv), device="cpu", **SETTINGS)  # what is imported late is imported here
        whole = Path(root) / "whole"
        whole.mkdir()
        process = start(whole)
        process.join()
        expected = (whole / "result.txt").read_text().splitlines()
        while n_kills < args.kills:
            n_runs += 1
            folder = Path(root) / f"run_{n_runs}"
            folder.mkdir()
            while not (folder / "result.txt").exists():
                process = start(folder)
                # The last run ends, however slow the machine
                process.join(rng.uniform(0, args.seconds) if n_kills < args.kills else None)
                if process.exitcode is not None:
                    if process.exitcode != 0:
                        raise RuntimeError(f"a process ended by itself with exit status {process.exitcode}, see above")
                    continue
                function = where.value.decode()
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                if process.exitcode != -signal.SIGKILL:
                    continue  # it had just ended
                n_kills += 1
                functions[function] += 1
                hit[next((kind for kind, names in KINDS.items() if function in names), "training")] += 1
                checkpoints = find_checkpoints(folder)
                good = [path for path in checkpoints if is_good(path)]
                n_without += bool(checkpoints) and not good
                repeated += bool(good) and good[0] != checkpoints[0]
            found = (folder / "result.txt").read_text().splitlines()
            lost += [f"run {n_runs}: {line.split()[0]}" for line in set(expected) ^ set(found)]
            shutil.rmtree(folder)
    print(
        f"{n_kills} SIGKILLs in {n_runs} runs of {args.steps} steps, {time.monotonic() - began:.0f} seconds (seed {args.seed})"
    )
    print("  " + ", ".join(f"{kind}: {n}" for kind, n in hit.most_common()))
    print("  in the functions " + ", ".join(f"{name} {n}" for name, n in functions.most_common()))
    print(f"moments without a good checkpoint, once there was one: {n_without}; damaged newest checkpoints: {repeated}")
    print(f"compared at the end of each run with a run without kills: {len(expected)} things, bit by bit")
    print("lost: " + (", ".join(sorted(lost)) if lost else "nothing"))
    return 1 if lost or n_without else 0


def is_good(checkpoint: Path) -> bool:
    """Whether all of a checkpoint is as it was written."""
    try:
        check_files(checkpoint)
    except (ValueError, OSError):
        return False
    return True


def frames(args: argparse.Namespace) -> int:
    """Checkpoints with real frames of random play, at the paper's sizes."""
    for game in args.games:
        env = make_atari_env(game, seed=0)
        settings = {f"{name}_gradient_steps": 0 for name in NETWORKS}
        model = IRIS("CnnPolicy", env, device="cpu", perceptual_loss=None, **settings)  # type: ignore[arg-type]
        rng = np.random.default_rng(0)
        obs: Any = env.reset()
        start = np.ones(1, dtype=bool)

        def play(n_steps: int, model: IRIS = model, env: Any = env, rng: Any = rng) -> None:
            nonlocal obs, start
            for _ in range(n_steps):
                action = rng.integers(env.action_space.n, size=1)
                new_obs, reward, done, _ = env.step(action)
                model.replay_buffer.add(obs.transpose(0, 3, 1, 2), action, reward, done, np.zeros(1, dtype=bool), start)
                model.num_timesteps += 1
                obs, start = new_obs, done

        play(args.steps - 5_000)
        with tempfile.TemporaryDirectory(dir=args.folder) as root:
            folder = Path(root)
            seconds_all = timed(lambda: model.save_checkpoint(folder))  # noqa: B023
            play(5_000)
            before = size_of(folder, "frames_*")
            seconds_new = timed(lambda: model.save_checkpoint(folder))  # noqa: B023
            raw = model.replay_buffer.observations[: model.replay_buffer.size()].nbytes
            stored = size_of(folder, "frames_*") / 2  # each twice
            new = size_of(folder, "frames_*") - before
            networks = size_of(folder, "*/networks.npz") / len(find_checkpoints(folder))
            seconds_back = timed(lambda: IRIS.resume(folder, make_atari_env(game), device="cpu"))  # noqa: B023
            print(
                f"{game}: {args.steps:,} frames, {raw / 1e6:.0f} MB raw, {stored / 1e6:.1f} MB in files "
                f"({raw / stored:.0f} times smaller), each twice; networks and optimizers {networks / 1e6:.0f} MB\n"
                f"  a checkpoint of all but the last 5,000: {seconds_all:.1f} s; one of all after that: {seconds_new:.1f} s, "
                f"{new / 1e6:.1f} MB of new frame files; resuming: {seconds_back:.1f} s",
                flush=True,
            )
    return 0


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def size_of(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


def memory(args: argparse.Namespace) -> int:
    """Resident memory of a replay buffer that is filled twice over, with all that is cached beside the frames."""
    image_space, n_actions = spaces.Box(0, 255, (3, 64, 64), np.uint8), 6
    rng = np.random.default_rng(0)
    th.set_num_threads(1)
    at_start = resident()
    buffer = SequenceReplayBuffer(args.steps // 2, image_space, spaces.Discrete(n_actions), "cpu")
    pool = rng.integers(256, size=(64, 1, 3, 64, 64), dtype=np.uint8)

    def encode(observations: np.ndarray) -> th.Tensor:
        return th.zeros(len(observations), 16, dtype=th.int64)

    most_when_full: list[float] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        for n in range(args.steps):
            end, false = np.array([n % 300 == 299]), np.zeros(1, dtype=bool)
            buffer.add(pool[n % 64], rng.integers(n_actions, size=1), np.zeros(1), end, false, np.array([n % 300 == 0]))
            if (n + 1) % 200 == 0:
                buffer.sample(256, 1, rng)
                buffer.sample_tokens(64, 20, rng, encode)
            if (n + 1) % (args.steps // 10) == 0:
                with open(Path(root) / "buffer.npz", "wb") as file:
                    buffer.save(file)
                grown = (resident() - at_start) / 1e9
                if buffer.full:
                    most_when_full.append(grown)
                print(f"after {n + 1:,} steps: {grown:.3f} GB more than before the buffer was made", flush=True)
    spread = max(most_when_full) - min(most_when_full)
    print(f"full from step {args.steps // 2:,} on: {min(most_when_full):.3f} to {max(most_when_full):.3f} GB")
    return 1 if spread > 0.02 * max(most_when_full) else 0


def resident() -> int:
    """Memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the files go that it makes and removes (default: the system's)")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("kills", help="SIGKILL at random moments")
    command.add_argument("--kills", type=int, default=60, help="at least so many (default: 60)")
    command.add_argument("--steps", type=int, default=400, help="env steps of a run (default: 400)")
    command.add_argument("--seconds", type=float, default=1.0, help="longest time between two kills (default: 1)")
    command.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    command.set_defaults(function=kills)
    command = commands.add_parser("frames", help="checkpoints with real frames")
    command.add_argument("games", nargs="*", default=["Pong", "Breakout", "RoadRunner"], help="Atari games")
    command.add_argument("--steps", type=int, default=100_000, help="frames (default: 100000)")
    command.set_defaults(function=frames)
    command = commands.add_parser("memory", help="of the replay buffer")
    command.add_argument("--steps", type=int, default=200_000, help="twice the buffer's size (default: 200000)")
    command.set_defaults(function=memory)
    args = parser.parse_args()
    return args.function(args)


if __name__ == "__main__":
    sys.exit(main())
