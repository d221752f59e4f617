"""Runs in processes of their own that end badly: what is on disk afterwards is good, and a run goes on from it."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stable_baselines3.common.callbacks import BaseCallback

from benchmarks import soak
from sb3_iris import IRIS, RunCheckpointCallback, checkpoint_folder
from sb3_iris.checkpoint_folder import check_files, find_checkpoints
from tests.presets import FrameEnv, frame_envs, tiny

ROOT = Path(__file__).parent.parent
RUN = """
import sys, time
from pathlib import Path
import torch as th
from sb3_iris import IRIS, RunCheckpointCallback, checkpoints, iris
from tests.presets import FrameEnv, tiny

th.set_num_threads(1)

class Env(FrameEnv):
    def step(self, action):
        if self.n_steps == {waits_at}:
            Path(sys.argv[1], "waiting").touch()
            time.sleep(5)
        if self.n_steps == {fails_at}:
            raise RuntimeError("the game is broken")
        return super().step(action)

model = tiny(Env(), buffer_size=100_000, final_training_epochs={final_epochs})
print("ready", flush=True)
model.learn({steps}, RunCheckpointCallback({save_freq}, sys.argv[1], verbose=1))
print("the end", flush=True)
"""


def start(folder: Path, code: str = RUN, start_new_session: bool = False, **values: float) -> subprocess.Popen:
    """A run in a process of its own."""
    defaults = {"waits_at": -1, "fails_at": -1, "final_epochs": 1, "steps": 100_000, "save_freq": 8}
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", code.format(**{**defaults, **values}), str(folder)],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=start_new_session,
        text=True,
    )


def wait_for_checkpoint(folder: Path, process: subprocess.Popen, number: int = 1, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not (newest := find_checkpoints(folder)) or int(newest[0].name.split("_")[1]) < number:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_asked_to_stop(tmp_path, number, status):
    """In the middle of a collection: a checkpoint of the very step is written, and where it is is said."""
    process = start(tmp_path, waits_at=9, save_freq=8)
    deadline = time.monotonic() + 60
    while not (tmp_path / "waiting").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    if number == signal.SIGTERM:  # a cluster asks each process, and so does the one that started it
        time.sleep(0.2)
        process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status, stderr
    newest = find_checkpoints(tmp_path)[0]
    assert f"Stopped. The last checkpoint is {newest}" in stderr
    assert not (tmp_path / ".new").exists()
    check_files(newest)
    resumed = IRIS.resume(tmp_path, FrameEnv(), device="cpu")
    assert resumed.num_timesteps == resumed.replay_buffer.size() == 10


class Asks(BaseCallback):
    """Asks the process to stop at a step, as somebody may while a callback evaluates."""

    def __init__(self, number: int, at: int) -> None:
        super().__init__()
        self.number, self.at = number, at

    def _on_step(self) -> bool:
        if self.num_timesteps == self.at:
            signal.raise_signal(self.number)
        return True


@pytest.mark.parametrize("number, stop", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize("at", [4, 16])  # the last step of a collection, and of the last one
def test_asked_to_stop_in_another_callback(tmp_path, number, stop, at):
    model = tiny(FrameEnv())
    with pytest.raises(stop):
        model.learn(16, [RunCheckpointCallback(100, tmp_path), Asks(number, at)])
    assert model._n_updates == 3 * (at // 4 - 1)  # no training phase has followed
    assert IRIS.resume(tmp_path, FrameEnv(), device="cpu").num_timesteps == at


@pytest.mark.parametrize("fails", [False, True])
def test_signals_are_given_back(tmp_path, fails):
    """Whatever the number of callbacks, and however the call ends."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    env = FrameEnv()
    if fails:
        env.step = None  # type: ignore[assignment]
    with contextlib.suppress(TypeError):
        tiny(env).learn(8, [RunCheckpointCallback(4, tmp_path / name) for name in "ab"])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("number, status", [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_all_processes_are_asked_to_stop(tmp_path, number, status):
    """As by Ctrl-C in a terminal and by a cluster: environments in processes of their own end, too."""
    process = start(tmp_path, code=SUBPROCESSES, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "waiting").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    time.sleep(0.2)
    os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status, stderr
    newest = find_checkpoints(tmp_path)[0]
    assert f"Stopped. The last checkpoint is {newest}" in stderr
    assert IRIS.resume(tmp_path, frame_envs(2), device="cpu").num_timesteps == 20


SUBPROCESSES = """
import functools, sys, time
from pathlib import Path
from stable_baselines3.common.vec_env import SubprocVecEnv
from sb3_iris import RunCheckpointCallback
from tests.presets import FrameEnv, tiny

class Env(FrameEnv):
    def step(self, action):
        if self.n_steps == 10:
            Path(sys.argv[1], "waiting").touch()
            time.sleep(60)
        return super().step(action)

env = SubprocVecEnv([Env, Env], start_method="fork")
tiny(env, train_freq=16).learn(100, RunCheckpointCallback(16, sys.argv[1]))
"""


def test_asked_to_stop_while_writing(tmp_path):
    """The write is finished first. That it is under way is seen from its unfinished folder; stopped in there, it waits."""
    process = start(tmp_path, code=RUN.replace("model.learn(", SLOW_DISK + "model.learn("), save_freq=4)
    deadline = time.monotonic() + 60
    while not (tmp_path / ".new").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    (checkpoint,) = find_checkpoints(tmp_path)
    assert "it is whole" in stderr and f"The last checkpoint is {checkpoint}" in stderr
    assert IRIS.resume(tmp_path, FrameEnv(), device="cpu").num_timesteps == 4


SLOW_DISK = """
sync = checkpoints.sync
checkpoints.sync = lambda path: (time.sleep(0.2), sync(path))
"""


def test_final_training_phase(tmp_path):
    """Stopped in the training phases at the end, where nothing is collected any more."""
    process = start(tmp_path, steps=4, final_epochs=100_000, save_freq=4)
    wait_for_checkpoint(tmp_path, process, number=4)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    resumed = IRIS.resume(tmp_path, FrameEnv(), device="cpu")
    assert resumed.num_timesteps == 4 and resumed._n_updates > 3 and resumed._learn_progress is not None
    assert resumed._n_updates == 3 * resumed._learn_progress.epochs


def test_exception_in_the_env(tmp_path):
    """Nothing that was played before is lost."""
    process = start(tmp_path, fails_at=29)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and "the game is broken" in stderr
    assert f"Failed. The last checkpoint is {find_checkpoints(tmp_path)[0]}" in stderr
    resumed = IRIS.resume(tmp_path, FrameEnv(), device="cpu")
    assert resumed.num_timesteps == resumed.replay_buffer.size() == 29


def test_killed(tmp_path):
    """A few times here; ``benchmarks/soak.py kills`` does it often."""
    reached = 0
    for _ in range(2):
        process = start(tmp_path / "run", code=RESUME if reached else RUN, save_freq=4)
        deadline = time.monotonic() + 60
        while not (newest := find_checkpoints(tmp_path / "run")) or int(newest[0].name.split("_")[2]) <= reached + 8:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.02)
        process.kill()
        process.communicate()
        resumed = IRIS.resume(tmp_path / "run", FrameEnv(), device="cpu")
        assert resumed.num_timesteps > reached
        reached = resumed.num_timesteps
        del resumed


RESUME = """
import sys
from sb3_iris import IRIS, RunCheckpointCallback
from tests.presets import FrameEnv

model = IRIS.resume(sys.argv[1], FrameEnv(), device="cpu")
model.learn({steps}, RunCheckpointCallback({save_freq}, sys.argv[1]))
"""


def test_two_processes(tmp_path, monkeypatch):
    """This one, the second, is told who is there, neither writes nor takes up the run, and has its turn after that."""
    monkeypatch.setattr(checkpoint_folder, "LOCK_SECONDS", 0)
    first = start(tmp_path, save_freq=4)
    wait_for_checkpoint(tmp_path, first)
    model = tiny(FrameEnv())
    with pytest.raises(ValueError, match=rf"belongs to another process \(number {first.pid}\)"):
        model.save_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=rf"belongs to another process \(number {first.pid}\)"):
        IRIS.resume(tmp_path, FrameEnv())
    assert first.poll() is None
    first.kill()
    first.communicate()
    assert IRIS.resume(tmp_path, FrameEnv(), device="cpu").num_timesteps >= 4


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        result = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs the command mount")
    if result.returncode != 0:
        pytest.skip(f"needs the right to mount: {' '.join(mount)} says {result.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_full_disk(small_disk):
    """The run goes on with a warning, the last checkpoint stays good, and when there is room again there is a new one."""

    def fill() -> Path:
        model = tiny(FrameEnv()).learn(8)
        first = model.save_checkpoint(small_disk)
        frames = set(small_disk.glob("frames_*"))
        with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(b"x" * 4096)
        model.learn(4, reset_num_timesteps=False)
        for room in (0, 8192):  # for nothing, and for the new frames alone
            os.truncate(filler, filler.stat().st_size - room)
            with pytest.raises(OSError, match="No space left"):
                model.save_checkpoint(small_disk)
            assert set(small_disk.glob("frames_*")) == frames  # else each try would leave less room to the next
        assert find_checkpoints(small_disk) == [first] and not (small_disk / ".new").exists()
        check_files(first)
        return first

    filler = small_disk / "filler"
    first = fill()
    gc.collect()  # with the model goes its hold on the folder
    process = start(small_disk, code=RESUME, steps=8)  # has nothing left to do but its last checkpoint
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "no checkpoint could be written" in stderr and f"The last checkpoint is {first}" in stderr
    assert find_checkpoints(small_disk) == [first]
    filler.unlink()
    resumed = IRIS.resume(small_disk, FrameEnv(), device="cpu")
    assert resumed.num_timesteps == 8
    second = resumed.save_checkpoint(small_disk)
    assert find_checkpoints(small_disk) == [second, first]


@pytest.mark.slow
def test_soak(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["soak.py", "kills", "--kills", "15", "--steps", "80"])
    assert soak.main() == 0
    assert "lost: nothing" in capsys.readouterr().out
