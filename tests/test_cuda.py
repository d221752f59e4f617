"""What is done in another way on a GPU, beside the plain way on the same GPU."""

import copy
import functools
import importlib
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_iris import IRIS
from sb3_iris.actor_critic import sample_categorical
from sb3_iris.imagination import ImaginedGame, imagine
from sb3_iris.imagination_graph import CastWorldModel, ImaginationGraph, capture
from sb3_iris.policies import CnnLstmPolicy
from sb3_iris.transformer import KVCache, Transformer
from sb3_iris.type_aliases import NETWORKS, ContextSamples, ImaginedTrajectory
from tests.presets import SIZES, FrameEnv, assert_equal, decided, parameters, tiny

pytestmark = pytest.mark.skipif(not th.cuda.is_available(), reason="torch.cuda.is_available() is False")


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions may else be computed in tf32, which rounds in the third digit."""
    monkeypatch.setattr(th.backends.cudnn, "allow_tf32", False)


def make(**kwargs: Any) -> IRIS:
    return tiny(FrameEnv(), **{"device": "cuda", "amp": None, "compile": False, **kwargs})


def strong(model: IRIS) -> IRIS:
    """With opinions strong enough that other frames lead to other actions."""
    model.policy.to("cpu")
    decided(model).policy.to("cuda")
    return model


def contexts(model: IRIS, batch_size: int = 5) -> ContextSamples:
    policy = model.policy
    tokens = th.randint(policy.tokenizer.codebook_size, (batch_size, 4, policy.tokenizer.tokens_per_frame), device="cuda")
    mask = th.rand(batch_size, 3, device="cuda") < 0.8
    return ContextSamples(tokens[:, -1], policy.observe(tokens[:, :-1]), mask)


def imagine_plainly(model: IRIS, given: ContextSamples, horizon: int) -> ImaginedTrajectory:
    game = ImaginedGame(model.policy.observe, model.policy.world_model)
    return imagine(game, model.policy.actor_critic, given, horizon)


def assert_same(ours: ImaginedTrajectory, plain: ImaginedTrajectory) -> None:
    for name in ("actions", "rewards", "ends"):
        assert th.equal(getattr(ours, name), getattr(plain, name)), name
    for name in ("values", "logits"):
        th.testing.assert_close(getattr(ours, name), getattr(plain, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("actor_critic_input", ["frames", "codes"])
@pytest.mark.parametrize("relative_positions", [False, True])
def test_graph_plays_as_plain_imagination_does(actor_critic_input: str, relative_positions: bool) -> None:
    """The same trajectories from the same random stream, also once weights, contexts, horizon and batch are others."""
    model = make(policy_kwargs={"actor_critic_input": actor_critic_input, "relative_positions": relative_positions})
    strong(model)
    graph = ImaginationGraph()
    actions: set[int] = set()
    for seed, (batch_size, horizon) in enumerate([(5, 6), (5, 6), (5, 9), (2, 9), (2, 9)]):
        with th.no_grad():
            for parameter in (*model.policy.world_model.parameters(), *model.policy.actor_critic.parameters()):
                parameter.add_(0.1 * th.randn_like(parameter))
        given = contexts(model, batch_size)
        th.manual_seed(seed)
        plain = imagine_plainly(model, given, horizon)
        afterwards = th.cuda.get_rng_state()
        actions |= set(plain.actions.unique().tolist())
        th.manual_seed(seed)
        assert_same(graph(model.policy, given, horizon, None, False), plain)
        assert th.equal(th.cuda.get_rng_state(), afterwards)
    assert len(actions) > 1


def test_gradients_of_the_graph() -> None:
    model = strong(make())
    given = contexts(model)
    actor_critic, graph = model.policy.actor_critic, ImaginationGraph()
    results = []
    for trajectory_of in (lambda: imagine_plainly(model, given, 6), lambda: graph(model.policy, given, 6, None, False)):
        th.manual_seed(0)
        trajectory = trajectory_of()
        loss = trajectory.values.square().sum() + trajectory.logits.square().sum()
        results.append(th.autograd.grad(loss, list(actor_critic.parameters())))
    for ours, plain in zip(results[1], results[0], strict=True):
        th.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
    assert all(parameter.grad is None for parameter in model.policy.world_model.parameters())


def agreement(model: IRIS, dtype: th.dtype | None, compile: bool) -> float:
    """Share of actions and rewards that are the same in the graph and in plain imagination."""
    given = contexts(model, 64)
    trajectories = []
    for in_graph in (False, True):
        th.manual_seed(0)
        with th.autocast("cuda", dtype, enabled=dtype is not None):
            if in_graph:
                trajectories.append(ImaginationGraph()(model.policy, given, 6, dtype, compile))
            else:
                trajectories.append(imagine_plainly(model, given, 6))
    plain, ours = trajectories
    return min(float((getattr(ours, name) == getattr(plain, name)).float().mean()) for name in ("actions", "rewards"))


@pytest.mark.parametrize("relative_positions", [False, True])
@pytest.mark.parametrize("dtype, compile", [(th.bfloat16, False), (None, True), (th.bfloat16, True)])
def test_rounding_otherwise_makes_few_other_games(
    dtype: th.dtype | None, compile: bool, relative_positions: bool, monkeypatch: Any
) -> None:
    model = strong(make(policy_kwargs={"relative_positions": relative_positions}))
    with th.no_grad():
        for parameter in model.policy.world_model.parameters():
            parameter.add_(0.3 * th.randn_like(parameter))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="compile:|Imagination goes on")
        assert agreement(model, dtype, compile) > 0.93
    monkeypatch.setattr(
        CastWorldModel,
        "refresh",
        lambda cast: cast.world_model.apply(lambda m: m.weight.zero_() if isinstance(m, nn.Linear) else None),
    )
    assert agreement(model, dtype, False) < 0.8


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("name", NETWORKS[:2])
def test_compiled_losses(name: str, robust: bool) -> None:
    kwargs = {"policy_kwargs": {"robust_tokenizer": robust, "relative_positions": robust, "dropout": 0.0}}
    model = make(**kwargs).learn(8)
    network = getattr(model.policy, name).train()
    given = copy.deepcopy(network.state_dict())
    runs = []
    for compile in (False, True):
        network.load_state_dict(given)
        model.compile = compile
        model.set_random_seed(0)
        losses: list[th.Tensor] = []
        for _ in range(5):  # from the third on some are replayed as CUDA graphs
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="compile:|Imagination goes on")
                loss, _ = getattr(model, f"_{name}_loss")()
            network.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            losses.append(loss.detach().clone())
            with th.no_grad():
                for parameter in network.parameters():
                    if parameter.grad is not None:
                        parameter -= 1e-3 * parameter.grad
        runs.append((th.stack(losses), copy.deepcopy(network.state_dict())))
    (plain_losses, plain), (compiled_losses, compiled) = runs
    assert (plain_losses.diff() != 0).all()
    th.testing.assert_close(compiled_losses, plain_losses, rtol=1e-3, atol=1e-4)
    for key, value in plain.items():
        th.testing.assert_close(compiled[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("compile", [False, "auto"])
def test_whole_run(tmp_path, compile: bool | str) -> None:
    """With all defaults of a GPU, saved, loaded and continued there and on the CPU."""
    model = make(compile=compile, amp="auto", **{f"{network}_gradient_steps": 4 for network in NETWORKS}).learn(24)
    before = parameters(model)
    model.learn(12, reset_num_timesteps=False)
    assert {name.split(".")[0] for name in before if not th.equal(before[name], parameters(model)[name])} >= set(NETWORKS)
    model.save(tmp_path / "model")
    for device in ("cuda", "cpu"):
        loaded = IRIS.load(tmp_path / "model", env=FrameEnv(), device=device)
        assert_equal(parameters(loaded), parameters(model))
        assert loaded.learn(8, reset_num_timesteps=False).num_timesteps == 44
    model.save_checkpoint(tmp_path / "checkpoints")
    resumed = IRIS.resume(tmp_path / "checkpoints", FrameEnv(), device="cuda")
    assert_equal(parameters(resumed), parameters(model))


@pytest.mark.parametrize("amp", [None, "bfloat16"])
def test_same_seed_same_run(amp: str | None) -> None:
    with_graph = [make(compile="auto", amp=amp, seed=3).learn(24) for _ in range(2)]
    assert np.array_equal(with_graph[0].replay_buffer.actions, with_graph[1].replay_buffer.actions)
    for name, ours in parameters(with_graph[0]).items():
        th.testing.assert_close(parameters(with_graph[1])[name], ours, rtol=1e-3, atol=1e-3)


def blocks_of(embed_dim: int, biased: bool) -> tuple[Transformer, Transformer, list[th.Tensor] | None]:
    """Blocks with large random weights, the same made of kernels, and attention biases for 400 positions."""
    plain = Transformer(embed_dim, 2, 4, 0.0).to("cuda").eval().requires_grad_(False)
    for parameter in plain.parameters():
        parameter.add_(th.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.2 * embed_dim**-0.5))
    ours = copy.deepcopy(plain)
    for module in ours.modules():
        if isinstance(module, nn.Linear):
            module.to(th.bfloat16)
    for block in ours.blocks:
        block.forward = functools.partial(kernels().block_forward, block)
    later = th.ones(400, 400, dtype=th.bool, device="cuda").triu(1)
    biases = [th.randn(4, 400, 400, device="cuda").masked_fill(later, -math.inf) for _ in range(2)] if biased else None
    return plain, ours, biases


def kernels() -> Any:
    pytest.importorskip("triton", reason="PyTorch has no Triton here")
    return importlib.import_module("sb3_iris.imagination_kernels")


@pytest.mark.parametrize("embed_dim, biased", [(256, False), (256, True), (64, True), (48, False)])
def test_kernels_of_blocks(embed_dim: int, biased: bool) -> None:
    """They err no more than autocast does, after any number of positions."""
    plain, ours, biases = blocks_of(embed_dim, biased)
    caches = [KVCache(400) for _ in range(3)]
    for n in (17, 1, 1, 30, 2, 1, 220, 1, 1, 20, 1, 2):
        x = th.randn(7, n, embed_dim, device="cuda")
        exact = plain(x, caches[0], biases)
        with th.autocast("cuda", th.bfloat16):
            rounded = plain(x, caches[1], biases)
        errors = [float((y - exact).norm() / exact.norm()) for y in (ours(x, caches[2], biases), rounded)]
        assert errors[0] < 1.2 * errors[1] < 0.01, (n, errors)
    assert caches[2].length == 297


def test_kernels_that_begin_early_wait_for_what_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours, _ = blocks_of(256, False)
    inputs = [th.randn(64, n, 256, device="cuda") for n in (17, *[1] * 250)]

    @th.no_grad()
    def play() -> th.Tensor:
        cache = KVCache(400)
        return th.cat([ours(x, cache)[:, -1:] for x in inputs], dim=1)

    if not kernels()._starts_early(th.device("cuda")):
        pytest.skip("no kernel begins early on GPUs before Hopper, or with Triton before 3.4")
    graph, early = capture(play, th.device("cuda"))
    monkeypatch.setattr(kernels(), "_starts_early", lambda device: {})
    late = play()
    for _ in range(20):
        early.zero_()
        graph.replay()
        assert th.equal(early, late)


@pytest.mark.parametrize("n_classes", [2, 3, 512, 1000])
def test_kernel_that_samples(n_classes: int) -> None:
    logits = 3 * th.randn(5000, n_classes, device="cuda")
    samples = []
    for function in (kernels().sample_categorical, sample_categorical):
        th.manual_seed(0)
        samples.append(function(logits))
    assert (samples[0] == samples[1]).float().mean() > 0.999 and len(samples[0].unique()) > n_classes / 3


@pytest.mark.parametrize("dtype", [None, th.bfloat16])
def test_gradients_are_those_of_what_was_imagined(dtype: th.dtype | None) -> None:
    """Compiled and replayed as CUDA graphs: values and gradients of the plain pass, also once contexts and weights change."""
    model = strong(make())
    actor_critic, graph = model.policy.actor_critic, ImaginationGraph()
    for _ in range(4):
        with warnings.catch_warnings(), th.autocast("cuda", dtype, enabled=dtype is not None):
            warnings.filterwarnings("error", message="compile:|Imagination goes on")
            trajectory = graph(model.policy, contexts(model), 6, dtype, True)
            recording = graph._recording
            assert recording is not None
            results = []
            for logits, values in (
                (trajectory.logits, trajectory.values),
                actor_critic.unroll(recording.frames, recording.state),
            ):
                actor_critic.zero_grad()
                (logits.square().sum() + values.square().sum()).backward()
                grads = [parameter.grad.clone() for parameter in actor_critic.parameters() if parameter.grad is not None]
                results.append([logits.detach().clone(), values.detach().clone(), *grads])
        assert len(results[0]) == len(results[1]) == 2 + len(list(actor_critic.parameters()))
        for ours, plain in zip(results[0], results[1], strict=True):
            th.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
        with th.no_grad():
            for parameter in actor_critic.parameters():
                parameter.add_(0.1 * th.randn_like(parameter))


class WaitingPolicy(CnnLstmPolicy):
    """Asks the GPU for a number, which cannot be recorded."""

    def observe(self, tokens: th.Tensor) -> th.Tensor:
        assert int(tokens.max()) < self.tokenizer.codebook_size
        return super().observe(tokens)


def test_what_cannot_be_recorded_runs_plainly() -> None:
    kwargs: dict[str, Any] = {
        "device": "cuda",
        "perceptual_loss": None,
        "train_freq": 4,
        "final_training_epochs": 0,
        "compile": "auto",
    }
    for network in NETWORKS:
        kwargs |= {f"{network}_learning_starts": 4, f"{network}_gradient_steps": 1, f"{network}_batch_size": 3}
    model = IRIS(WaitingPolicy, FrameEnv(), policy_kwargs=SIZES, sequence_length=4, imagination_horizon=3, **kwargs)
    with pytest.warns(UserWarning, match="Imagination goes on without a CUDA graph"):
        model.learn(8)
    before = parameters(model)
    model.learn(8, reset_num_timesteps=False)
    assert any(not th.equal(before[name], value) for name, value in parameters(model).items() if "actor_critic" in name)
