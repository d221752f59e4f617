"""Numbers that are not finite stop a run before a checkpoint holds them; a collapse is warned of once; memory is counted."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback

from sb3_iris import IRIS, RunCheckpointCallback, training_health, validation
from sb3_iris.buffers import SequenceReplayBuffer
from sb3_iris.checkpoint_folder import find_checkpoints
from sb3_iris.training_health import TrainingWarnings
from tests.presets import NETWORKS, FrameEnv, GradientSteps, frame_envs, parameters, tiny

ROOT = Path(__file__).parent.parent


def poison(model: IRIS, network: str, at: int, with_gradient_only: bool = False) -> None:
    """Spoil a network before its gradient step of this number, counted from 1 over the whole run."""
    n_steps = 0
    parameter = next(getattr(model.policy, network).parameters())

    def before_backward(gradient: th.Tensor) -> th.Tensor:
        nonlocal n_steps
        n_steps += 1
        if n_steps == at:
            return gradient * float("nan")
        return gradient

    if with_gradient_only:
        parameter.register_hook(before_backward)
    else:

        def spoil(*_: object) -> None:
            nonlocal n_steps
            n_steps += 1
            if n_steps == at - 1:
                parameter.data.fill_(float("inf"))

        getattr(model.policy, f"{network}_optimizer").register_step_post_hook(spoil)


@pytest.mark.parametrize("with_gradient_only", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_not_finite(tmp_path, network, with_gradient_only):
    """The error names network, term and step; on disk is what was before. Gradient step 8 is the second of the third phase."""
    model = tiny(FrameEnv(), **{f"{name}_gradient_steps": 3 for name in NETWORKS})
    poison(model, network, 8, with_gradient_only)
    term = "grad_norm" if with_gradient_only else r"\w+"
    match = rf"^{network}: {term} is (nan|-?inf) at gradient step 2 of 3 in the training phase after 12 env steps"
    with pytest.raises(FloatingPointError, match=match) as error:
        model.learn(40, RunCheckpointCallback(4, tmp_path))
    if not with_gradient_only:
        assert f"{network}: grad_norm" not in str(error.value) and f"{network}: loss" not in str(error.value)
    before = {path.name for path in tmp_path.rglob("*")}
    with pytest.raises(FloatingPointError, match=rf"policy\.{network}.*is not finite"):
        model.save_checkpoint(tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} == before and len(find_checkpoints(tmp_path)) == 2
    resumed = IRIS.resume(tmp_path, FrameEnv(), device="cpu")
    assert resumed.num_timesteps == 12
    assert all(th.isfinite(value).all() for value in parameters(resumed).values() if value.is_floating_point())
    assert resumed.learn(40).num_timesteps == 40


def test_finite_runs_are_left_alone():
    """The checks neither draw nor change anything: as many gradient steps as ever."""
    model = tiny(FrameEnv())
    steps = GradientSteps(model)
    model.learn(12)
    assert len(steps.names) == 3 * (3 + 1)


def test_dead_codebook_is_warned_of_once():
    model = tiny(FrameEnv(), world_model_gradient_steps=0, actor_critic_gradient_steps=0)
    model.policy.tokenizer.quantizer.codebook.data[1:] = 1e6  # nobody's nearest
    with pytest.warns(UserWarning, match=r"The codebook is dead.*one code for everything.*robust_tokenizer=True") as caught:
        model.learn(20)
    assert sum("codebook" in str(warning.message) for warning in caught) == 1


def one_code_per_position(env: gym.Env) -> IRIS:
    """A model whose frames all have the same tokens, one of its own at each position, as the zeros at their borders tell."""
    model = tiny(env, learning_rate=0.0)
    tokenizer = model.policy.tokenizer
    first = tokenizer.encoder[0]
    assert isinstance(first, th.nn.Conv2d)
    first.weight.data.zero_()
    z = tokenizer.encoder(th.zeros(1, 3, 8, 8)).flatten(2)[0].t()
    tokenizer.quantizer.codebook.data[: len(z)] = z
    assert sorted(tokenizer.encode(th.rand(1, 3, 8, 8))[0].tolist()) == [0, 1, 2, 3]
    return model


def test_same_tokens_for_all_frames_are_warned_of_once():
    """Perplexity is high, as there are as many codes as positions."""
    model = one_code_per_position(FrameEnv())
    with pytest.warns(UserWarning, match=r"tells no frames apart.*\(varying_positions 0\.000\).*perplexity 4\.0") as caught:
        model.learn(20)
    assert sum("codes" in str(warning.message) for warning in caught) == 1


def test_same_tokens_for_a_frame_that_stays_the_same():
    class Still(FrameEnv):
        def _frame(self):
            return np.full((8, 8, 3), 7, dtype=np.uint8)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(codebook|tells no frames apart)")
        one_code_per_position(Still()).learn(20)


def test_a_collapse_that_passes_is_not_warned_of():
    """Not before the third phase in a row, of which one in between begins anew."""
    model, look = tiny(FrameEnv()), TrainingWarnings().look
    same = {"tokenizer/codebook_perplexity": 4.0, "tokenizer/varying_positions": 0.0, "tokenizer/moving_error": 0.1}
    dead = {**same, "tokenizer/codebook_perplexity": 1.0}
    alive = {**same, "tokenizer/varying_positions": 0.25}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for logged in (dead, same, alive, same, dead, alive, same, same):
            look("tokenizer", logged, model)
    with pytest.warns(UserWarning, match="tells no frames apart"):
        look("tokenizer", same, model)


def test_robust_tokenizers_get_other_advice():
    model = tiny(FrameEnv(), policy_kwargs={"robust_tokenizer": True})
    health, logged = TrainingWarnings(), {"codebook_perplexity": 1.0, "varying_positions": 0.0, "moving_error": 0.1}
    with pytest.warns(UserWarning, match=r"codebook is dead.*start anew with a smaller learning_rate or"):
        for _ in range(3):
            health.look("tokenizer", {f"tokenizer/{name}": value for name, value in logged.items()}, model)


def test_full_codebook_of_patches_is_warned_of_once():
    model = tiny(FrameEnv(), policy_kwargs={"patch_tokenizer": True, "codebook_size": 3})
    with pytest.warns(UserWarning, match=r"more than codebook_size=3 patches.*patch_tokenizer=False") as caught:
        model.learn(40)
    assert sum("codebook" in str(warning.message) for warning in caught) == 1


def test_full_codebook_that_loses_what_hardly_differs_is_warned_of():
    """Which is nothing that moves, by the log."""
    model = tiny(FrameEnv(), policy_kwargs={"patch_tokenizer": True, "codebook_size": 3})
    logged = {"tokenizer/n_patches": 3.0, "tokenizer/moving_error": 0.0, "tokenizer/loss": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model._training_warnings.look("tokenizer", logged, model)
        model._training_warnings.look("tokenizer", {**logged, "tokenizer/n_patches": 2.0, "tokenizer/loss": 0.001}, model)
    with pytest.warns(UserWarning, match="codebook is full"):
        model._training_warnings.look("tokenizer", {**logged, "tokenizer/loss": 0.001}, model)


def test_policy_without_entropy_is_warned_of_once():
    model = tiny(FrameEnv(), tokenizer_gradient_steps=0, world_model_gradient_steps=0)
    model.policy.actor_critic.actor.bias.data[0] = 100.0
    with pytest.warns(UserWarning, match=r"policy has no entropy left.*larger ent_coef") as caught:
        model.learn(20)
    assert sum("entropy" in str(warning.message) for warning in caught) == 1


class Given(FrameEnv):
    """Gives these rewards in turn, and no others."""

    def __init__(self, *given: float) -> None:
        super().__init__()
        self.given = given

    def step(self, action):
        obs, _, terminated, truncated, info = super().step(action)
        return obs, self.given[self.n_steps % len(self.given)], terminated, truncated, info


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((-0.01, -0.01, 0.99), "-0.01 and 0.99"),  # the cost of a step
        ((0.0, 0.1, 1.0), "0.1 and 1"),  # shaped
        ((-1.0, 100.0, 0.0), "-1 and 100"),
        ((-1.0, 1.0, 0.0), None),
        ((0.0, 10.0, 200.0), None),  # scores
        ((-3.0, -40.0), None),
        ((0.0, 0.5), None),
        ((0.0, 0.6, 1.0), None),
        ((0.0,), None),
    ],
)
def test_rewards_of_which_only_signs_count_are_warned_of_once(given, words):
    model = tiny(Given(*given))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(20)
    said = [str(warning.message) for warning in caught if "rewards of different size" in str(warning.message)]
    assert len(said) == (words is not None)
    assert words is None or f"such as {words}, but IRIS learns their signs only" in said[0]


def said_of(model: IRIS, *calls: int, reset_num_timesteps: bool = True) -> list[str]:
    """Warnings of calls of ``learn`` with so many steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n_steps in calls:
            model.learn(n_steps, reset_num_timesteps=reset_num_timesteps)
    return [str(warning.message) for warning in caught]


def test_calls_that_end_before_training_are_warned_of_once():
    starts = {"tokenizer_learning_starts": 10, "world_model_learning_starts": 11, "actor_critic_learning_starts": 30}
    expected = (
        "This call of learn ends at step 10, before world_model_learning_starts=11, actor_critic_learning_starts=30: "
        "world_model, actor_critic will not be trained in it"
    )
    said = said_of(tiny(FrameEnv(), **starts), 10, 10)
    assert sum(expected in message for message in said) == sum("This call of learn ends" in message for message in said) == 1
    said = said_of(tiny(FrameEnv(), **starts), 10, 20, reset_num_timesteps=False)
    assert sum("This call of learn ends" in message for message in said) == 1
    together = tiny(frame_envs(8), **{**starts, "actor_critic_learning_starts": 16})  # which take 16 steps for 10
    assert not any("This call of learn ends" in message for message in said_of(together, 10))
    for fine in ({**starts, "actor_critic_gradient_steps": 0, "world_model_learning_starts": 10}, {}):
        assert not any("This call of learn ends" in message for message in said_of(tiny(FrameEnv(), **fine), 0, 10))


def test_more_final_phases_than_others_are_warned_of_once():
    expected = (
        r"final_training_epochs=4 training phases follow the last step of this call of learn, more than the 3 of its 12 steps"
    )
    said = said_of(tiny(FrameEnv(), final_training_epochs=4), 12, 8)
    assert sum(expected in message for message in said) == 1
    assert sum("final_training_epochs" in message for message in said) == 1
    said = said_of(tiny(FrameEnv(), final_training_epochs=4), 16, 12, reset_num_timesteps=False)  # the second call is short
    assert sum(expected in message for message in said) == sum("final_training_epochs" in message for message in said) == 1
    late = {f"{network}_learning_starts": 100 for network in NETWORKS}
    for fine in ({"final_training_epochs": 3}, {"final_training_epochs": 0}, {"final_training_epochs": 4, **late}):
        assert not any("final_training_epochs" in message for message in said_of(tiny(FrameEnv(), **fine), 12))


def test_going_on_without_what_was_replayed_is_warned_of_once(tmp_path):
    expected = "The replay buffer is empty, though 20 steps were taken before"
    tiny(FrameEnv()).learn(20).save(tmp_path / "model")

    def loaded(**kwargs: Any) -> IRIS:
        return IRIS.load(tmp_path / "model", FrameEnv(), device="cpu", **kwargs)

    said = said_of(loaded(), 8, 8, reset_num_timesteps=False)
    assert sum(expected in message for message in said) == sum("buffer is empty" in message for message in said) == 1
    assert not any("buffer is empty" in message for message in said_of(loaded(), 8))  # starts count from zero
    late = {f"{network}_learning_starts": 100 for network in NETWORKS}
    assert not any("buffer is empty" in message for message in said_of(loaded(**late), 8, reset_num_timesteps=False))
    assert not any("buffer is empty" in message for message in said_of(tiny(FrameEnv()), 20, 8, reset_num_timesteps=False))


def test_a_call_taken_up_near_its_end_is_no_short_one(tmp_path):
    class Interrupt(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 10:
                raise KeyboardInterrupt
            return True

    model = tiny(FrameEnv(), final_training_epochs=3)
    with pytest.raises(KeyboardInterrupt):
        model.learn(12, [RunCheckpointCallback(4, tmp_path), Interrupt()])
    resumed = IRIS.resume(tmp_path, FrameEnv(), device="cpu")
    assert resumed.num_timesteps == 8
    assert not any("final_training_epochs" in message for message in said_of(resumed, 12))
    assert resumed.num_timesteps == 12


def test_a_policy_trained_in_noise_is_warned_of_once():
    late = {"world_model_learning_starts": 100}
    expected = "The actor-critic is trained in a game that is noise, as the world model had no training"
    assert sum(expected in message for message in said_of(tiny(FrameEnv(), **late), 20)) == 1
    both = said_of(tiny(FrameEnv(), **late, tokenizer_learning_starts=100), 20)
    assert sum("noise, as the tokenizer and the world model had" in message for message in both) == 1
    assert not any("noise" in message for message in said_of(tiny(FrameEnv()), 20))


def test_days_are_said_once(monkeypatch):
    monkeypatch.setattr(training_health, "projected_days", lambda model: 3.2)
    said = said_of(tiny(FrameEnv()), 4, 4)
    assert sum("would take about 3 days on this CPU" in message for message in said) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only there PyTorch's threads wait by spinning")
def test_more_threads_than_cores_are_warned_of_once():
    """In a real process of two threads that share a core; all its phases are then long enough."""
    code = """if True:
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        from sb3_iris import training_health
        from tests.presets import FrameEnv, tiny
        training_health.LONG_ENOUGH = 0.0
        tiny(FrameEnv()).learn(12)
    """
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for n_threads, n_warnings in ((1, 0), (2, 1)):
        env["OMP_NUM_THREADS"] = str(n_threads)
        result = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
        assert result.stderr.count("PyTorch has 2 threads here") == n_warnings, result.stderr
    assert "torch.set_num_threads(1), or start with OMP_NUM_THREADS=1" in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only there PyTorch's threads wait by spinning")
def test_which_shares_of_the_cores_are_warned_of(monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(th, "get_num_threads", lambda: 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrainingWarnings().look_at_threads(10.0, 65.0)
        TrainingWarnings().look_at_threads(4.0, 4.0)
    with pytest.warns(UserWarning, match=r"8 threads here, but only 6\.0 cores to itself.*OMP_NUM_THREADS=6 "):
        TrainingWarnings().look_at_threads(10.0, 59.9)
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrainingWarnings().look_at_threads(10.0, 59.9)


def test_no_warning_without_reason():
    model = tiny(FrameEnv(), policy_kwargs={"robust_tokenizer": True})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(codebook|entropy)")
        model.learn(12)


# --- Memory --------------------------------------------------------------------------------------------------------------


def test_more_memory_than_the_machine_has():
    in_all, _ = validation.machine_memory()
    rows = int(in_all // (3 * 64 * 64)) + 1
    with pytest.raises(
        ValueError, match=rf"buffer_size={rows} takes [\d.]+ GB of memory.*this machine has [\d.]+ GB: make it at"
    ):
        tiny(FrameEnv(), buffer_size=rows, policy_kwargs={"image_size": 64})
    tiny(FrameEnv(), buffer_size=rows // 1000, policy_kwargs={"image_size": 64})


def test_share_of_the_machine(monkeypatch):
    """What is free now is only warned of; several environments share the size."""
    monkeypatch.setattr(validation, "machine_memory", lambda: (100_000.0, 50_000.0))
    with pytest.warns(UserWarning, match=r"of which 0\.00 GB are free now"):
        tiny(FrameEnv(), buffer_size=400)
    with pytest.raises(ValueError, match="buffer_size=500"):
        tiny(FrameEnv(), buffer_size=500)
    with pytest.raises(ValueError, match="buffer_size=500"):
        tiny(frame_envs(5), buffer_size=500)


def test_a_model_is_played_where_it_could_not_be_trained(monkeypatch, tmp_path):
    model = tiny(FrameEnv(), buffer_size=500).learn(8)
    observations = model.get_env().reset()
    expected, _ = model.predict(observations, deterministic=True)
    model.save(tmp_path / "model")
    monkeypatch.setattr(validation, "machine_memory", lambda: (100_000.0, 100_000.0))
    loaded = IRIS.load(tmp_path / "model", device="cpu")
    assert loaded.predict(observations, deterministic=True)[0] == expected
    loaded.set_env(FrameEnv())
    with pytest.raises(ValueError, match="buffer_size=500"):
        loaded.learn(4)
    with pytest.raises(ValueError, match=r"buffer_size=500.*which load takes too.*load the model without env"):
        IRIS.load(tmp_path / "model", FrameEnv(), device="cpu")
    assert IRIS.load(tmp_path / "model", FrameEnv(), device="cpu", buffer_size=400).learn(4).replay_buffer.size() == 4


@pytest.mark.parametrize(
    "groups, expected",
    [
        ({"proc": "0::/job", "job/memory.max": "5000000"}, 5e6),
        ({"proc": "0::/job", "job/memory.max": "max"}, None),
        ({"proc": "4:memory:/job", "memory/job/memory.limit_in_bytes": "6000000"}, 6e6),
        ({"proc": "1:cpu:/", "memory.max": "7000000"}, 7e6),
        ({"proc": "nonsense"}, None),
        ({}, None),
    ],
)
def test_limits_of_control_groups(tmp_path, monkeypatch, groups, expected):
    """Containers and batch systems allow less than the machine has, in the files of either version of control groups."""

    class Redirected(type(tmp_path)):  # type: ignore[misc]
        def __new__(cls, *parts):
            first = str(parts[0])
            if first.startswith("/sys/fs/cgroup"):
                parts = (str(tmp_path / "groups"), *parts[1:])
            elif first == "/proc/self/cgroup":
                parts = (str(tmp_path / "proc"),)
            return type(tmp_path)(*parts)

    for name, content in groups.items():
        path = tmp_path / ("proc" if name == "proc" else f"groups/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.setattr(validation, "Path", Redirected)
    found, _ = validation.machine_memory()
    without = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    assert found == (expected if expected is not None else without)


def test_memory_of_the_papers_buffer():
    """100,000 steps of 64x64 RGB: 1.3 GB in all, frames and everything beside them; the tokens are cached on top."""
    buffer = SequenceReplayBuffer(100_000, spaces.Box(0, 255, (3, 64, 64), np.uint8), spaces.Discrete(6), "cpu")
    assert not any(isinstance(value, np.ndarray) for value in vars(buffer).values())  # not before it is used
    buffer.allocate()
    arrays = [value for value in vars(buffer).values() if isinstance(value, np.ndarray)]
    assert len(arrays) == 6 and sum(array.nbytes for array in arrays) < 1.24e9
