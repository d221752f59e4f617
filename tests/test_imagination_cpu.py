"""Imagination by the kernels in C++ is what PyTorch imagines."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_iris.imagination import ImaginedGame
from sb3_iris.imagination_cpu import CpuCache, CpuGame
from sb3_iris.world_model import WorldModel
from tests.presets import FrameEnv, tiny

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="wants a C++ compiler: c++, g++ or clang++"
)

# Sizes that fill the kernels' vectors, whole or in part
SHAPES: dict[str, dict[str, Any]] = {
    "paper's kind": {"embed_dim": 64, "n_layers": 3, "n_heads": 4},
    "relative positions": {"embed_dim": 48, "n_layers": 2, "n_heads": 2, "grid": (2, 3)},
    "large heads": {"embed_dim": 140, "n_layers": 1, "n_heads": 1},
    "odd sizes": {"embed_dim": 15, "n_layers": 2, "n_heads": 3},
}
V, A, K, CONTEXT = 37, 5, 6, 5  # codes, actions, tokens per frame, steps in the context


def make_world_model(shape: str) -> WorldModel:
    """One whose predictions depend on what it reads."""
    world_model = WorldModel(V, A, K, CONTEXT, **SHAPES[shape]).eval()
    with th.no_grad():
        for name, parameter in world_model.named_parameters():
            parameter.copy_(
                th.randn_like(parameter)
                * (0.3 if "embedding" in name or "scores" in name else 0.8 / parameter.shape[-1] ** 0.5)
            )
        for module in world_model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(1)
        world_model.get_parameter("token_head.2.weight").mul_(3)
    return world_model


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def n_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = th.get_num_threads()
    th.set_num_threads(request.param)
    yield request.param
    th.set_num_threads(before)


def make_cache(world_model: WorldModel, dtype: th.dtype | None) -> CpuCache:
    cache = CpuCache(world_model, dtype)
    cache.attention_biases = world_model.attention_biases()
    return cache


def play(game: ImaginedGame, n_games: int, horizon: int = 2 * CONTEXT) -> list[th.Tensor]:
    """Rewards, ends and tokens of all steps; the context is full in between."""
    random = th.Generator().manual_seed(0)
    game.reset(th.randint(V, (n_games, K), generator=random))
    seen = []
    for t in range(horizon):
        rewards, ends, _ = game.step(th.randint(A, (n_games,), generator=random), predict_frame=t + 1 < horizon)
        seen += [rewards, ends, game.tokens]
    return seen


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("n_games", [1, 45])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_games(shape: str, n_games: int, temperature: float, n_threads: int) -> None:
    """The same random numbers make the same tokens, rewards and ends of games that last for more than one context."""
    world_model = make_world_model(shape)

    def options() -> dict[str, Any]:
        return {"temperature": temperature, "generator": th.Generator().manual_seed(1)}

    plain = play(ImaginedGame(lambda tokens: tokens, world_model, **options()), n_games)
    ours = play(CpuGame(lambda tokens: tokens, world_model, None, **options()), n_games)
    for theirs, mine in zip(plain, ours, strict=True):
        assert th.equal(mine, theirs)
    tokens = th.stack(plain[2::3])
    assert len(tokens.unique()) > (5 if n_games > 1 else 2)


@pytest.mark.parametrize("shape", SHAPES)
@th.no_grad()
def test_features(shape: str, n_threads: int) -> None:
    """What is made of new positions, one or several at a time, is what the Transformer makes of all of them at once."""
    world_model = make_world_model(shape)
    n_games, parts = 11, (7, 1, 1, 9, 1)
    x = th.randn(n_games, sum(parts), world_model.transformer.embed_dim)
    biases = world_model.attention_biases()
    expected = world_model.transformer(x, biases=biases)
    with th.autocast("cpu", th.bfloat16):
        autocast = world_model.transformer(x, biases=biases).float()
    for dtype in (None, th.bfloat16):
        cache = make_cache(world_model, dtype)
        for end in np.cumsum(parts):
            y = cache.features(world_model.transformer, x[:, cache.length : end])
            if dtype is None:
                th.testing.assert_close(y, expected[:, end - 1], rtol=1e-5, atol=1e-5)
            else:  # within bfloat16's own rounding: about as far from float32 as PyTorch is with it
                error = (y - expected[:, end - 1]).square().mean().sqrt()
                assert error < 1.5 * (autocast - expected).square().mean().sqrt()
                assert error > 1e-4 or shape == "odd sizes"  # heads of odd sizes are float32


@pytest.mark.parametrize("dtype", [None, th.bfloat16])
@th.no_grad()
def test_number_of_threads_changes_nothing(dtype: th.dtype | None) -> None:
    """Not a bit of it, nor does the number of games beside."""
    world_model = make_world_model("relative positions")
    x = th.randn(40, K + 1, world_model.transformer.embed_dim)
    before = th.get_num_threads()
    try:
        features = []
        for n in (1, 2, 3):
            th.set_num_threads(n)
            features.append(make_cache(world_model, dtype).features(world_model.transformer, x))
        alone = [make_cache(world_model, dtype).features(world_model.transformer, game) for game in x.split(1)]
    finally:
        th.set_num_threads(before)
    assert all(th.equal(features[0], other) for other in (*features[1:], th.cat(alone)))


def test_restarts_and_sliding_window() -> None:
    """Games that begin anew, each at another time, share caches with those that are as old."""
    world_model = make_world_model("relative positions")

    def played(game: ImaginedGame) -> list[th.Tensor]:
        random = th.Generator().manual_seed(0)
        game.reset(th.randint(V, (6, K), generator=random))
        seen = []
        for rows in ([], [2], [0, 5], [], [1], [], [3, 4]):
            if rows:
                game.restart(np.array(rows), th.randint(V, (len(rows), K), generator=random))
            rewards, ends, _ = game.step(th.randint(A, (6,), generator=random))
            seen += [rewards, ends, game.tokens]
        return seen

    options: dict[str, Any] = {"temperature": 0.0, "kept_frames": 2}
    plain = played(ImaginedGame(lambda tokens: tokens, world_model, **options))
    ours = played(CpuGame(lambda tokens: tokens, world_model, None, **options))
    for theirs, mine in zip(plain, ours, strict=True):
        assert th.equal(mine, theirs)


def test_sampling_by_probability() -> None:
    """Tokens of the kernels come as often as the world model says, in bfloat16 too."""
    world_model = make_world_model("paper's kind")
    n_games = 20_000
    for dtype in (None, th.bfloat16):
        game = CpuGame(lambda tokens: tokens, world_model, dtype, generator=th.Generator().manual_seed(0))
        game.reset(th.zeros(n_games, K, dtype=th.int64))
        with th.no_grad():
            game.step(th.zeros(n_games, dtype=th.int64))
            first = game.tokens[:, 0].mode().values
            some = game.tokens[game.tokens[:, 0] == first]
            cache = world_model.make_cache()
            world_model.step_action(th.zeros(1, K, dtype=th.int64), th.zeros(1, dtype=th.int64), cache)
            probabilities = world_model.step_token(first[None], cache).softmax(-1)[0]
        frequencies = th.bincount(some[:, 1], minlength=V) / len(some)
        deviations = (probabilities * (1 - probabilities) / len(some)).sqrt()
        assert len(some) > 1000
        assert ((frequencies - probabilities).abs() < 5 * deviations + (0.01 if dtype is not None else 1e-4)).all()


def test_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run imagines by the kernels unless `compile` is False, and comes to the same networks within rounding."""
    calls = []
    original = CpuCache.sample_frame

    def sample_frame(self: CpuCache, *args: Any) -> th.Tensor:
        if args[-1] is None:  # what scores held-out steps has a random stream of its own
            calls.append(args)
        return original(self, *args)

    monkeypatch.setattr(CpuCache, "sample_frame", sample_frame)
    ours = tiny(FrameEnv(), imagination_horizon=4).learn(40)
    assert len(calls) == 11 * 3  # training phases, imagined frames
    plain = tiny(FrameEnv(), imagination_horizon=4, compile=False).learn(40)
    assert len(calls) == 11 * 3
    for mine, theirs in zip(ours.policy.parameters(), plain.policy.parameters(), strict=True):
        th.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("relative_positions", [False, True])
def test_learned_game(relative_positions: bool) -> None:
    """
    The learned game is imagined by the kernels too, and by what the world model has learned until a context begins, as is that
    of PyTorch.
    """
    model = tiny(FrameEnv(), {"relative_positions": relative_positions}, imagination_horizon=4).learn(40)
    n_games = 4

    def played(compile: bool) -> list[np.ndarray]:
        model.compile = compile
        env = model.get_world_model_env(n_games, seed=0, max_episode_steps=9)
        assert isinstance(env.game, CpuGame) == compile
        seen = [np.asarray(env.reset())]
        actions = np.random.default_rng(0)
        for t in range(20):
            if t == 7:  # where a context begins
                with th.no_grad():
                    for parameter in model.policy.world_model.parameters():
                        parameter.copy_(parameter.flip(0))
            env.step_async(actions.integers(2, size=n_games))
            frames, rewards, dones, _ = env.step_wait()
            seen += [np.asarray(frames), rewards, dones]
        return seen

    with th.no_grad():
        for parameter in model.policy.world_model.parameters():
            parameter.add_(th.randn_like(parameter))
    weights = [parameter.clone() for parameter in model.policy.world_model.parameters()]
    ours = played(True)
    with th.no_grad():
        for parameter, weight in zip(model.policy.world_model.parameters(), weights, strict=True):
            parameter.copy_(weight)
    for mine, theirs in zip(ours, played(False), strict=True):
        assert np.array_equal(mine, theirs)


SCRIPT = """
import warnings
from sb3_iris import imagination_cpu
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(imagination_cpu.works(), imagination_cpu.works(), *(str(warning.message) for warning in caught), sep="\\n")
"""


def run(tmp_path: Path, **environment: str) -> list[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), **environment}
    result = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def test_without_a_compiler(tmp_path: Path) -> None:
    """PyTorch imagines then, and one warning says so."""
    works, again, warning = run(tmp_path, PATH=str(tmp_path), CXX="")
    assert works == again == "False"
    assert "imagination on this CPU does without the kernels" in warning and "there is no C++ compiler" in warning


def test_with_a_compiler_that_fails(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'no such vectors' >&2\nexit 1\n")
    compiler.chmod(0o755)
    works, again, warning = run(tmp_path, CXX=str(compiler))
    assert works == again == "False"
    assert f"{compiler} failed: no such vectors" in warning


def test_compiled_once(tmp_path: Path) -> None:
    """What is compiled is found again, and nothing else is left behind."""
    assert run(tmp_path) == ["True", "True"]
    (library,) = (tmp_path / "cache" / "sb3_iris").iterdir()
    made = library.stat().st_mtime_ns
    assert run(tmp_path) == ["True", "True"]
    assert library.stat().st_mtime_ns == made


def test_library_that_is_damaged(tmp_path: Path) -> None:
    assert run(tmp_path) == ["True", "True"]
    (library,) = (tmp_path / "cache" / "sb3_iris").iterdir()
    library.write_bytes(b"")
    works, _, *warnings = run(tmp_path)
    assert works == "True" and not warnings  # the next kind is compiled


def test_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    works, again, warning = run(tmp_path)
    assert works == again == "False"
    assert "does without the kernels" in warning
