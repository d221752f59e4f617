"""Training in bfloat16: what is cast, what is not, and that it is the same training within rounding."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_iris import IRIS
from sb3_iris.imagination import ImaginedGame
from sb3_iris.mixed_precision import autocast_dtype
from sb3_iris.tokenizer import Tokenizer
from sb3_iris.world_model import WorldModel
from tests.presets import assert_equal, decided, differing, frame_envs, parameters, tiny

CPU = th.device("cpu")


def bfloat16(enabled: bool = True) -> th.autocast:
    return th.autocast("cpu", th.bfloat16, enabled=enabled)


def gradients(network: nn.Module) -> th.Tensor:
    return th.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])


def relative_error(value: th.Tensor, expected: th.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def test_auto_follows_the_hardware_and_the_size() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert autocast_dtype("auto", CPU, 64) is None
    assert autocast_dtype("auto", CPU, 256) is (th.bfloat16 if {"avx512_bf16", "amx_bf16"} & set(flags) else None)
    assert autocast_dtype("bfloat16", CPU, 64) is th.bfloat16
    assert autocast_dtype(None, CPU, 256) is None


@pytest.mark.parametrize("amp", ["float16", "float32", True, th.bfloat16])
def test_other_types_are_refused(amp: object) -> None:
    with pytest.raises(ValueError, match=r"amp=.* must be 'auto', 'bfloat16' or None"):
        tiny(frame_envs(), amp=amp)


@pytest.mark.parametrize("robust", [False, True])
def test_tokenizer_loss_and_gradients(robust: bool) -> None:
    th.manual_seed(0)
    tokenizer = Tokenizer((3, 16, 16), 32, 16, 16, (1, 1, 1), 1, (), robust=robust)
    frames = th.rand(16, 3, 16, 16)
    results = []
    for enabled in (False, True):
        network = copy.deepcopy(tokenizer)
        th.manual_seed(1)  # robust training draws codes from the batch
        with bfloat16(enabled):
            loss, logs = network.loss(frames)
        loss.backward()
        assert all(value.dtype == th.float32 for value in logs.values())
        results.append((loss.detach(), gradients(network.decoder)))
    (loss, gradient), (cast_loss, cast_gradient) = results
    assert 0 < relative_error(cast_loss, loss) < 0.01
    assert 0 < relative_error(cast_gradient, gradient) < 0.2  # a few frames get other codes


def test_codes_are_compared_in_full_precision() -> None:
    th.manual_seed(0)
    tokenizer = Tokenizer((3, 16, 16), 512, 16, 16, (1, 1, 1), 1, ())
    z = th.randn(4, 16, 4, 4) / 512  # as close together as the codebook's entries are at the start
    with bfloat16():
        tokens = tokenizer.quantizer.nearest(z)
    assert th.equal(tokens, tokenizer.quantizer.nearest(z))


def test_world_model_loss_and_gradients() -> None:
    th.manual_seed(0)
    network = WorldModel(32, 4, 5, sequence_length=6, embed_dim=64, n_layers=2, n_heads=2, dropout=0.0)
    tokens, actions = th.randint(32, (8, 6, 5)), th.randint(4, (8, 6))
    rewards, mask = th.randint(-1, 2, (8, 6)).float(), th.ones(8, 6, dtype=th.bool)
    results = []
    for enabled in (False, True):
        network.zero_grad()
        with bfloat16(enabled):
            loss, logs = network.loss(tokens, actions, rewards, ~mask, mask)
        loss.backward()
        assert all(value.dtype == th.float32 for value in logs.values())
        results.append((loss.detach(), gradients(network)))
    (loss, gradient), (cast_loss, cast_gradient) = results
    assert 0 < relative_error(cast_loss, loss) < 0.01
    assert 0 < relative_error(cast_gradient, gradient) < 0.05


def test_game_by_full_passes() -> None:
    """What the game samples most likely from its cache is what whole passes in the same precision say, where that is clear."""
    th.manual_seed(0)
    K, B, horizon = 5, 16, 4
    network = WorldModel(32, 4, K, sequence_length=horizon + 1, embed_dim=64, n_layers=2, n_heads=2).eval()
    nn.init.normal_(network.token_embedding.weight)  # so that frames differ in what follows them
    frames, actions = [th.randint(32, (B, K))], th.randint(4, (B, horizon))
    with bfloat16():
        game = ImaginedGame(lambda tokens: tokens, network, temperature=0)
        game.reset(frames[0])
        for t in range(horizon):
            _, _, tokens = game.step(actions[:, t])
            assert tokens is not None
            frames.append(tokens)
        assert game.cache.memory[0].dtype == th.bfloat16
    padded = th.cat([actions, actions[:, :1]], dim=1)
    with th.no_grad():
        logits = network(th.stack(frames, dim=1), padded).token_logits[:, K - 1 : -1]  # float32; of all frames but the first
    sampled = th.stack(frames[1:], dim=1).flatten(1)
    two_best = logits.topk(2).values
    clear = two_best[..., 0] - two_best[..., 1] > 0.05 * logits.std()
    assert clear.float().mean() > 0.5
    assert th.equal(sampled[clear], logits.argmax(-1)[clear])


def test_actor_critic_is_left_in_full_precision() -> None:
    """Burn-in has no gradients; casts of weights that it left behind would take theirs from the steps that follow."""
    results = []
    for enabled in (False, True):
        actor_critic = decided(tiny(frame_envs())).policy.actor_critic
        frames = th.rand(3, 4, *(3, 8, 8), generator=th.Generator().manual_seed(0))
        with bfloat16(enabled):
            state = actor_critic.burn_in(frames[:, :3], th.ones(3, 3, dtype=th.bool))
            logits, values, _ = actor_critic(frames[:, 3], state)
        (logits.square().sum() + values.sum()).backward()
        results.append({name: parameter.grad for name, parameter in actor_critic.named_parameters()})
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in results[1].values())
    assert_equal(*results)


def test_learning() -> None:
    """All networks are trained, stay float32, and differ from those of float32; a small model's default is float32."""
    models: dict[str | None, IRIS] = {}
    for amp in ("auto", None, "bfloat16"):
        models[amp] = tiny(frame_envs(), amp=amp).learn(8)
    assert_equal(parameters(models["auto"]), parameters(models[None]))
    trained, plain = parameters(models["bfloat16"]), parameters(models[None])
    assert {"tokenizer", "world_model", "actor_critic"} <= differing(trained, plain)
    for name, value in trained.items():
        assert value.dtype in (th.float32, th.int64), name
        if "optimizer" not in name and value.dtype == th.float32:
            th.testing.assert_close(value, plain[name], atol=1e-3, rtol=0)  # Adam's few steps are of the learning rate, 1e-4


def test_collection_and_predict_are_in_full_precision() -> None:
    models = [decided(tiny(frame_envs(), amp=amp)) for amp in (None, "bfloat16")]
    observation = np.asarray(frame_envs().reset())
    logits = [
        model.policy.act(model._images(observation.transpose(0, 3, 1, 2)), model.policy.actor_critic.initial_state(1))[0]
        for model in models
    ]
    assert th.equal(*logits)


def test_saved_with_the_model_but_resolved_anew(tmp_path: Path) -> None:
    tiny(frame_envs(), amp="bfloat16").save(tmp_path / "model")
    assert IRIS.load(tmp_path / "model")._autocast_dtype is th.bfloat16
    assert IRIS.load(tmp_path / "model", amp=None)._autocast_dtype is None
