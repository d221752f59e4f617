"""
Files from strangers: what is not a whole file of ours gives a ValueError, whatever it is. No crash, no hang, no code that
runs, no memory filled, nothing written elsewhere.
"""

import io
import json
import pickle
import random
import resource
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_iris import IRIS
from sb3_iris.archive import ArrayFile, sha256, write_arrays
from sb3_iris.checkpoint_folder import FILES, MANIFEST, manifest_digest
from sb3_iris.reference_checkpoint import read_reference_checkpoint
from tests.presets import NO_TRAINING, FrameEnv, tiny
from tests.test_reference_checkpoint import FEW_LAYERS, TINY_SIZES, TheirNetworks, load, make_checkpoint, make_env

pytestmark = pytest.mark.filterwarnings("ignore")  # of NumPy and PyTorch about what they find in broken files

# Mutated files, over 1,000 in all; those with fitting checksums get as far as building networks, which takes longer
N_MUTANTS = {"checkpoint": 4 * 100, "signed": 3 * 33, "manifest": 100, "replay_buffer": 300, "reference": 200}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny(FrameEnv(), buffer_size=40).learn(12)
    return model.save_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model() -> IRIS:
    return tiny(FrameEnv(), None, buffer_size=40, **NO_TRAINING).learn(12)


@pytest.fixture(autouse=True)
def bounds(tmp_path: Path, model: IRIS, reference: bytes) -> Iterator[None]:  # what these take is not counted
    """Neither minutes nor gigabytes, and nothing beside the test's own folder."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - start < 120
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "precious.npz"}


def mutants(content: bytes, n: int) -> Iterator[bytes]:
    """The file with pieces missing, changed, exchanged, repeated, added."""
    rng = random.Random(0)
    for i in range(n):
        a, b = sorted(rng.randrange(len(content)) for _ in range(2))
        c = rng.randrange(len(content))
        mutant = bytearray(content)
        kind = i % 8
        if kind == 0:
            mutant = mutant[:a]
        elif kind == 1:
            mutant[a] ^= 1 << rng.randrange(8)
        elif kind == 2:
            mutant[-1 - rng.randrange(min(len(mutant), 3000))] ^= 1 << rng.randrange(8)  # where a zip file has its list
        elif kind == 3:
            mutant[a : a + 8] = rng.randbytes(8)
        elif kind == 4:
            del mutant[a : min(b, a + 100)]
        elif kind == 5:
            mutant[c:c] = mutant[a : min(b, a + 100)]
        elif kind == 6:
            mutant[a : a + 4] = b"\xff\xff\xff\x7f"
        else:
            mutant[:a] = b""
        if bytes(mutant) != content:
            yield bytes(mutant)


def refused(read: Callable[[], Any]) -> bool:
    """Whether it was, with an error that says something; anything else than a ValueError fails the test."""
    try:
        read()
    except ValueError as error:
        assert len(str(error)) > 10
        return True
    return False


@pytest.mark.parametrize("name", [*FILES, MANIFEST, "frames"])
def test_mutated_checkpoint(tmp_path: Path, checkpoint: Path, name: str) -> None:
    """Nothing gets by the checksums."""
    folder = shutil.copytree(checkpoint.parent, tmp_path / "run")
    paths = list(folder.glob("frames_*")) if name == "frames" else [folder / checkpoint.name / name]
    for mutant in mutants(paths[0].read_bytes(), N_MUTANTS["checkpoint"] // 4):
        for path in paths:
            path.write_bytes(mutant)
        assert refused(lambda: IRIS.resume(folder, FrameEnv(), device="cpu"))


def sign(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """What somebody would do who means it: checksums that fit."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    for name in FILES:
        manifest["files"][name] = {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    for block in manifest["frames"]:
        file = folder.parent / block["file"]
        block.update(size=file.stat().st_size, sha256=sha256(file))
    change(manifest)
    manifest["sha256"] = manifest_digest(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", [*FILES, "frames"])
def test_mutated_checkpoint_with_fitting_checksums(tmp_path: Path, checkpoint: Path, name: str) -> None:
    folder = shutil.copytree(checkpoint.parent, tmp_path / "run")
    path = (
        min(folder.glob("frames_*"), key=lambda path: len(path.name)) if name == "frames" else folder / checkpoint.name / name
    )
    n_refused = 0
    cases = list(mutants(path.read_bytes(), N_MUTANTS["signed"] // 3))
    for mutant in cases:
        path.write_bytes(mutant)
        sign(folder / checkpoint.name)
        n_refused += refused(lambda: IRIS.resume(folder, FrameEnv(), device="cpu"))
    assert n_refused > 0.6 * len(cases)  # the others changed what nobody reads, such as the times in a zip file


def values_in(thing: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths to all values in JSON, of long lists only some."""
    items = thing.items() if isinstance(thing, dict) else list(enumerate(thing))[:6] if isinstance(thing, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from values_in(value, (*path, key))


BAD_VALUES: tuple = (None, -1, 10**30, 2**40, 1.5, float("nan"), "x", "../../evil", [], {}, [[]], True)


def test_mutated_manifest(tmp_path: Path, checkpoint: Path) -> None:
    """Each of its values is another one, of another type or beyond all bounds: an error, or a model all the same."""
    folder = shutil.copytree(checkpoint.parent, tmp_path / "run") / checkpoint.name
    original = (folder / MANIFEST).read_text()
    rng = random.Random(0)
    places = [place for place in values_in(json.loads(original)) if place[0] not in ("sha256", "format")]
    n_refused = 0
    cases = [(place, value) for place in places for value in rng.sample(BAD_VALUES, 2)]
    for place, value in rng.sample(cases, N_MUTANTS["manifest"]):

        def change(manifest: dict[str, Any], place: tuple = place, value: Any = value) -> None:
            thing: Any = manifest
            for key in place[:-1]:
                thing = thing[key]
            thing[place[-1]] = value

        (folder / MANIFEST).write_text(original)
        sign(folder, change)
        n_refused += refused(lambda: IRIS.resume(folder.parent, FrameEnv(), device="cpu"))
    assert n_refused > 0.4 * N_MUTANTS["manifest"]


@pytest.mark.parametrize("name", ["../precious.npz", "/etc/passwd", "frames_0_0123456789abcdef.npz/../../x", "", 5, None])
def test_names_that_lead_elsewhere(tmp_path: Path, checkpoint: Path, name: Any) -> None:
    folder = shutil.copytree(checkpoint.parent, tmp_path / "run") / checkpoint.name
    shutil.copy(next(folder.parent.glob("frames_*")), tmp_path / "precious.npz")
    sign(folder, lambda manifest: manifest["frames"][0].update(file=name))
    assert refused(lambda: IRIS.resume(folder.parent, FrameEnv()))


def test_mutated_replay_buffer(model: IRIS) -> None:
    file = io.BytesIO()
    model.save_replay_buffer(file)
    before = model.replay_buffer
    n_refused = 0
    cases = list(mutants(file.getvalue(), N_MUTANTS["replay_buffer"]))
    for mutant in cases:
        n_refused += refused(lambda mutant=mutant: model.load_replay_buffer(io.BytesIO(mutant)))  # type: ignore[misc]
    assert n_refused > 0.6 * len(cases)
    model.replay_buffer = before


def test_replay_buffer_of_wrong_shapes(model: IRIS) -> None:
    """Well-formed arrays, but others than a buffer has."""
    file = io.BytesIO()
    model.save_replay_buffer(file)
    file.seek(0)
    with np.load(file, allow_pickle=False) as saved:
        arrays = dict(saved)
    changes: list[dict[str, Any]] = [
        {"about": arrays["about"] * 0},
        {"about": np.array([1, 3, 3, 8, 8, 2**40, 2**40, 2**40])},  # more than any machine has
        {"about": np.array([1, 3, 3, 8, 8, 40, 2**62, 40])},
        {"about": np.array([1, 3, 3, 8, 8, 40, -5, -5])},
        {"about": np.array([2**31, 3, 3, 8, 8, 40, 12, 12])},
        {"actions": arrays["actions"] + 7},
        {"actions": arrays["actions"] - 7},
        {"actions": arrays["actions"].astype(np.int32)},
        {"actions": np.array(["a"])},
        {"rewards": arrays["rewards"] * np.float32("nan")},
        {"terminations": arrays["terminations"][:5]},
        {"frames_0": arrays["frames_0"][:, :-1]},
        {"frames_0": arrays["frames_0"].astype(np.int8)},
    ]
    for change in changes:
        file = io.BytesIO()
        write_arrays(file, {**arrays, **change}.items())
        file.seek(0)
        assert refused(lambda file=file: model.load_replay_buffer(file)), change  # type: ignore[misc]
    for name in arrays:
        file = io.BytesIO()
        write_arrays(file, [item for item in arrays.items() if item[0] != name])
        file.seek(0)
        assert refused(lambda file=file: model.load_replay_buffer(file)), name  # type: ignore[misc]


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return (print, ("this should not run",))


@pytest.mark.parametrize("kind", ["pickle", "array of objects"])
def test_no_code_runs(model: IRIS, kind: str, capfd: pytest.CaptureFixture) -> None:
    file = io.BytesIO()
    if kind == "pickle":
        pickle.dump(Code(), file)
    else:
        np.savez(file, about=np.array([Code()], dtype=object))
    file.seek(0)
    assert refused(lambda: model.load_replay_buffer(file))
    assert "this should not run" not in capfd.readouterr().out
    file.seek(0)
    if kind == "pickle":
        pickle.load(file)
        assert "this should not run" in capfd.readouterr().out  # it would have


def bomb(name: str, n_bytes: int) -> bytes:
    """A zip file of a member that unpacks to ever so many zeros behind the header of a small array."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<i8", "fortran_order": False, "shape": (8,)})
        for _ in range(n_bytes // 2**20):
            member.write(bytes(2**20))
    return file.getvalue()


def test_zip_bombs(model: IRIS) -> None:
    """They unpack to 256 MB; the fixture ``bounds`` sees that it is not done."""
    content = bomb("about.npy", 2**28)
    assert len(content) < 2**20
    assert refused(lambda: model.load_replay_buffer(io.BytesIO(content)))
    assert refused(lambda: read_reference_checkpoint(io.BytesIO(bomb("archive/data.pkl", 2**28))))


@pytest.fixture(scope="module")
def reference() -> bytes:
    sizes = {**TINY_SIZES, **FEW_LAYERS, "channel_multipliers": (1, 2)}
    file = io.BytesIO()
    th.save(make_checkpoint(TheirNetworks(n_actions=4, sequence_length=2, n_heads=3, **sizes)), file)
    return file.getvalue()


def test_mutated_reference_checkpoint(reference: bytes) -> None:
    n_refused = 0
    for mutant in mutants(reference, N_MUTANTS["reference"]):  # not all at once in memory
        n_refused += refused(lambda mutant=mutant: load(io.BytesIO(mutant), n_heads=3))  # type: ignore[misc]
    assert n_refused > 0.6 * N_MUTANTS["reference"]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d | {"world_model.pos_emb.weight": th.zeros(1, 1).expand(10**9, 10**6)},
        lambda d: d | {"world_model.pos_emb.weight": th.zeros(3, 3).to_sparse()},
        lambda d: d | {"world_model.pos_emb.weight": th.zeros(10**9, 10**6, device="meta")},
        lambda d: d | {f"tokenizer.encoder.down.{i}.block.0.conv1.weight": th.zeros(1) for i in range(40)},
        lambda d: d | {f"junk.{i}": next(iter(d.values())) for i in range(5_000)},
    ],
)
def test_reference_checkpoint_beyond_bounds(reference: bytes, change: Any) -> None:
    checkpoint = change(th.load(io.BytesIO(reference), weights_only=True))
    file = io.BytesIO()
    th.save(checkpoint, file)
    file.seek(0)
    assert refused(lambda: IRIS.load_reference_checkpoint(file, make_env(), device="cpu"))


# --- Properties ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes(content: bytes) -> None:
    assert refused(lambda: ArrayFile(io.BytesIO(content)).read("frames", np.uint8, (1,)))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    dtype=st.sampled_from(["uint8", "int64", "float32", "bool"]),
    compressed=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_array(shape: list[int], dtype: str, compressed: bool, seed: int) -> None:
    """What is written comes back, also to NumPy."""
    array = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 100, size=shape).astype(dtype)
    file = io.BytesIO()
    write_arrays(file, [("a", array), ("b", array)], compressed)
    file.seek(0)
    np.testing.assert_array_equal(ArrayFile(file).read("b", dtype, (9, 9), array.shape), array)
    file.seek(0)
    with np.load(file, allow_pickle=False) as saved:
        np.testing.assert_array_equal(saved["a"], array)
