"""
The runs of a benchmark: a folder and a JSON file each, surviving interruptions, worked on one or many at once.

``run.json`` holds what was asked for (``spec``), how far it is (``status``) and all that came out; it is only ever replaced
as a whole. A run that is ``done`` is never opened for writing again.
"""

import argparse
import contextlib
import datetime
import errno
import fcntl
import importlib
import importlib.util
import json
import logging
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch as th
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
FORMAT = "sb3_iris run 1"
PACKAGES = ("sb3_iris", "torch", "numpy", "gymnasium", "ale-py", "stable_baselines3", "sb3_contrib", "lpips", "minatar")
ASKED_TO_STOP = 128 + signal.SIGTERM  # exit status of a worker that wrote a last checkpoint first
RAY_SECONDS = 60  # for a cluster to answer
BUSY = 75  # exit status of a worker whose run another process works on; EX_TEMPFAIL of sysexits.h
GRACE_SECONDS = 25  # for a worker to write a last checkpoint; Slurm kills 30 seconds after it has asked
LOCK_SECONDS = 120  # a file system in the network may take a while to notice that a machine is gone (NFS: 90 seconds)


class Run:
    """
    One run in its folder.

    :param folder: Folder of the run, in which ``create`` has left a ``run.json``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = read(folder)
        self._saved = 0.0

    @property
    def spec(self) -> dict[str, Any]:
        return self.data["spec"]

    def save(self, at_most_every: float = 0.0) -> None:
        """
        :param at_most_every: Seconds since the last time before which nothing is written.
        """
        if time.monotonic() - self._saved >= at_most_every:
            write_json(self.folder / "run.json", self.data)
            self._saved = time.monotonic()


def write_json(path: Path, data: Any) -> None:
    """
    Replace a JSON file as a whole, so that no reader and no interruption ever sees half of it.

    :param path: The file.
    :param data: Its new content.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read(folder: Path) -> dict[str, Any]:
    """
    :param folder: Folder of a run.
    :return: Its ``run.json``.
    :raises ValueError: If that is missing, broken, or something else.
    """
    path = folder / "run.json"
    try:
        data = json.loads(_text(path))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {folder} is not the folder of a run") from None
    except ValueError as error:
        raise ValueError(f"{path} is not whole ({error}): nothing was changed, move {folder} away to start it anew") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("spec"), dict):
        raise ValueError(f"{path} was not written by this benchmark (no format {FORMAT!r} in it): nothing was changed")
    return data


def _text(path: Path) -> str:
    """Content of a file that another machine may replace meanwhile: over NFS its reader then loses hold of it (ESTALE)."""
    for _ in range(5):
        try:
            return path.read_text(encoding="utf-8")
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    return path.read_text(encoding="utf-8")


def find(folder: Path) -> list[dict[str, Any]]:
    """
    :param folder: Folder with runs at any depth.
    :return: What is in their ``run.json`` files.
    :raises ValueError: If there are none, or one is broken.
    """
    files = sorted(folder.glob("**/run.json"))
    if not files:
        raise ValueError(f"{folder} has no runs in it (no run.json at any depth)")
    return [read(file.parent) for file in files]


def check(specs: dict[Path, dict[str, Any]]) -> None:
    """
    See to it that what is already there is what is asked for.

    :param specs: What to run, by folder.
    :raises ValueError: For the first folder that has another run in it.
    """
    for folder, spec in specs.items():
        if not (folder / "run.json").exists():
            if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
                raise ValueError(f"{folder} is not empty and not the folder of a run: choose another --out")
            continue
        differences = _differences(read(folder)["spec"], json.loads(json.dumps(spec)))
        if differences:
            raise ValueError(f"{folder} holds a run of another protocol ({'; '.join(differences)}): choose another --out")


def _differences(there: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> list[str]:
    """What two specs differ in, in words."""
    lines = []
    for name in sorted({*there, *asked}):
        old, new = there.get(name), asked.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name}: {old!r} there, {new!r} asked for")
    return lines


def create(specs: dict[Path, dict[str, Any]]) -> None:
    """
    Leave a ``run.json`` in every folder that has none.

    :param specs: What to run, by folder, after ``check``.
    """
    for folder, spec in specs.items():
        if not (folder / "run.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "run.json", {"format": FORMAT, "spec": spec, "status": "waiting", "sessions": []})


def machine() -> dict[str, Any]:
    """Where and with what this process runs."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            pass  # shown by its absence
    if "sb3_iris" not in versions:
        versions["sb3_iris"] = (ROOT / "sb3_iris" / "version.txt").read_text().strip()

    def git(*command: str) -> str:
        result = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "sb3_iris", "benchmarks") else "")
    except FileNotFoundError:
        commit = ""
    gpu = th.cuda.get_device_name() if th.cuda.is_available() else None
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hardware": {"gpu": gpu, "cpu": _cpu_name(), "cpus": _n_cpus()},
        "platform": platform.platform(),
        "versions": versions,
        "commit": commit or None,
    }


def _cpu_name() -> str:
    """Model of the processor; Python itself knows but its architecture on Linux."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _n_cpus() -> int:
    """CPUs that this process may use, which in a cluster's job are not all of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Busy(ValueError):
    """Another process works on the run."""


@contextlib.contextmanager
def lock(folder: Path, patience: float = LOCK_SECONDS) -> Iterator[None]:
    """
    Keep other processes away from a run; the operating system lets go when this process ends, in whatever way.

    :param folder: Folder of the run.
    :param patience: Seconds to wait for it.
    :raises Busy: If another process keeps it.
    """
    with open(folder / "lock", "w") as file:
        give_up = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise Busy(f"{folder}: another process works on this run") from None
                time.sleep(1)
            except OSError:
                break  # a file system without locks
        yield


def is_locked(folder: Path) -> bool:
    """
    :param folder: Folder of a run.
    :return: Whether another process works on it, as far as the file system tells.
    """
    try:
        with lock(folder, patience=0):
            return False
    except Busy:
        return True


def work(folder: Path, function: str, options: dict[str, Any], patience: float = LOCK_SECONDS) -> None:
    """
    Work on a run until it is done.

    :param folder: Folder of the run.
    :param function: What does the work, as ``module:name``; called with the run and ``options``.
    :param options: Further arguments by name, such as the device, that do not change what is asked for.
    :param patience: See ``lock``.
    """
    with lock(folder, patience):
        run = Run(folder)
        if run.data["status"] == "done":
            return
        run.data["sessions"].append(machine())
        run.save()
        module, name = function.split(":")
        getattr(importlib.import_module(module), name)(run, **options)


def work_and_log(folder: Path, function: str, options: dict[str, Any]) -> None:
    """
    The same, with what is printed in the run's ``log.txt``.

    :param folder: See ``work``.
    :param function: See ``work``.
    :param options: See ``work``.
    """
    with open(folder / "log.txt", "a", buffering=1) as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            work(folder, function, options)
        except Exception:
            traceback.print_exc()
            raise


# --- Many runs -----------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """
    :param parser: Gets the arguments that ``run_all`` understands.
    """
    group = parser.add_argument_group("where and how many at once")
    group.add_argument("--jobs", type=int, default=1, help="runs at once on this machine (default: 1)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda ... (default: auto; several GPUs are taken in turns)")
    group.add_argument("--ray-address", help="run on this Ray cluster instead: auto, HOST:PORT or ray://HOST:PORT")
    group.add_argument("--gpus-per-run", type=float, help="share of a GPU per run on Ray (default: 1 if the cluster has any)")
    group.add_argument("--cpus-per-run", type=float, default=1, help="CPUs per run on Ray (default: 1)")
    group.add_argument("--retries", type=int, default=3, help="how often a run is taken up again after its worker died")
    group.add_argument("--refresh", type=float, default=10, help="seconds between two looks at the runs (default: 10)")


def run_all(folders: list[Path], function: str, options: dict[str, Any], args: argparse.Namespace) -> int:
    """
    Work on all runs that are not done, on this machine or on a Ray cluster, with a live table of all of them.

    :param folders: Folders of the runs.
    :param function: See ``work``.
    :param options: See ``work``.
    :param args: What was given for ``add_arguments``.
    :return: Exit status: 0 if no run has failed. Those that another process works on are left to it.
    """
    open_folders = [folder.resolve() for folder in folders if read(folder)["status"] != "done"]
    failures: dict[Path, str] = {}
    backend = _on_ray if args.ray_address else _on_this_machine
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)  # in a log file, Rich would squeeze the table into 80 columns
    # Closed whatever ends this, which ends the workers
    with contextlib.closing(backend(open_folders, function, {**options, "device": args.device}, args, failures)) as steps:
        if console.is_terminal:
            with Live(_table(folders, failures, console.height), console=console, auto_refresh=False) as live:
                for _ in steps:
                    live.update(_table(folders, failures, console.height), refresh=True)
        else:
            shown = None
            for _ in steps:
                states = [read(folder)["status"] for folder in folders]
                if states != shown:
                    console.print(_table(folders, failures))
                    shown = states
            if failures or shown is None:
                console.print(_table(folders, failures))
    for folder, message in failures.items():
        print(f"failed: {folder}: {message}", file=sys.stderr)
    elsewhere = [folder for folder in folders if folder.resolve() not in failures and read(folder)["status"] != "done"]
    if elsewhere:
        print(f"{len(elsewhere)} runs are worked on by another process; should it die, the same command goes on with them")
    return 1 if failures else 0


def _table(folders: list[Path], failures: dict[Path, str], height: int | None = None) -> Table:
    """All runs, one line each; where they are more than a terminal's height shows, those that something happens to first."""
    rows = []
    for folder in folders:
        data = read(folder)
        status = "failed" if folder.resolve() in failures else data["status"]
        trained = [game["score"] for game in data.get("training_games", [])[-10:]]
        score = data.get("score")
        rows.append(
            [
                "/".join(folder.parts[-2:]),
                status,
                f"{data.get('steps', 0):,}/{data['spec']['steps']:,}",
                f"{sum(trained) / len(trained):.1f}" if trained else "-",
                f"{len(data.get('evaluation_games', []))}/{data['spec']['eval_games']}",
                f"{score:.1f}" if score is not None else "-",
                f"{sum(data.get('seconds', {}).values()) / 3600:.2f}",
                str(len(data["sessions"])),
                data["sessions"][-1]["host"] if data["sessions"] else "-",
            ]
        )
    counts = Counter(row[1] for row in rows)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=", ".join(f"{n} {status}" for status, n in counts.items()))
    for name in ("run", "status", "steps", "training", "games", "score", "hours", "starts", "on"):
        table.add_column(name, no_wrap=name in ("run", "status", "steps"))
    if height is not None and len(rows) > height - 5:
        rows.sort(key=lambda row: {"waiting": 1, "done": 2}.get(row[1], 0))
    for row in rows:
        table.add_row(*row)
    return table


def _on_this_machine(
    folders: list[Path], function: str, options: dict[str, Any], args: argparse.Namespace, failures: dict[Path, str]
) -> Generator[None, None, None]:
    """A process per run, ``jobs`` at once; they end with this one."""
    waiting = [(folder, args.retries) for folder in folders]
    working: dict[int, tuple[subprocess.Popen, Path, int]] = {}
    elsewhere: list[tuple[Path, int]] = []  # another process works on them, or has died where a file system has not noticed
    patience = time.monotonic() + LOCK_SECONDS
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if os.environ.get("CUDA_VISIBLE_DEVICES") else []
    gpus = gpus or [str(index) for index in range(th.cuda.device_count())]
    try:
        while True:
            for slot in range(args.jobs):
                while slot not in working and waiting:
                    folder, retries = waiting.pop(0)
                    if read(folder)["status"] == "done":
                        continue  # by another process
                    if is_locked(folder):
                        elsewhere.append((folder, retries))
                        continue
                    working[slot] = _start(folder, function, options, slot, gpus, args.jobs), folder, retries
            if not waiting and not working and not (elsewhere and time.monotonic() < patience):
                break
            yield
            deadline = time.monotonic() + args.refresh
            while time.monotonic() < deadline and all(process.poll() is None for process, _, _ in working.values()):
                time.sleep(0.1)
            for slot, (process, folder, retries) in list(working.items()):
                status = process.poll()
                if status is None:
                    continue
                del working[slot]
                if read(folder)["status"] == "done":
                    continue  # whatever happened to the process after that
                if (
                    status < 0 or status == ASKED_TO_STOP
                ) and retries > 0:  # killed, say for memory: its checkpoint is there to go on from
                    waiting.insert(0, (folder, retries - 1))
                elif status == BUSY:
                    elsewhere.append((folder, retries))
                elif status != 0:
                    lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
                    failures[folder] = f"{lines[-1] if lines else f'exit status {status}'} (see log.txt there)"
            waiting, elsewhere = waiting + elsewhere, []
        yield
    finally:
        _end([process for process, _, _ in working.values()])


def _end(processes: list[subprocess.Popen]) -> None:
    """Ask processes to stop, which lets them write a last checkpoint, and kill those that do not."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(deadline - time.monotonic(), 0))
        process.kill()
        process.wait()


def _start(folder: Path, function: str, options: dict[str, Any], slot: int, gpus: list[str], jobs: int) -> subprocess.Popen:
    """A process that works on one run."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    env.setdefault("OMP_NUM_THREADS", str(max(_n_cpus() // jobs, 1)))
    # Where other programs run beside, threads that wait by spinning make a run take several times as long
    env.setdefault("GOMP_SPINCOUNT", "1000")
    if len(gpus) > 1:
        env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.runs", str(folder), function, json.dumps(options)],
            stdin=subprocess.PIPE,  # never written to: it closes when this process is gone
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,  # Ctrl+C is for the process that knows all runs
        )


def _on_ray(
    folders: list[Path], function: str, options: dict[str, Any], args: argparse.Namespace, failures: dict[Path, str]
) -> Generator[None, None, None]:
    """A Ray task per run; Ray starts it again elsewhere when its worker or its machine is lost."""
    ray = connect(args.ray_address)
    gpus = args.gpus_per_run
    if gpus is None:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) > 0 else 0
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= args.cpus_per_run and node.get("GPU", 0) >= gpus for node in nodes):
        ray.shutdown()  # Ray would wait for such a machine for ever
        there = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes)
        raise ValueError(f"a run wants {args.cpus_per_run:g} CPU, {gpus:g} GPU, but no machine has that ({there})")

    def task(root: str, folder: str, function: str, options: dict[str, Any]) -> None:
        sys.path.insert(0, root)
        from benchmarks.runs import work_and_log

        work_and_log(Path(folder), function, options)

    remote: Any = ray.remote(num_cpus=args.cpus_per_run, num_gpus=gpus, max_retries=args.retries)(task)
    tasks = {remote.remote(str(ROOT), str(folder), function, options): folder for folder in folders}
    try:
        while tasks:
            yield
            finished, _ = ray.wait(list(tasks), timeout=args.refresh)
            for reference in finished:
                folder = tasks.pop(reference)
                try:
                    ray.get(reference)
                except ray.exceptions.RayError as error:
                    message = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
                    failures[folder] = f"{message} (see log.txt there)"
        yield
    finally:
        for reference in tasks:
            ray.cancel(reference, force=True)
        ray.shutdown()


def connect(address: str) -> Any:
    """
    :param address: Address of a Ray cluster that ``check_ray`` has reached.
    :return: Ray, connected.
    """
    import ray

    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    return ray


def check_ray(address: str) -> None:
    """
    :param address: Address of a Ray cluster.
    :raises ValueError: If there is no Ray, or no cluster there.
    """
    if importlib.util.find_spec("ray") is None:
        raise ValueError("--ray-address needs Ray: pip install 'sb3_iris[cluster]'")
    message = f"--ray-address {address}: no Ray cluster answers there ({{}}): start one with `ray start --head`"
    if address != "auto":
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, ValueError, OverflowError) as error:
            raise ValueError(message.format(error)) from None
    # Where something else listens, Ray waits for minutes and then ends the process that asked
    code = "import sys; from benchmarks import runs; runs.connect(sys.argv[1])"
    try:
        result = subprocess.run(
            [sys.executable, "-c", code, address], cwd=ROOT, capture_output=True, text=True, timeout=RAY_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ValueError(message.format(f"not within {RAY_SECONDS} seconds")) from None
    if result.returncode != 0:
        raise ValueError(message.format((result.stderr.strip().splitlines() or ["no reason given"])[-1]))


def main(main_function: Callable[[], int | None]) -> None:
    """
    :param main_function: What a script does; its ``ValueError`` and ``OSError`` are the user's to read, without a traceback.
    """

    def stop(number: int, frame: Any) -> None:
        print("stopped: the same command goes on from here", file=sys.stderr)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        sys.exit(main_function())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from here")


if __name__ == "__main__":

    def end_with_parent() -> None:
        os.read(0, 1)  # comes back when the other end closes
        os.kill(os.getpid(), signal.SIGTERM)  # a last checkpoint
        time.sleep(GRACE_SECONDS)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    from benchmarks import runs  # this file under the name that all others know it by

    try:
        runs.work(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), patience=0)
    except runs.Busy:  # since the process that knows all runs has looked
        sys.exit(BUSY)
