"""
A whole run in files, and back; ``checkpoint_folder.py`` says which files.

Nothing in them is a pickle, and nothing in them is trusted: arrays must have the shapes that the networks have, and sizes are
compared with what is there before memory is taken.
"""

import inspect
import json
import os
import random
import re
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th

from sb3_iris.archive import ArrayFile, damaged_file_errors, sha256, sync, write_arrays
from sb3_iris.buffers import BLOCK_STEPS
from sb3_iris.checkpoint_folder import (
    FILES,
    FORMAT,
    FRAMES,
    MANIFEST,
    NEW,
    FolderLock,
    StoredFrames,
    check_files,
    find_checkpoints,
    intact_copy,
    manifest_digest,
    next_checkpoint,
    remove_leftovers,
    remove_old,
    signals_deferred,
    write_frames,
)
from sb3_iris.type_aliases import NETWORKS
from sb3_iris.validation import check_hyperparameters, check_policy_kwargs, takes_argument

if TYPE_CHECKING:
    from sb3_iris.iris import IRIS

MOST_STEPS = 2**53
COUNTERS = ("num_timesteps", "_total_timesteps", "_num_timesteps_at_start", "_episode_num", "_n_updates")
STATISTICS = ("ep_info_buffer", "ep_success_buffer")


@dataclass
class LearnProgress:
    """
    Where a call of ``learn`` is.

    :param first_step: Env steps taken before the call.
    :param last_step: Env steps after its last collection.
    :param final_epochs: Training phases that follow its last collection.
    :param final_epochs_left: Those still to come.
    :param epochs: Epochs done.
    :param epoch_end: Env steps at the end of the running epoch's collection, behind which its training phase is due; None
        between two epochs.
    """

    first_step: int
    last_step: int
    final_epochs: int
    final_epochs_left: int
    epochs: int = 0
    epoch_end: int | None = None


# --- Writing -------------------------------------------------------------------------------------------------------------


def save_checkpoint(model: "IRIS", folder: str | Path) -> Path:
    """
    See ``IRIS.save_checkpoint``.

    :param model: The model.
    :param folder: Folder of its checkpoints.
    :return: Folder of the new checkpoint.
    """
    folder = Path(folder).resolve()
    refuse_checkpoints_of_another_run(model, folder)
    arrays = dict(_network_arrays(model))
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise FloatingPointError(f"{name} is not finite, so no checkpoint is written: the one before is to go on from")
    # Tokens are not saved. So that they are encoded anew here as there, and in the same batches, they are forgotten here too
    model.replay_buffer.forget_tokens()
    with signals_deferred(f"Interrupted while a checkpoint was written to {folder}: it is whole, IRIS.resume goes on from it"):
        folder.mkdir(parents=True, exist_ok=True)
        model._checkpoint_locks[folder] = FolderLock.of(folder)
        remove_leftovers(folder)
        try:
            checkpoint = _write(model, folder, arrays)
        except BaseException:
            remove_leftovers(folder)  # a full disk has better use for the space
            raise
        remove_old(folder)
    return checkpoint


def refuse_checkpoints_of_another_run(model: "IRIS", folder: Path) -> None:
    """
    :param model: The model.
    :param folder: Folder in which it is to write checkpoints, resolved.
    :raises ValueError: If there are some in it, and the model neither wrote there nor was resumed from there, or if another
        process writes to it.
    """
    if find_checkpoints(folder) and model._checkpoint_locks.get(folder) is not FolderLock.of(folder):
        raise ValueError(
            f"path={str(folder)!r} has checkpoints of another run, which would be removed: go on with that run, "
            "IRIS.resume(path, env), or choose another folder"
        )


def _write(model: "IRIS", folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    frames = set(folder.glob(FRAMES))
    try:
        blocks = _write_new(model, folder, arrays)
    except BaseException:
        for path in set(folder.glob(FRAMES)) - frames:  # no checkpoint names them
            path.unlink(missing_ok=True)
        raise
    checkpoint = next_checkpoint(folder, model.num_timesteps)
    os.rename(folder / NEW, checkpoint)
    sync(folder)
    check_files(checkpoint)  # before an older one goes
    model.replay_buffer.stored = StoredFrames(folder, blocks)
    return checkpoint


def _write_new(model: "IRIS", folder: Path, arrays: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """A checkpoint that has no name yet; returns the blocks of frames that it consists of."""
    buffer, new = model.replay_buffer, folder / NEW
    blocks = write_frames(buffer, folder)
    new.mkdir()
    with open(new / "networks.npz", "wb") as file:
        write_arrays(file, arrays.items(), compressed=False)  # weights are as good as random numbers
    with open(new / "replay.npz", "wb") as file:
        write_arrays(file, buffer.outcomes().items())
    manifest = {"format": FORMAT, **_manifest(model), "frames": blocks}
    manifest["files"] = {name: {"size": (new / name).stat().st_size, "sha256": sha256(new / name)} for name in FILES}
    manifest["sha256"] = manifest_digest(manifest)
    (new / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    for path in (*new.iterdir(), new, folder):
        sync(path)
    return blocks


def _network_arrays(model: "IRIS") -> Iterator[tuple[str, np.ndarray]]:
    """All tensors of a model by name."""
    for name, tensor in model.policy.state_dict().items():
        yield f"policy.{name}", tensor.cpu().numpy()
    for network in NETWORKS:
        for index, state in getattr(model.policy, f"{network}_optimizer").state_dict()["state"].items():
            for key, value in state.items():
                yield f"{network}_optimizer.{index}.{key}", th.as_tensor(value).cpu().numpy()
    yield "random.torch", th.get_rng_state().numpy()
    if model.device.type == "cuda":
        yield "random.cuda", th.cuda.get_rng_state(model.device).numpy()
    for name, generator in _torch_generators(model).items():
        yield f"random.{name}", generator.get_state().numpy()


def _torch_generators(model: "IRIS") -> dict[str, th.Generator]:
    """All random streams of torch that a model or its policy have for themselves."""
    owners = {"model": model, "policy": model.policy}
    streams = {f"{owner}.{name}": value for owner, thing in owners.items() for name, value in vars(thing).items()}
    return {name: value for name, value in streams.items() if isinstance(value, th.Generator)}


def argument_names(model: "IRIS | type[IRIS]") -> list[str]:
    """Names of the constructor's arguments that a checkpoint holds; of a subclass, those too that it passes on."""
    names: list[str] = []
    for base in (model if isinstance(model, type) else type(model)).__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
            named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            names += [name for name in named if name not in names]
            if len(named) == len(parameters):
                break
    return [name for name in names if name not in ("self", "policy", "env", "device", "_init_setup_model")]


def _manifest(model: "IRIS") -> dict[str, Any]:
    """Everything that is no array."""
    buffer = model.replay_buffer
    arguments = {name: "_stats_window_size" if name == "stats_window_size" else name for name in argument_names(model)}
    values = {name: getattr(model, attribute) for name, attribute in arguments.items() if hasattr(model, attribute)}
    if buffer.buffer_size != max(model.buffer_size // model.n_envs, 1):  # it came from a file, with a size of its own
        values["buffer_size"] = buffer.buffer_size * model.n_envs
    aliases = [name for name, policy_class in model.policy_aliases.items() if policy_class is model.policy_class]
    values["policy"] = aliases[0] if aliases else model.policy_class
    saved = {name: value for name, value in values.items() if _is_json(value)}
    optimizers = {name: getattr(model.policy, f"{name}_optimizer").state_dict()["param_groups"] for name in NETWORKS}
    version, numbers, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    manifest = {
        "arguments": saved,
        "not_saved": sorted({*arguments, *values} - saved.keys()),
        "env": [model.n_envs, buffer.n_actions, *buffer.obs_shape],
        "buffer": [buffer.n_added, buffer.size()],
        "counters": {name: getattr(model, name) for name in COUNTERS},
        "progress_remaining": model._current_progress_remaining,
        "learn": None if model._learn_progress is None else asdict(model._learn_progress),
        "statistics": {name: None if (s := getattr(model, name)) is None else list(s) for name in STATISTICS},
        "optimizers": {
            name: [{key: value for key, value in group.items() if key != "params"} for group in groups]
            for name, groups in optimizers.items()
        },
        "random": {
            "python": [version, list(numbers), gauss],
            "numpy": [numpy_state[1].tolist(), *numpy_state[2:]],
            "model": model._rng.bit_generator.state,
            "action_space": model.action_space.np_random.bit_generator.state,
        },
    }
    return json.loads(json.dumps(manifest, default=_plain, skipkeys=True))  # an env may say anything about its episodes


def _plain(value: Any) -> Any:
    """What JSON makes of what it does not know."""
    if isinstance(value, np.generic | th.Tensor) and getattr(value, "ndim", 0) == 0:
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return str(value)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, default=lambda value: value.item() if isinstance(value, np.generic) else json.dumps(value))
    except (TypeError, ValueError):
        return False
    return True


# --- Reading -------------------------------------------------------------------------------------------------------------


def resume(cls: "type[IRIS]", path: str | Path, env: Any, device: th.device | str, kwargs: dict[str, Any]) -> "IRIS":
    """
    See ``IRIS.resume``.

    :param cls: Class of the model.
    :param path: Folder of checkpoints, or one of them.
    :param env: Environment.
    :param device: Device of the networks.
    :param kwargs: Arguments of the constructor to change.
    :return: The model.
    """
    if env is None:
        raise ValueError("env=None: give the environment that the run had before")
    path = Path(path).resolve()
    single = (path / MANIFEST).is_file()
    folder = path.parent if single else path
    lock = FolderLock.of(folder) if os.access(folder, os.W_OK) else None
    problems = []
    for checkpoint in [path] if single else find_checkpoints(folder):
        try:
            manifest = check_files(checkpoint)
        except (ValueError, OSError) as error:
            problems.append(f"{checkpoint} is damaged: {error}")
            continue
        if problems:
            warnings.warn(f"{'; '.join(problems)}. Going on from the checkpoint before, {checkpoint}")
        try:
            with damaged_file_errors():
                model = _restore(cls, checkpoint, manifest, env, device, kwargs)
        except ValueError as error:
            raise ValueError(f"{checkpoint}: {error}") from error
        if lock is not None:
            model._checkpoint_locks[folder] = lock
        return model
    raise ValueError("; ".join(problems) or f"path={str(path)!r} has no checkpoint in it")


def _restore(
    cls: "type[IRIS]", checkpoint: Path, manifest: dict[str, Any], env: Any, device: th.device | str, kwargs: dict[str, Any]
) -> "IRIS":
    arguments = {**manifest["arguments"], **kwargs}
    missing = [name for name in manifest["not_saved"] if name not in kwargs]
    if missing:
        raise ValueError(
            f"{', '.join(missing)}: code and classes are not in a checkpoint, nor what the model does not keep, so they must "
            f"be given again, as in IRIS.resume(path, env, {missing[0]}=...)"
        )
    unknown = sorted(arguments.keys() - {*argument_names(cls), "policy"})
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: IRIS has no such argument")
    for name in ("buffer_size", "sequence_length"):
        if arguments[name] != manifest["arguments"][name]:
            raise ValueError(f"{name}={arguments[name]} cannot be changed: it is {manifest['arguments'][name]}")
    model = cls(arguments.pop("policy"), env, device=device, _init_setup_model=False, **arguments)
    with open(checkpoint / "networks.npz", "rb") as file:
        arrays = ArrayFile(file)
        _check_networks(model, arrays)
        model._setup_model()
        buffer = model.replay_buffer
        ours, theirs = [model.n_envs, buffer.n_actions, *buffer.obs_shape], manifest["env"]
        if ours != theirs:
            raise ValueError(f"it is of (n_envs, actions, image shape) = {theirs}, but env has {ours}: give it the same again")
        _load_networks(model, arrays, manifest["optimizers"])
        _load_buffer(model, checkpoint, manifest)
        for name in COUNTERS:
            setattr(model, name, _whole_number(manifest["counters"][name]))
        model._current_progress_remaining = float(manifest["progress_remaining"])
        for name in STATISTICS:
            values = manifest["statistics"][name]
            for value in values or []:
                np.array([value["r"], value["l"]] if name == "ep_info_buffer" else value, dtype=np.float64)  # must be numbers
            setattr(model, name, None if values is None else deque(values, maxlen=model._stats_window_size))
        _load_progress(model, manifest["learn"])
        assert model.env is not None
        # The env begins a new episode, and not one of those that this seed began with
        model.env.seed(
            int(np.random.SeedSequence([model.seed or 0, model.num_timesteps, model._n_updates]).generate_state(1)[0])
        )
        _load_random_streams(model, arrays, manifest["random"])  # last, since all before may draw
    return model


def _whole_number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MOST_STEPS:
        raise ValueError(f"it counts {value!r} where a whole number should be")
    return value


def _check_networks(model: "IRIS", arrays: ArrayFile) -> None:
    """Whether the file has the networks that the arguments describe, before memory is taken for them."""
    check_hyperparameters(model)
    check_policy_kwargs(model.policy_class, model.policy_kwargs)
    if model.policy_kwargs.get("robust_tokenizer", "auto") == "auto":  # not given again: it is what it was
        model.policy_kwargs.pop("robust_tokenizer", None)
        if takes_argument(model.policy_class, "robust_tokenizer"):
            model.policy_kwargs["robust_tokenizer"] = "policy.tokenizer.quantizer.idle" in arrays.names
    sizes = model.policy_kwargs
    layers = [sizes.get("n_layers", 1), sizes.get("n_res_blocks", 1), len(sizes.get("channel_multipliers", ()))]
    if max(layers) > len(arrays.names) or (sizes.get("image_size") or 0) > 2**12:
        raise ValueError(f"its networks do not have the sizes {sizes}")
    with th.device("meta"):
        policy = model._make_policy()
    for name, tensor in policy.state_dict().items():
        arrays.check(f"policy.{name}", _dtype(tensor), tuple(tensor.shape))


def _dtype(tensor: th.Tensor) -> np.dtype:
    return th.empty(0, dtype=tensor.dtype).numpy().dtype


def _load_networks(model: "IRIS", arrays: ArrayFile, param_groups: dict[str, Any]) -> None:
    def read(name: str, like: th.Tensor, *shapes: tuple[int, ...]) -> th.Tensor:
        array = arrays.read(name, _dtype(like), *shapes)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"its {name} is not finite")
        return th.from_numpy(array)

    policy = model.policy
    policy.load_state_dict({n: read(f"policy.{n}", t, tuple(t.shape)) for n, t in policy.state_dict().items()})
    for network in NETWORKS:
        optimizer = getattr(policy, f"{network}_optimizer")
        fresh = optimizer.state_dict()["param_groups"]
        saved = param_groups[network]
        if [{*group} - {"params"} for group in fresh] != [{*group} for group in saved]:
            raise ValueError(f"its {network}_optimizer is another one")
        for group in saved:
            for value in group.values():
                numbers = value if isinstance(value, list) else [0 if value is None else value]
                if not np.isfinite(np.array(numbers, dtype=np.float64)).all():
                    raise ValueError(f"its {network}_optimizer has {value!r}")
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, th.Tensor]] = {}
        for name in sorted(arrays.names):
            match = re.fullmatch(rf"{network}_optimizer\.(\d{{1,6}})\.(\w+)", name)
            if match is not None:
                index = int(match[1])
                parameter = parameters[index]
                state.setdefault(index, {})[match[2]] = read(name, parameter, tuple(parameter.shape), ())
        groups = [
            {
                **{key: tuple(value) if isinstance(value, list) else value for key, value in theirs.items()},
                "params": ours["params"],
            }
            for ours, theirs in zip(fresh, saved, strict=True)
        ]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _load_buffer(model: "IRIS", checkpoint: Path, manifest: dict[str, Any]) -> None:
    buffer, folder, blocks = model.replay_buffer, checkpoint.parent, manifest["frames"]
    n_added, n_steps = (_whole_number(value) for value in manifest["buffer"])
    if n_steps != min(n_added, buffer.buffer_size):
        raise ValueError(f"it has {n_steps} of {n_added} steps in a buffer of {buffer.buffer_size}")
    with open(checkpoint / "replay.npz", "rb") as file:
        buffer.fill_outcomes(ArrayFile(file), n_added, n_steps)
    expected = blocks[0]["first"] if blocks else n_added
    for block in blocks:
        first, last = _whole_number(block["first"]), _whole_number(block["last"])
        if first != expected or not n_added - n_steps < last <= n_added or not first < last <= first + BLOCK_STEPS:
            raise ValueError("its frames do not follow one another")
        expected = last
        path = intact_copy(folder, block)
        assert path is not None
        with open(path, "rb") as file:
            shape = (buffer.n_envs, last - first, *buffer.obs_shape)
            buffer.fill_frames(ArrayFile(file).read("frames", np.uint8, shape), first)
    if expected != n_added or (blocks and blocks[0]["first"] > n_added - n_steps) or (n_steps and not blocks):
        raise ValueError("its frames are not all there")
    buffer.stored = StoredFrames(folder, blocks)
    if n_steps:  # what comes next in the buffer is a new episode: those that were running have been cut off
        newest = (n_added - 1) % buffer.buffer_size
        buffer.truncations[newest] = ~buffer.terminations[newest]


def _load_progress(model: "IRIS", saved: dict[str, Any] | None) -> None:
    if saved is None:
        return
    progress = LearnProgress(**saved)
    for name, value in saved.items():
        if name != "epoch_end" or value is not None:
            _whole_number(value)
    if not progress.first_step <= model.num_timesteps or progress.final_epochs_left > progress.final_epochs:
        raise ValueError("its call of learn() contradicts its steps")
    model._learn_progress = progress
    model._resumed = True


def _load_random_streams(model: "IRIS", arrays: ArrayFile, states: dict[str, Any]) -> None:
    streams = _torch_generators(model)
    for name, generator in streams.items():
        generator.set_state(_torch_state(arrays, name, generator.get_state()))
    th.set_rng_state(_torch_state(arrays, "torch", th.get_rng_state()))
    if model.device.type == "cuda" and "random.cuda" in arrays.names:
        th.cuda.set_rng_state(_torch_state(arrays, "cuda", th.cuda.get_rng_state(model.device)), model.device)
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    keys, position, has_gauss, cached = states["numpy"]
    if not 0 <= _whole_number(position) <= 624:  # NumPy would not look
        raise ValueError("its random stream of NumPy is broken")
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, int(bool(has_gauss)), float(cached)))
    for name, stream in (("model", model._rng), ("action_space", model.action_space.np_random)):
        stream.bit_generator.state = states[name]


def _torch_state(arrays: ArrayFile, name: str, like: th.Tensor) -> th.Tensor:
    return th.from_numpy(arrays.read(f"random.{name}", np.uint8, tuple(like.shape)))
