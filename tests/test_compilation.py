"""Training that torch.compile makes faster is the same training; where it fails, training goes on without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch as th

from sb3_iris.compilation import Compiled, compiles
from tests.presets import FrameEnv, frame_envs, parameters, tiny

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
    """Of the world model, with all of its options; patches are no network, which spares this test the minutes of another."""
    options = ("patch_tokenizer", "factored_positions", "relative_positions", "ignore_first_frame", "embed_codes")
    policy_kwargs = {**dict.fromkeys(options, True), "dropout": 0.0}
    plain, compiled = (
        tiny(FrameEnv(), policy_kwargs, compile=compile, final_training_epochs=0).learn(4) for compile in (False, True)
    )
    chosen = compiled._compute_loss["world_model"]._chosen  # type: ignore[attr-defined]
    assert chosen is not None and chosen != compiled.policy.world_model.loss
    # After one step Adam's first moments are the gradients times a tenth
    moments = {name: value for name, value in parameters(plain).items() if "world_model" in name and "exp_avg" in name}
    assert sum(bool(value.any()) for value in moments.values()) > 20
    for name, value in moments.items():
        th.testing.assert_close(parameters(compiled)[name], value, rtol=1e-4, atol=1e-7)


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
