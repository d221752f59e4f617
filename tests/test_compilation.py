"""Training that torch.compile makes faster is the same training; where it fails, training goes on without."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch as th

from sb3_iris import IRIS
from sb3_iris.compilation import Compiled, compiles
from sb3_iris.imagination import ImaginedGame
from sb3_iris.imagination_graph import CastWorldModel
from tests.presets import NETWORKS, FrameEnv, assert_equal, differing, frame_envs, parameters, tiny

ROOT = Path(__file__).parent.parent
WITHOUT_COMPILER = """
import warnings
import torch as th
from sb3_iris.compilation import Compiled

def double(x):
    return 2 * x.sin().cos()

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    compiled = Compiled(double)
    x = th.rand(100)
    for _ in range(2):
        assert th.equal(compiled(x), double(x))
(warning,) = [str(w.message) for w in caught if str(w.message).startswith("compile")]
print(warning)
"""


def test_auto_follows_the_device() -> None:
    assert not compiles("auto", th.device("cpu"))
    assert compiles(True, th.device("cpu"))
    assert not compiles(False, th.device("cuda"))


@pytest.mark.parametrize("value", ["always", None, "False", 2])
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"compile=.* must be 'auto', True or False"):
        tiny(frame_envs(), compile=value)


@pytest.mark.slow  # a minute of C++ compilation
def test_same_gradients() -> None:
    """Of the world model, with its option; patches are no network, which spares this test the minutes of another."""
    policy_kwargs = {"patch_tokenizer": True, "relative_positions": True, "dropout": 0.0}
    plain, compiled = (
        tiny(FrameEnv(), policy_kwargs, compile=compile, final_training_epochs=0).learn(4) for compile in (False, True)
    )
    chosen = compiled._compiled["world_model"]._chosen
    assert chosen is not None and chosen != compiled.policy.world_model.loss
    # After one step Adam's first moments are the gradients times a tenth
    moments = {name: value for name, value in parameters(plain).items() if "world_model" in name and "exp_avg" in name}
    assert sum(bool(value.any()) for value in moments.values()) > 20
    for name, value in moments.items():
        th.testing.assert_close(parameters(compiled)[name], value, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_train_their_own_networks(copied: Callable[[IRIS], IRIS]) -> None:
    model = tiny(FrameEnv(), {"patch_tokenizer": True}, compile=True).learn(8)
    model.env = None
    before = parameters(model)
    twin = copied(model)
    twin.set_env(FrameEnv())
    twin.learn(8, reset_num_timesteps=False)
    assert differing(before, parameters(twin)) >= set(NETWORKS[1:])
    assert_equal(parameters(model), before)


def test_goes_on_without_a_compiler(tmp_path: Path) -> None:
    env = {**os.environ, "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    result = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("compile: torch.compile failed for double, which goes on without, as with compile=False: ")


def test_errors_of_the_function_itself() -> None:
    def faulty(x: th.Tensor) -> th.Tensor:
        raise KeyError("the function's own")

    with pytest.raises(KeyError, match="the function's own"):
        Compiled(faulty)(th.zeros(1))


def test_networks_may_be_replaced() -> None:
    """Losses are those of the networks that a model has now."""
    model, other = (tiny(FrameEnv(), seed=seed).learn(4) for seed in (0, 1))
    model.policy = other.policy
    before = parameters(model)
    model.learn(8, reset_num_timesteps=False)
    assert differing(before, parameters(model)) >= set(NETWORKS)


@pytest.mark.parametrize("dtype", [None, th.bfloat16])
@th.no_grad()
def test_cast_world_model(dtype: th.dtype | None) -> None:
    """It predicts what the original does under autocast, with the weights that the original has by then."""
    model = tiny(FrameEnv(), {"n_layers": 2, "relative_positions": True})
    original = model.policy.world_model
    cast = CastWorldModel(original, dtype, compile=False)
    tokens, actions = th.randint(16, (3, 4)), th.randint(3, (3,))
    for _ in range(2):
        for parameter in original.parameters():
            parameter.add_(0.3 * th.randn_like(parameter))
        with th.autocast("cpu", dtype, enabled=dtype is not None):
            logits = [
                world_model.step_action(tokens, actions, world_model.make_cache())
                for world_model in (original, cast.refresh())
            ]
        for plain, ours in zip(*logits, strict=True):
            assert plain.std() > 0.1
            assert th.equal(ours, plain)


def test_imagination_does_without_kernels_that_do_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sb3_iris.imagination_kernels", None)  # as if it could not be imported
    world_model = tiny(FrameEnv()).policy.world_model
    with pytest.warns(
        UserWarning, match="does without the kernels of sb3_iris, as they do not work here: .*imagination_kernels"
    ):
        cast = CastWorldModel(world_model, th.bfloat16, compile=True)
    assert cast.game is ImaginedGame
    assert all(isinstance(block.before_attention, Compiled) for block in cast.world_model.transformer.blocks)
