"""Runs of the benchmarks: interrupted anywhere they go on, nothing finished is redone, nothing overwritten by mistake."""

import argparse
import contextlib
import errno
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import atari100k, runs
from sb3_iris import IRIS, RunCheckpointCallback, atari_wrappers, checkpoints
from sb3_iris.atari_wrappers import make_atari_env
from sb3_iris.checkpoint_folder import find_checkpoints
from sb3_iris.perceptual_loss import VGG16_FILE
from tests.test_perceptual_loss import FakeLPIPS

SCRIPT = str(Path(runs.__file__).with_name("atari100k.py"))
SMALL = ["--preset", "smoke", "--games", "Kangaroo", "--seeds", "0"]
PATIENCE = 300  # seconds after which a process has hung


def main(*arguments: str) -> Any:
    """The command, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [SCRIPT, *arguments])
        return atari100k.main()


def one_run(folder: Path, steps: int = 60, eval_games: int = 1, **config: Any) -> Path:
    """A folder ready to be worked on."""
    spec = {"benchmark": "atari100k", "agent": "IRIS", "game": "Kangaroo", "seed": 0, "preset": "smoke", "steps": steps}
    spec |= {"eval_games": eval_games, "config": atari100k.settings("smoke", "Kangaroo") | config}
    runs.create({folder: spec})
    return folder


def work(folder: Path, checkpoint_every: int = 20) -> dict[str, Any]:
    """Work on a run, and read what came out."""
    runs.work(folder, "benchmarks.atari100k:play", {"device": "cpu", "checkpoint_every": checkpoint_every})
    return runs.read(folder)


Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start() -> Iterator[Start]:
    """The command, in a process of its own that does not outlive the test."""
    processes = []

    def start_process(*arguments: str) -> subprocess.Popen:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        command = [sys.executable, SCRIPT, *arguments]
        processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=env))
        return processes[-1]

    yield start_process
    for process in processes:
        process.kill()
        process.wait(PATIENCE)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this takes too long"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" if Path("/proc").is_dir() else True
    return False


@pytest.fixture(autouse=True)
def short_games(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, games of the evaluation are cut after a hundred steps."""
    monkeypatch.setattr(atari_wrappers, "MAX_EVAL_FRAMES", 400)


class Interrupted(Exception):
    """What a test interrupts a run with."""


def raise_interrupted(*args: Any) -> None:
    raise Interrupted


def test_run_is_recorded(tmp_path: Path) -> None:
    data = work(one_run(tmp_path / "run", eval_games=2))
    assert data["status"] == "done" and data["steps"] == 60
    assert len(data["evaluation_games"]) == 2
    assert data["score"] == sum(game["score"] for game in data["evaluation_games"]) / 2
    (session,) = data["sessions"]
    assert session["versions"]["torch"] and session["hardware"]["cpus"] and "commit" in session
    assert data["seconds"]["training"] > 0 and data["seconds"]["evaluation"] > 0
    assert data["perceptual_loss"] is False
    assert data["spec"]["config"]["eval_temperature"] == 0.5
    model = IRIS.load(tmp_path / "run" / "model.zip")
    assert model.num_timesteps == 60 and model.final_training_epochs == 2
    # 60 steps are three epochs of one gradient step per network, then there are two more phases
    assert model._n_updates == 3 * (3 + 2)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_goes_on_after_each_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Interrupted by an exception after every checkpoint, a run makes each step and each training phase once, and its learning
    rate falls to zero as if nothing had happened.
    """
    folder = one_run(tmp_path / "run", learning_rate="lin_2e-3")
    positions = []

    class SaveAndStop(RunCheckpointCallback):
        def _save_if_due(self) -> None:
            before = self._position
            super()._save_if_due()
            if self._position != before:
                positions.append(self._position)
                raise Interrupted

    monkeypatch.setattr(atari100k, "RunCheckpointCallback", SaveAndStop)
    for _ in range(5):
        with pytest.raises(Interrupted):
            work(folder)
    data = work(folder)
    assert positions == [(20, 0), (40, 1), (60, 2), (60, 4), (60, 5)]  # steps and training phases
    assert [session.get("from_step") for session in data["sessions"]] == [0, 20, 40, 60, 60, 60]
    model = IRIS.load(folder / "model.zip")
    assert model.num_timesteps == 60 and model._n_updates == 3 * (3 + 2)
    assert [model.lr_schedule(progress) for progress in (1.0, 0.5, 0.0)] == [2e-3, 1e-3, 0.0]
    assert model.policy.tokenizer_optimizer.param_groups[0]["lr"] == 0.0


def test_perceptual_loss_on_one_of_two_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run has had LPIPS if all of its sessions have; on the second machine a stand-in is installed."""
    folder = one_run(tmp_path / "run", perceptual_loss="auto")
    with monkeypatch.context() as patch:
        patch.setattr(IRIS, "train", raise_interrupted)
        with pytest.raises(Interrupted):
            work(folder)
    assert runs.read(folder)["perceptual_loss"] is False
    weights = tmp_path / "hub" / "checkpoints" / VGG16_FILE
    weights.parent.mkdir(parents=True)
    weights.touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=FakeLPIPS))
    data = work(folder)
    assert len(data["sessions"]) == 2 and data["perceptual_loss"] is False


def test_interrupted_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that is not whole does not count: the one before does."""
    folder = one_run(tmp_path / "run")
    sha256 = checkpoints.sha256

    def digest_or_stop(path: Path) -> str:
        if "checkpoint_000001_20_steps" in {found.name for found in path.parent.parent.iterdir()}:
            raise Interrupted
        return sha256(path)

    monkeypatch.setattr(checkpoints, "sha256", digest_or_stop)
    with pytest.raises(Interrupted):
        work(folder)
    monkeypatch.setattr(checkpoints, "sha256", sha256)
    assert [path.name for path in (folder / "checkpoints").glob("checkpoint_*")] == ["checkpoint_000001_20_steps"]
    assert work(folder)["sessions"][1]["from_step"] == 20
    assert IRIS.load(folder / "model.zip")._n_updates == 3 * (3 + 2)


def test_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted between two games, the evaluation plays the others, and the games it would have played anyway."""
    whole = work(one_run(tmp_path / "whole", eval_games=3))
    folder = one_run(tmp_path / "run", eval_games=3)
    predict = IRIS.predict

    def predict_or_stop(model: IRIS, *args: Any, **kwargs: Any) -> Any:
        if len(runs.read(folder)["evaluation_games"]) == 1:
            raise Interrupted
        return predict(model, *args, **kwargs)

    monkeypatch.setattr(IRIS, "predict", predict_or_stop)
    with pytest.raises(Interrupted):
        work(folder)
    monkeypatch.setattr(IRIS, "predict", predict)
    monkeypatch.setattr(atari100k, "train", None)  # is not called again
    assert work(folder)["evaluation_games"] == whole["evaluation_games"]


def test_killed_and_started_again(tmp_path: Path, start: Start) -> None:
    """SIGKILL for the command: its workers end too, and the same command goes on; a third time changes nothing."""
    command = ["--out", str(tmp_path), *SMALL, "--steps", "200", "--eval-games", "1", "--checkpoint-every", "20"]
    folder = tmp_path / "Kangaroo" / "seed_0"
    process = start(*command, "--refresh", "1")
    wait_for(lambda: any(folder.glob("checkpoints/checkpoint_*")))
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE)
    worker = runs.read(folder)["sessions"][0]["pid"]
    wait_for(lambda: not alive(worker), 20)
    assert runs.read(folder)["status"] == "training"
    assert start(*command, "--refresh", "1").wait(PATIENCE) == 0
    data = runs.read(folder)
    assert data["status"] == "done" and data["steps"] == 200
    assert len(data["sessions"]) == 2 and 20 <= data["sessions"][1]["from_step"] < 200
    steps = [game["step"] for game in data["training_games"]]
    assert steps == sorted(set(steps))
    before = (folder / "run.json").read_bytes()
    assert main(*command) == 0
    assert (folder / "run.json").read_bytes() == before


SWEEP = """
import argparse, pathlib, sys
from benchmarks import runs

args = argparse.Namespace(jobs=1, device="cpu", ray_address=None, retries=0, refresh=1)
folders = [pathlib.Path(folder) for folder in sys.argv[1:]]
runs.main(lambda: runs.run_all(folders, "benchmarks.atari100k:play", {"checkpoint_every": 100_000}, args))
"""


@pytest.mark.parametrize("how", ["terminated", "interrupted", "killed"])
def test_asked_to_stop(tmp_path: Path, how: str) -> None:
    """The end of a cluster's job, Ctrl-C, a kill: in a collection the worker writes a checkpoint, which the record fits."""
    folder = one_run(tmp_path / "run", steps=100_000, train_freq=100_000, buffer_size=100_000)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", SWEEP, str(folder)], cwd=runs.ROOT, env=env, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: runs.read(folder).get("steps", 0) > 0)
        worker = runs.read(folder)["sessions"][0]["pid"]
        process.send_signal({"interrupted": signal.SIGINT, "killed": signal.SIGKILL}.get(how, signal.SIGTERM))
        if how == "terminated":  # Slurm asks all processes of a job
            os.kill(worker, signal.SIGTERM)
        _, stderr = process.communicate(timeout=PATIENCE)
        wait_for(lambda: not alive(worker), 20)
    finally:
        process.kill()
    assert how == "killed" or b"the same command goes on from here" in stderr
    (checkpoint,) = find_checkpoints(folder / "checkpoints")
    resumed = IRIS.resume(checkpoint.parent, make_atari_env("Kangaroo"), device="cpu")
    data = runs.read(folder)
    assert data["steps"] == resumed.num_timesteps > 0 and data["seconds"]["training"] > 0
    assert [game["score"] for game in data["training_games"]] == [info["r"] for info in resumed.ep_info_buffer or ()]


@pytest.mark.slow
def test_killed_worker_is_started_again(tmp_path: Path, start: Start) -> None:
    """SIGKILL for a worker: the sweep takes the run up again from its checkpoint."""
    folder = tmp_path / "Kangaroo" / "seed_0"
    process = start(
        *["--out", str(tmp_path), *SMALL, "--steps", "160", "--eval-games", "1", "--checkpoint-every", "20", "--refresh", "1"]
    )
    wait_for(lambda: any(folder.glob("checkpoints/checkpoint_*")))
    os.kill(runs.read(folder)["sessions"][0]["pid"], signal.SIGKILL)
    assert process.wait(PATIENCE) == 0
    data = runs.read(folder)
    assert data["status"] == "done" and len(data["sessions"]) == 2 and data["sessions"][1]["from_step"] >= 20


def test_failed_run(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """A run that cannot work is not tried again; the error is shown, and the exit status says so."""
    folder = tmp_path / "Kangaroo" / "seed_0"
    command = ["--out", str(tmp_path), *SMALL, "--steps", "40", "--eval-games", "1", "--device", "nonsense", "--refresh", "1"]
    assert main(*command) == 1
    assert "nonsense" in capfd.readouterr().err
    assert len(runs.read(folder)["sessions"]) == 1
    assert main(*command[:-4], "--refresh", "1") == 0  # with a device that exists it goes on
    assert runs.read(folder)["status"] == "done"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--games", "Pongg"], "--games Pongg: not a game of Atari 100k"),
        (["--steps", "0"], "--steps 0"),
        (["--seeds", "-1"], "--seeds -1"),
        (["--ray-address", "127.0.0.1:1"], "no Ray cluster answers there"),
        (["--ray-address", "nonsense"], "no Ray cluster answers there"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: list[str], message: str) -> None:
    if "--ray-address" in arguments:
        pytest.importorskip("ray")
    with pytest.raises(ValueError, match=message):
        main("--out", str(tmp_path / "out"), *SMALL, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", ['{"format": "sb3_iris run 1", "spec": {', '{"format": "sb3_iris run 1"}', "[]", '{"game": "Pong"}', ""]
)
def test_broken_json(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "Kangaroo" / "seed_0"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json .*nothing was changed"):
        main("--out", str(tmp_path), *SMALL)
    assert (folder / "run.json").read_text() == content


def test_read_while_another_machine_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over NFS a reader loses hold of a file that is replaced; it looks again, but not for ever, and not at other errors."""
    folder = one_run(tmp_path / "run")
    errors = [errno.ESTALE, errno.ESTALE]
    read_text = Path.read_text

    def read_or_lose(path: Path, **kwargs: Any) -> str:
        if errors:
            raise OSError(errors.pop(), "")
        return read_text(path, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_or_lose)
    assert runs.read(folder)["status"] == "waiting"
    for number, left in ((errno.ESTALE, 4), (errno.EIO, 9)):
        errors.extend([number] * (10 - len(errors)))
        with pytest.raises(OSError):
            runs.read(folder)
        assert len(errors) == left
        errors.clear()


def test_table(tmp_path: Path) -> None:
    """All runs, by names that can be read; in a terminal with too few lines those that something happens to come first."""
    status = ["done"] * 20 + ["waiting"] * 20 + ["training", "evaluating"]
    folders = [tmp_path / "ChopperCommand" / f"seed_{seed}" for seed in range(len(status))]
    for folder, value in zip(folders, status, strict=True):
        data = runs.read(one_run(folder))
        runs.write_json(folder / "run.json", data | {"status": value})

    def lines(width: int, height: int | None) -> list[str]:
        console = Console(width=width)
        with console.capture() as capture:
            console.print(runs._table(folders, {folders[39]: "no memory"}, height))
        return capture.get().splitlines()

    assert lines(80, None)[0].strip() == "20 done, 19 waiting, 1 failed, 1 training, 1 evaluating"
    assert [line.split()[0] for line in lines(80, None) if "seed" in line] == [f"ChopperCommand/seed_{i}" for i in range(42)]
    first = [line.split()[:2] for line in lines(130, 24)[4:7]]
    assert first == [[f"ChopperCommand/seed_{i}", what] for i, what in ((39, "failed"), (40, "training"), (41, "evaluating"))]
    assert lines(130, 60) == lines(130, None)


def test_other_protocol(tmp_path: Path) -> None:
    folder = one_run(tmp_path / "Kangaroo" / "seed_0", steps=60)
    before = (folder / "run.json").read_bytes()
    with pytest.raises(ValueError, match=r"another protocol \(steps: 60 there, 80 asked for\)"):
        main("--out", str(tmp_path), *SMALL, "--steps", "80", "--eval-games", "1", "--games", "Pong", "Kangaroo")
    with pytest.raises(ValueError, match=r"\(config.temperature: 1.0 there, 0.5 asked for\)"):
        spec = runs.read(folder)["spec"]
        runs.check({folder: {**spec, "config": {**spec["config"], "temperature": 0.5}}})
    assert (folder / "run.json").read_bytes() == before
    assert not (tmp_path / "Pong").exists()
    (tmp_path / "Pong" / "seed_0").mkdir(parents=True)
    (tmp_path / "Pong" / "seed_0" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="not empty and not the folder of a run"):
        main("--out", str(tmp_path), *SMALL, "--games", "Pong")


def test_environments_of_presets(tmp_path: Path) -> None:
    """As many as the settings say, as in `compare.py`; the paper's one is in no record, so that those from before go on."""
    specs = {
        preset: atari100k.make_spec(argparse.Namespace(preset=preset, steps=40, eval_games=1), "Kangaroo", 0)
        for preset in ("paper", "laptop")
    }
    assert "n_envs" not in specs["paper"] and specs["laptop"]["n_envs"] == 8
    folder = tmp_path / "run"
    config = atari100k.settings("smoke", "Kangaroo")
    runs.create({folder: specs["laptop"] | {"preset": "smoke", "config": config, "n_envs": 2}})
    assert work(folder)["status"] == "done"
    assert IRIS.load(folder / "model.zip", device="cpu").n_envs == 2


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main("--out", str(tmp_path / "out"), *SMALL, "--seeds", "0", "1", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "2 runs of 100,000 steps and 100 evaluation games, preset smoke: 0 done, 2 to do" in out
    assert "hours a run" in out
    assert not (tmp_path / "out").exists()


def test_second_worker_keeps_away(tmp_path: Path) -> None:
    folder = one_run(tmp_path / "run")
    function, options = "benchmarks.atari100k:play", {"device": "cpu"}
    with runs.lock(folder):
        with pytest.raises(runs.Busy, match="another process works on this run"):
            runs.work(folder, function, options, patience=0)
        command = [sys.executable, "-m", "benchmarks.runs", str(folder), function, json.dumps(options)]
        with subprocess.Popen(command, cwd=runs.ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as worker:
            assert worker.wait(PATIENCE) == runs.BUSY  # two sweeps have looked at once, and this one goes on
            assert worker.stderr is not None and worker.stderr.read() == b""
    assert runs.read(folder)["sessions"] == []


def test_sweep_leaves_alone_what_another_works_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As the jobs of a cluster's array do with the same command: no failure, and the other runs are done."""
    command = ["--out", str(tmp_path), *SMALL[:-1], "0", "1", "--steps", "40", "--eval-games", "1", "--refresh", "1"]
    folder = one_run(tmp_path / "Kangaroo" / "seed_0", steps=40)
    with runs.lock(folder), monkeypatch.context() as patch:
        patch.setattr(runs, "LOCK_SECONDS", 0)
        assert main(*command) == 0
    assert "1 runs are worked on by another process" in capsys.readouterr().out
    assert runs.read(folder)["sessions"] == [] and not (folder / "log.txt").exists()
    assert runs.read(tmp_path / "Kangaroo" / "seed_1")["status"] == "done"
    lock = contextlib.ExitStack()
    lock.enter_context(runs.lock(folder))
    timer = threading.Timer(3, lock.close)  # a machine that is gone, which the file system notices late
    timer.start()
    assert main(*command) == 0
    timer.join()
    assert runs.read(folder)["status"] == "done"


def test_settings_are_those_of_the_paper() -> None:
    """The default settings file says what the constructor's defaults say, but for Freeway."""
    parameters = inspect.signature(IRIS).parameters
    for game in atari100k.GAMES:
        config = atari100k.settings("paper", game)
        different = {name: value for name, value in config.items() if value != parameters[name].default}
        assert different == ({"temperature": 0.01} if game == "Freeway" else {})
    assert len(atari100k.GAMES) == 26
    assert atari100k.settings("smoke", "Freeway")["temperature"] == 0.01


def write_environment(run: runs.Run) -> None:
    (run.folder / "environment.json").write_text(json.dumps(dict(os.environ)))


@pytest.mark.parametrize("given", [{}, {"OMP_NUM_THREADS": "7", "GOMP_SPINCOUNT": "5"}])
def test_threads_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str]) -> None:
    """They share the cores and do not wait by spinning, unless the user wants it otherwise."""
    folder = one_run(tmp_path / "run")
    expected = {"OMP_NUM_THREADS": str(max(len(os.sched_getaffinity(0)) // 2, 1)), "GOMP_SPINCOUNT": "1000", **given}
    for name in expected:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    process = runs._start(folder, "tests.test_benchmarks_runs:write_environment", {}, slot=0, gpus=[], jobs=2)
    assert process.wait(PATIENCE) == 0
    environment = json.loads((folder / "environment.json").read_text())
    assert {name: environment[name] for name in expected} == expected


@pytest.mark.slow
def test_ray_cluster_with_a_killed_worker(tmp_path: Path, start: Start) -> None:
    """On a real local cluster a worker is killed in mid-run: the sweep still ends with every result."""
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    ray = Path(sys.executable).with_name("ray")
    options = ["--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir=/tmp/ray_{os.getpid()}"]
    head = subprocess.Popen(
        [ray, "start", "--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--block", *options],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:

        def answers() -> bool:
            with contextlib.suppress(ValueError):
                runs.check_ray(f"127.0.0.1:{port}")
                return True
            return False

        wait_for(answers)
        out = tmp_path / "out"
        sweep = start(
            *["--out", str(out), "--preset", "smoke", "--games", "Kangaroo", "--seeds", "0", "1", "2", "--steps", "600"],
            *["--eval-games", "1", "--checkpoint-every", "20", "--ray-address", f"127.0.0.1:{port}", "--refresh", "1"],
        )
        folder = out / "Kangaroo" / "seed_0"
        wait_for(lambda: any(folder.glob("checkpoints/checkpoint_*")), 180)
        assert runs.read(folder)["status"] == "training"
        os.kill(runs.read(folder)["sessions"][0]["pid"], signal.SIGKILL)
        assert sweep.wait(PATIENCE) == 0
        results = [json.loads((out / "Kangaroo" / f"seed_{seed}" / "run.json").read_text()) for seed in range(3)]
        assert [data["status"] for data in results] == ["done"] * 3
        assert all(data["steps"] == 600 and len(data["evaluation_games"]) == 1 for data in results)
        assert [len(data["sessions"]) for data in results] == [2, 1, 1]
        assert results[0]["sessions"][1]["from_step"] >= 20
        assert results[0]["sessions"][0]["pid"] != results[0]["sessions"][1]["pid"]
        assert "actor_critic/" in (folder / "log.txt").read_text()  # what IRIS logs
        # What a run cannot do is said, with its traceback in the run's folder
        failing = start(
            *["--out", str(tmp_path / "failing"), *SMALL, "--device", "nonsense", "--ray-address", f"127.0.0.1:{port}"],
        )
        assert failing.wait(PATIENCE) == 1
        assert "Traceback" in (tmp_path / "failing" / "Kangaroo" / "seed_0" / "log.txt").read_text()
    finally:
        head.terminate()
        head.wait(timeout=60)
