"""
Checkpoints of the authors' program.

``data/reference_small.pt`` is one in their format, with random weights, and ``data/reference_small.npz`` holds what networks
with these weights make of given inputs. Other sizes are checked against ``TheirNetworks`` below.
"""

import io
import math
import pickle
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.envs import FakeImageEnv
from torch import nn
from torch.nn import functional as F

from sb3_iris import IRIS
from sb3_iris.actor_critic import actor_critic_loss, lambda_returns
from sb3_iris.imagination import ImaginedGame, imagine
from sb3_iris.type_aliases import ContextSamples, ImaginedTrajectory, LSTMState

DATA = Path(__file__).parent / "data"
TOLERANCE = 1e-4  # of the largest absolute value of an array

StateDict = dict[str, th.Tensor]

DEFAULT_SIZES: dict[str, Any] = {
    "image_size": 64,
    "codebook_size": 512,
    "codebook_dim": 512,
    "latent_channels": 512,
    "tokenizer_channels": 64,
    "channel_multipliers": (1, 1, 1, 1, 1),
    "n_res_blocks": 2,
    "attention_resolutions": (8, 16),
    "n_layers": 10,
    "embed_dim": 256,
    "lstm_hidden_size": 512,
}
SMALL_SIZES: dict[str, Any] = {
    **DEFAULT_SIZES,
    "codebook_size": 48,
    "codebook_dim": 24,
    "latent_channels": 24,
    "tokenizer_channels": 32,
    "n_res_blocks": 1,
    "n_layers": 3,
    "embed_dim": 48,
}
TINY_SIZES: dict[str, Any] = {
    "image_size": 16,
    "codebook_size": 9,
    "codebook_dim": 5,
    "latent_channels": 7,
    "tokenizer_channels": 32,
    "channel_multipliers": (1, 2, 2),
    "n_res_blocks": 3,
    "attention_resolutions": (4, 16),
    "n_layers": 2,
    "embed_dim": 15,
    "lstm_hidden_size": 6,
}
FEW_LAYERS: dict[str, Any] = {"n_res_blocks": 1, "attention_resolutions": (), "n_layers": 1}


def make_env(n_actions: int = 4) -> FakeImageEnv:
    return FakeImageEnv(action_dim=n_actions, screen_height=64, screen_width=64, n_channels=3, discrete=True)


def load(path: Any, n_heads: int = 2, n_actions: int = 4, **kwargs: Any) -> IRIS:
    kwargs = {"policy_kwargs": {"n_heads": n_heads}, "buffer_size": 100, "perceptual_loss": None, "device": "cpu", **kwargs}
    return IRIS.load_reference_checkpoint(path, make_env(n_actions), **kwargs)


def to_file(checkpoint: Any) -> io.BytesIO:
    file = io.BytesIO()
    th.save(checkpoint, file)
    file.seek(0)
    return file


def sizes_of(model: IRIS) -> dict[str, Any]:
    sizes = {name: tuple(value) if isinstance(value, list) else value for name, value in model.policy_kwargs.items()}
    assert sizes.pop("robust_tokenizer") is False and sizes.pop("actor_critic_input") == "frames"
    return sizes


def assert_agrees(actual: th.Tensor, expected: th.Tensor) -> None:
    th.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=TOLERANCE * expected.abs().max().item())


# --- The small checkpoint and what it does ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> IRIS:
    return load(DATA / "reference_small.pt")


@pytest.fixture(scope="module")
def arrays() -> StateDict:
    with np.load(DATA / "reference_small.npz") as file:
        return {name: th.as_tensor(file[name]) for name in file.files}


@pytest.fixture
def clear_gradients(model: IRIS) -> Iterator[None]:
    model.policy.zero_grad()
    yield
    model.policy.zero_grad()


def gradient_norm(*modules: nn.Module) -> th.Tensor:
    gradients = [p.grad for module in modules for p in module.parameters()]
    return th.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm()


def test_sizes(model: IRIS) -> None:
    assert sizes_of(model) == {**SMALL_SIZES, "n_heads": 2}
    assert model.sequence_length == 5


@th.no_grad()
def test_tokenizer(model: IRIS, arrays: StateDict) -> None:
    tokenizer = model.policy.tokenizer
    frames = model.policy.to_frames(arrays["in_obs"])
    assert_agrees(tokenizer.encoder(2 * frames.flatten(0, 1) - 1).unflatten(0, (3, 4)), arrays["z"])
    assert th.equal(tokenizer.encode(frames), arrays["tokens"])
    decoded = tokenizer.decoder(tokenizer.quantizer.lookup(arrays["tokens"].flatten(0, 1), (4, 4))).unflatten(0, (3, 4))
    assert_agrees((decoded + 1) / 2, arrays["rec"])
    assert_agrees(tokenizer.decode(arrays["tokens"]), arrays["rec"].clamp(0, 1))

    # how far the two nearest codes are apart
    distances = th.cdist(arrays["z"].flatten(3).transpose(2, 3).double(), tokenizer.quantizer.codebook.double()) ** 2
    nearest = distances.topk(2, largest=False).values
    assert_agrees(nearest[..., 1] - nearest[..., 0], arrays["token_margin"])


@pytest.mark.usefixtures("clear_gradients")
def test_tokenizer_loss(model: IRIS, arrays: StateDict) -> None:
    tokenizer = model.policy.tokenizer
    loss, logs = tokenizer.loss(model.policy.to_frames(arrays["in_obs"].flatten(0, 1)))
    assert_agrees(logs["reconstruction_loss"], arrays["tok_reconstruction_loss"])
    assert_agrees(logs["codebook_loss"] + logs["commitment_loss"], arrays["tok_commitment_loss"])  # theirs is the sum
    assert arrays["tok_perceptual_loss"] == 0 and "perceptual_loss" not in logs
    loss.backward()
    assert_agrees(gradient_norm(tokenizer), arrays["tok_grad_total"])
    assert_agrees(gradient_norm(tokenizer.quantizer), arrays["tok_grad_codebook"])
    # theirs have no part in the 1x1 convolutions beside the codebook
    assert_agrees(gradient_norm(*list(tokenizer.encoder)[:-1]), arrays["tok_grad_encoder"])
    assert_agrees(gradient_norm(*list(tokenizer.decoder)[1:]), arrays["tok_grad_decoder"])


@th.no_grad()
def test_world_model(model: IRIS, arrays: StateDict) -> None:
    output = model.policy.world_model(arrays["tokens"], arrays["in_actions"])
    assert_agrees(output.token_logits, arrays["wm_obs"])
    assert_agrees(output.reward_logits, arrays["wm_rewards"])
    assert_agrees(output.end_logits, arrays["wm_ends"])


@th.no_grad()
def test_world_model_with_cache(model: IRIS, arrays: StateDict) -> None:
    """The first frame at once, then one position at a time."""
    world_model, tokens, actions = model.policy.world_model, arrays["tokens"], arrays["in_actions"]
    x = th.cat([world_model.token_embedding(tokens), world_model.action_embedding(actions).unsqueeze(2)], dim=2).flatten(1, 2)
    x = x + world_model.position_embedding.weight[: x.shape[1]]
    cache = world_model.make_cache()
    features = th.cat([world_model.transformer(part, cache) for part in x.split([16] + 52 * [1], dim=1)], dim=1)
    positions = th.arange(68)
    assert_agrees(world_model.token_head(features[:, positions % 17 != 15]), arrays["kv_obs"])
    assert_agrees(world_model.reward_head(features[:, positions % 17 == 16]), arrays["kv_rewards"])
    assert_agrees(world_model.end_head(features[:, positions % 17 == 16]), arrays["kv_ends"])

    # and as imagination does it
    cache.reset()
    expected_tokens = arrays["kv_obs"].unflatten(1, (4, 16))  # a step's last ones are its action's
    unread = tokens[:, 0]
    for t in range(4):
        if t > 0:
            for k in range(15):
                assert_agrees(world_model.step_token(tokens[:, t, k], cache), expected_tokens[:, t, k])
            unread = tokens[:, t, 15:]
        reward_logits, end_logits, token_logits = world_model.step_action(unread, actions[:, t], cache)
        assert_agrees(reward_logits, arrays["kv_rewards"][:, t])
        assert_agrees(end_logits, arrays["kv_ends"][:, t])
        assert_agrees(token_logits, expected_tokens[:, t, 15])


@pytest.mark.usefixtures("clear_gradients")
def test_world_model_loss(model: IRIS, arrays: StateDict) -> None:
    loss, logs = model.policy.world_model.loss(
        arrays["tokens"], arrays["in_actions"], arrays["in_rewards"], arrays["in_ends"].bool(), arrays["in_mask_right"]
    )
    assert_agrees(logs["token_loss"], arrays["wm_loss_obs"])
    assert_agrees(logs["reward_loss"], arrays["wm_loss_rewards"])
    assert_agrees(logs["end_loss"], arrays["wm_loss_ends"])
    loss.backward()
    assert_agrees(gradient_norm(model.policy.world_model), arrays["wm_grad_total"])


@th.no_grad()
def test_actor_critic(model: IRIS, arrays: StateDict) -> None:
    actor_critic = model.policy.actor_critic
    state = actor_critic.initial_state(3)
    for t in range(4):
        logits, values, state = actor_critic(arrays["rec"][:, t].clamp(0, 1), state)
        assert_agrees(logits, arrays["ac_logits"][:, t])
        assert_agrees(values, arrays["ac_values"][:, t])
    assert_agrees(state.hidden, arrays["ac_h"])
    assert_agrees(state.cell, arrays["ac_c"])


def test_predict(model: IRIS, arrays: StateDict) -> None:
    """The same by way of SB3's interface, from observations."""
    state = None
    for t in range(4):
        actions, state = model.predict(arrays["in_obs"][:, t].numpy(), state, deterministic=True)
        assert actions.tolist() == arrays["ac_logits"][:, t].argmax(-1).tolist()
    assert state is not None
    assert_agrees(th.as_tensor(state[0][0]), arrays["ac_h"])
    assert_agrees(th.as_tensor(state[1][0]), arrays["ac_c"])


@th.no_grad()
def test_burn_in(model: IRIS, arrays: StateDict) -> None:
    frames = arrays["rec"].clamp(0, 1)
    state = model.policy.actor_critic.burn_in(frames[:, :-1], arrays["in_mask_left"][:, :-1])
    assert_agrees(state.hidden, arrays["burn_h"])
    assert_agrees(state.cell, arrays["burn_c"])
    output = model.policy.actor_critic(frames[:, -1], state)
    assert_agrees(output.logits, arrays["burn_logits"])
    assert_agrees(output.values, arrays["burn_values"])


@th.no_grad()
def test_imagination(model: IRIS, arrays: StateDict) -> None:
    """Greedy, and three steps beyond the context, so that the cache is restarted on the way."""
    policy = model.policy
    tokens: list[th.Tensor] = []

    class SpyGame(ImaginedGame):
        def step(self, actions: th.Tensor, predict_frame: bool = True) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
            result = super().step(actions, predict_frame)
            tokens.append(self.tokens)
            return result

    game = SpyGame(policy.observe, policy.world_model, temperature=0)
    horizon = model.sequence_length + 3
    tokens_before, mask_before = arrays["tokens"][:, :-1], arrays["in_mask_left"][:, :-1]
    contexts = ContextSamples(arrays["tokens"][:, -1], policy.observe(tokens_before), mask_before)
    trajectory = imagine(game, policy.actor_critic, contexts, horizon, temperature=0)
    assert th.equal(trajectory.actions, arrays["im_actions"])
    assert th.equal(trajectory.rewards, arrays["im_rewards"])
    assert th.equal(trajectory.ends, arrays["im_ends"])
    assert_agrees(trajectory.values, arrays["im_values"])
    assert_agrees(trajectory.logits, arrays["im_logits"])
    assert th.equal(th.stack(tokens[:-1], dim=1), arrays["im_tokens"])


def test_actor_critic_loss(arrays: StateDict) -> None:
    actions, rewards, ends, values, logits = (
        arrays[f"lam_{name}"] for name in ("actions", "rewards", "ends", "values", "logits")
    )
    # the last step's return is its value
    expected = th.cat([arrays["lam_returns"], values[:, -1:]], dim=1)[:, : rewards.shape[1]]
    assert_agrees(lambda_returns(rewards, values, ends, 0.995, 0.95), expected)
    loss, logs = actor_critic_loss(ImaginedTrajectory(actions, rewards, ends, values, logits), 0.995, 0.95, 0.001)
    assert_agrees(logs["policy_gradient_loss"], arrays["acl_loss_actions"])
    assert_agrees(logs["value_loss"], arrays["acl_loss_values"])
    assert_agrees(-0.001 * logs["entropy"], arrays["acl_loss_entropy"])
    assert_agrees(loss, arrays["acl_loss_actions"] + arrays["acl_loss_values"] + arrays["acl_loss_entropy"])


# --- Other sizes ------------------------------------------------------------------------------------------------------


class TheirNetworks:
    """
    Their networks as plain functions of named tensors, which are drawn at random when a function first asks for them.

    :param n_actions: Number of actions.
    :param sequence_length: Steps in the context.
    :param n_heads: Attention heads.
    :param sizes: The other sizes, by our names.
    """

    def __init__(self, n_actions: int, sequence_length: int, n_heads: int, **sizes: Any) -> None:
        self.n_actions, self.sequence_length, self.n_heads, self.sizes = n_actions, sequence_length, n_heads, sizes
        self.channels = [sizes["tokenizer_channels"] * multiplier for multiplier in sizes["channel_multipliers"]]
        self.grid = sizes["image_size"] >> (len(self.channels) - 1)
        self.n_positions = sequence_length * (self.grid**2 + 1)
        self.tensors: StateDict = {}

    def get(self, name: str, *shape: int, mean: float = 0.0) -> th.Tensor:
        if name not in self.tensors:
            self.tensors[name] = mean + th.randn(shape) / max(math.prod(shape[1:]), 10) ** 0.5
        assert self.tensors[name].shape == shape, (name, shape)
        return self.tensors[name]

    def conv(self, name: str, x: th.Tensor, channels: int, size: int = 3, stride: int = 1) -> th.Tensor:
        weight = self.get(f"{name}.weight", channels, x.shape[1], size, size)
        x = F.pad(x, (0, 1, 0, 1)) if stride == 2 else F.pad(x, 4 * (size // 2,))
        return F.conv2d(x, weight, self.get(f"{name}.bias", channels), stride)

    def linear(self, name: str, x: th.Tensor, dim: int) -> th.Tensor:
        return F.linear(x, self.get(f"{name}.weight", dim, x.shape[-1]), self.get(f"{name}.bias", dim))

    def group_norm(self, name: str, x: th.Tensor) -> th.Tensor:
        channels = x.shape[1]
        return F.group_norm(x, 32, self.get(f"{name}.weight", channels, mean=1), self.get(f"{name}.bias", channels), eps=1e-6)

    def layer_norm(self, name: str, x: th.Tensor) -> th.Tensor:
        dim = x.shape[-1]
        return F.layer_norm(x, (dim,), self.get(f"{name}.weight", dim, mean=1), self.get(f"{name}.bias", dim))

    def res_block(self, name: str, x: th.Tensor, channels: int) -> th.Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.group_norm(f"{name}.norm1", x)), channels)
        h = self.conv(f"{name}.conv2", F.silu(self.group_norm(f"{name}.norm2", h)), channels)
        return h + (x if x.shape[1] == channels else self.conv(f"{name}.nin_shortcut", x, channels, size=1))

    def spatial_attention(self, name: str, x: th.Tensor) -> th.Tensor:
        channels = x.shape[1]
        h = self.group_norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h, channels, size=1).flatten(2) for part in "qkv")  # (B, C, H * W)
        weights = (q.transpose(1, 2) @ k / channels**0.5).softmax(-1)
        return x + self.conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x), channels, size=1)

    def middle(self, name: str, x: th.Tensor) -> th.Tensor:
        x = self.res_block(f"{name}.block_1", x, x.shape[1])
        x = self.spatial_attention(f"{name}.attn_1", x)
        return self.res_block(f"{name}.block_2", x, x.shape[1])

    def level(self, name: str, x: th.Tensor, channels: int, n_blocks: int) -> th.Tensor:
        for i in range(n_blocks):
            x = self.res_block(f"{name}.block.{i}", x, channels)
            if x.shape[-1] in self.sizes["attention_resolutions"]:
                x = self.spatial_attention(f"{name}.attn.{i}", x)
        return x

    def encode(self, x: th.Tensor) -> th.Tensor:
        """Images in [-1, 1] to what is quantized."""
        x = self.conv("tokenizer.encoder.conv_in", x, self.sizes["tokenizer_channels"])
        for i, channels in enumerate(self.channels):
            x = self.level(f"tokenizer.encoder.down.{i}", x, channels, self.sizes["n_res_blocks"])
            if i < len(self.channels) - 1:
                x = self.conv(f"tokenizer.encoder.down.{i}.downsample.conv", x, channels, stride=2)
        x = self.group_norm("tokenizer.encoder.norm_out", self.middle("tokenizer.encoder.mid", x))
        x = self.conv("tokenizer.encoder.conv_out", F.silu(x), self.sizes["latent_channels"])
        return self.conv("tokenizer.pre_quant_conv", x, self.sizes["codebook_dim"], size=1)

    def decode(self, tokens: th.Tensor) -> th.Tensor:
        """Tokens (B, K) to images in [-1, 1]."""
        codebook = self.get("tokenizer.embedding.weight", self.sizes["codebook_size"], self.sizes["codebook_dim"])
        x = codebook[tokens].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        x = self.conv("tokenizer.post_quant_conv", x, self.sizes["latent_channels"], size=1)
        x = self.middle("tokenizer.decoder.mid", self.conv("tokenizer.decoder.conv_in", x, self.channels[-1]))
        for i, channels in reversed(list(enumerate(self.channels))):
            x = self.level(f"tokenizer.decoder.up.{i}", x, channels, self.sizes["n_res_blocks"] + 1)
            if i > 0:
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.conv(f"tokenizer.decoder.up.{i}.upsample.conv", x, channels)
        return self.conv("tokenizer.decoder.conv_out", F.silu(self.group_norm("tokenizer.decoder.norm_out", x)), 3)

    def world_model(self, tokens: th.Tensor, actions: th.Tensor) -> dict[str, th.Tensor]:
        """Features at all positions go through all three heads."""
        dim = self.sizes["embed_dim"]
        embedded_actions = self.get("world_model.embedder.embedding_tables.0.weight", self.n_actions, dim)[actions]
        embedded_tokens = self.get("world_model.embedder.embedding_tables.1.weight", self.sizes["codebook_size"], dim)[tokens]
        x = th.cat([embedded_tokens, embedded_actions.unsqueeze(2)], dim=2).flatten(1, 2)  # (B, T * (K + 1), D)
        length = x.shape[1]
        x = x + self.get("world_model.pos_emb.weight", self.n_positions, dim)[:length]
        future = th.ones(length, length, dtype=th.bool).triu(1)
        for i in range(self.sizes["n_layers"]):
            name = f"world_model.transformer.blocks.{i}"
            self.tensors[f"{name}.attn.mask"] = th.ones(self.n_positions, self.n_positions).tril()
            h = self.layer_norm(f"{name}.ln1", x)
            q, k, v = (
                self.linear(f"{name}.attn.{part}", h, dim).unflatten(2, (self.n_heads, -1)).transpose(1, 2)
                for part in ("query", "key", "value")
            )  # (B, nh, L, hd)
            weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(future, -math.inf).softmax(-1)
            x = x + self.linear(f"{name}.attn.proj", (weights @ v).transpose(1, 2).flatten(2), dim)
            h = self.linear(f"{name}.mlp.0", self.layer_norm(f"{name}.ln2", x), 4 * dim)
            x = x + self.linear(f"{name}.mlp.2", F.gelu(h), dim)
        x = self.layer_norm("world_model.transformer.ln_f", x)
        outputs = {}
        for name, n_classes, n_indices in (
            ("observations", self.sizes["codebook_size"], self.grid**2),
            ("rewards", 3, 1),
            ("ends", 2, 1),
        ):
            self.tensors[f"world_model.head_{name}.indices"] = th.arange(self.sequence_length * n_indices)
            h = self.linear(f"world_model.head_{name}.head_module.0", x, dim).relu()
            outputs[name] = self.linear(f"world_model.head_{name}.head_module.2", h, n_classes)
        return outputs

    def actor_critic(self, frames: th.Tensor, state: LSTMState) -> tuple[th.Tensor, th.Tensor]:
        """Action logits and values for images in [0, 1]."""
        x = 2 * frames - 1
        for i, channels in enumerate((32, 32, 64, 64)):
            x = F.max_pool2d(self.conv(f"actor_critic.conv{i + 1}", x, channels), 2).relu()
        x, dim = x.flatten(1), state.hidden.shape[1]
        names, shapes = ("weight_ih", "weight_hh", "bias_ih", "bias_hh"), ((x.shape[1],), (dim,), (), ())
        weights = [self.get(f"actor_critic.lstm.{n}", 4 * dim, *shape) for n, shape in zip(names, shapes, strict=True)]
        hidden, _ = th.lstm_cell(x, state, *weights)
        logits = self.linear("actor_critic.actor_linear", hidden, self.n_actions)
        return logits, self.linear("actor_critic.critic_linear", hidden, 1).squeeze(-1)


def inputs_for(theirs: TheirNetworks) -> tuple[th.Tensor, th.Tensor, th.Tensor, LSTMState]:
    """Frames, tokens, actions and an LSTM state."""
    side, dim = theirs.sizes["image_size"], theirs.sizes["lstm_hidden_size"]
    tokens = th.randint(theirs.sizes["codebook_size"], (2, 2, theirs.grid**2))
    state = LSTMState(th.randn(2, dim), th.randn(2, dim))
    return th.rand(2, 3, side, side), tokens, th.randint(theirs.n_actions, (2, 2)), state


@th.no_grad()
def make_checkpoint(theirs: TheirNetworks) -> StateDict:
    """All of their tensors: each is asked for once."""
    frames, tokens, actions, state = inputs_for(theirs)
    theirs.encode(frames)
    theirs.decode(tokens[:, 0])
    theirs.world_model(tokens, actions)
    theirs.actor_critic(frames, state)
    return theirs.tensors


def test_their_format() -> None:
    """What is made up here has the names and shapes of the real thing."""
    made_up = make_checkpoint(TheirNetworks(n_actions=4, sequence_length=5, n_heads=2, **SMALL_SIZES))
    real = th.load(DATA / "reference_small.pt", weights_only=True)
    shapes = {name: tensor.shape for name, tensor in real.items() if not name.startswith("tokenizer.lpips.")}
    assert {name: tensor.shape for name, tensor in made_up.items()} == shapes


def weights_of(checkpoint: StateDict) -> StateDict:
    return {name: tensor for name, tensor in checkpoint.items() if not name.endswith((".mask", ".indices"))}


@pytest.mark.parametrize(
    "n_actions, sequence_length, n_heads, sizes",
    [
        pytest.param(6, 20, 4, DEFAULT_SIZES, id="default"),
        pytest.param(4, 3, 5, TINY_SIZES, id="tiny"),
        pytest.param(
            2, 2, 1, {**TINY_SIZES, "image_size": 64, "channel_multipliers": (1, 1, 1, 1, 1, 2), **FEW_LAYERS}, id="six_levels"
        ),
        pytest.param(3, 2, 3, {**TINY_SIZES, "channel_multipliers": (2, 1), "attention_resolutions": (16,)}, id="two_levels"),
        pytest.param(3, 2, 3, {**TINY_SIZES, "channel_multipliers": (3,), **FEW_LAYERS}, id="one_level"),
    ],
)
@th.no_grad()
def test_other_sizes(n_actions: int, sequence_length: int, n_heads: int, sizes: dict[str, Any]) -> None:
    theirs = TheirNetworks(n_actions, sequence_length, n_heads, **sizes)
    checkpoint = make_checkpoint(theirs)
    lpips = {f"tokenizer.lpips.{name}": th.randn(2, 3) for name in ("net.slice1.0.weight", "lin0.model.1.weight")}
    model = load(to_file({**checkpoint, **lpips}), n_heads, n_actions)
    assert sizes_of(model) == {**sizes, "n_heads": n_heads}
    assert model.sequence_length == sequence_length

    policy = model.policy
    frames, tokens, actions, state = inputs_for(theirs)
    assert_agrees(policy.tokenizer.encoder(2 * frames - 1), theirs.encode(2 * frames - 1))
    assert_agrees(policy.tokenizer.decode(tokens[:, 0]), ((theirs.decode(tokens[:, 0]) + 1) / 2).clamp(0, 1))
    output, expected = policy.world_model(tokens, actions), theirs.world_model(tokens, actions)
    K = theirs.grid**2
    k = th.arange(2 * (K + 1)) % (K + 1)
    assert_agrees(output.token_logits, expected["observations"][:, k != K - 1])
    assert_agrees(output.reward_logits, expected["rewards"][:, k == K])
    assert_agrees(output.end_logits, expected["ends"][:, k == K])
    logits, values = theirs.actor_critic(frames, state)
    assert_agrees(policy.actor_critic(frames, state).logits, logits)
    assert_agrees(policy.actor_critic(frames, state).values, values)

    # and no number got lost or stands for another one
    numbers, expected_numbers = (
        th.cat([tensor.flatten() for tensor in tensors.values()]).sort().values
        for tensors in (policy.state_dict(), weights_of(checkpoint))
    )
    assert th.equal(numbers, expected_numbers)


# --- Files that are something else ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_checkpoint() -> StateDict:
    sizes = {**TINY_SIZES, **FEW_LAYERS, "channel_multipliers": (1, 2)}
    return make_checkpoint(TheirNetworks(n_actions=4, sequence_length=2, n_heads=3, **sizes))


def assert_refused(checkpoint: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        load(to_file(checkpoint), n_heads=3)


@pytest.mark.parametrize(
    "content", [b"", b"text", b"(a, b)", b"{}", b"\x80\x02.", b"PK\x03\x04", b"\x93NUMPY\x01\x00", bytes(range(256))]
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_pytorch_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "agent.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"agent\.pt'\) is not a PyTorch file of tensors"):
        load(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"agent\.pt"):
        load(tmp_path / "agent.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file(tiny_checkpoint: StateDict, kept: float, zipped: bool) -> None:
    file = io.BytesIO()
    th.save(tiny_checkpoint, file, _use_new_zipfile_serialization=zipped)
    content = file.getvalue()
    load(io.BytesIO(content), n_heads=3)
    with pytest.raises(ValueError, match="is not a PyTorch file of tensors"):
        load(io.BytesIO(content[: int(kept * len(content))]), n_heads=3)


@pytest.mark.parametrize(
    "save", [partial(pickle.dump, protocol=2), th.save, partial(th.save, _use_new_zipfile_serialization=False)]
)
def test_code_does_not_run(tmp_path: Path, tiny_checkpoint: StateDict, save: Callable[[Any, io.BytesIO], None]) -> None:
    marker = tmp_path / "marker"

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(marker), "w")

    pickle.loads(pickle.dumps(Code())).close()
    assert marker.exists()  # this is what happens to those who load it
    marker.unlink()
    file = io.BytesIO()
    save({**tiny_checkpoint, "code": Code()}, file)
    file.seek(0)
    with pytest.raises(ValueError, match="is not a PyTorch file of tensors"):
        load(file, n_heads=3)
    assert not marker.exists()


@pytest.mark.parametrize("content", [[th.zeros(2)], th.zeros(2), {"a": th.zeros(2), "b": 3}, {"model": {"a": th.zeros(2)}}])
def test_no_state_dict(content: Any) -> None:
    assert_refused(content, "holds no state dict of tensors")


@pytest.mark.parametrize("content", [{}, {"a": th.zeros(2)}, {3: th.zeros(2)}])
def test_another_state_dict(content: Any) -> None:
    assert_refused(content, r"is no checkpoint of the authors' program: 'tokenizer\.encoder\.conv_in\.weight' is missing")


def test_missing_tensor(tiny_checkpoint: StateDict) -> None:
    """Of each kind of tensor, the first one."""
    kinds: dict[str, str] = {}
    for name in weights_of(tiny_checkpoint):
        kinds.setdefault(re.sub(r"\d+", "#", name), name)
    assert len(kinds) > 90
    for name in kinds.values():
        assert_refused({n: tensor for n, tensor in tiny_checkpoint.items() if n != name}, "(?s)^path=.*(missing|Missing)")


@pytest.mark.parametrize("shape", [(), (1,), (0, 0)])
@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.encoder.conv_in.weight",
        "tokenizer.encoder.down.0.block.0.conv1.weight",
        "tokenizer.embedding.weight",
        "tokenizer.pre_quant_conv.weight",
        "world_model.embedder.embedding_tables.0.weight",
        "world_model.transformer.blocks.0.attn.query.weight",
        "world_model.head_rewards.indices",
        "world_model.head_observations.indices",
        "world_model.pos_emb.weight",
        "actor_critic.lstm.weight_hh",
    ],
)
def test_misshapen_tensor(tiny_checkpoint: StateDict, name: str, shape: tuple[int, ...]) -> None:
    assert_refused({**tiny_checkpoint, name: th.zeros(shape)}, "^path=|must be a whole number")


@pytest.mark.parametrize("name", ["tokenizer.encoder.down.0.attn.5.q.weight", "world_model.transformer.norm.bias", "epoch"])
def test_unknown_tensor(tiny_checkpoint: StateDict, name: str) -> None:
    """A network that leaves it out would load, but be another one."""
    assert_refused({**tiny_checkpoint, name: th.zeros(2)}, f"is no checkpoint of the authors' program: '{name}'")


def test_wrong_number_of_actions(tiny_checkpoint: StateDict) -> None:
    with pytest.raises(ValueError, match=r"is an agent of 4 actions, but env has Discrete\(6\)"):
        load(to_file(tiny_checkpoint), n_heads=3, n_actions=6)


def test_wrong_number_of_heads(tiny_checkpoint: StateDict) -> None:
    with pytest.raises(ValueError, match="n_heads=2 does not divide embed_dim=15"):
        load(to_file(tiny_checkpoint), n_heads=2)


def test_wrong_policy_kwargs(tiny_checkpoint: StateDict) -> None:
    with pytest.raises(ValueError, match=r"does not fit env or policy_kwargs=.*'lstm_hidden_size': 7"):
        load(to_file(tiny_checkpoint), policy_kwargs={"n_heads": 3, "lstm_hidden_size": 7})


def test_wrong_number_of_channels(tiny_checkpoint: StateDict) -> None:
    env = FakeImageEnv(action_dim=4, screen_height=16, screen_width=16, n_channels=1, discrete=True)
    with pytest.raises(ValueError, match=r"(?s)does not fit env .*tokenizer\.encoder\.0\.weight"):
        IRIS.load_reference_checkpoint(
            to_file(tiny_checkpoint), env, policy_kwargs={"n_heads": 3}, buffer_size=100, perceptual_loss=None
        )


def test_arguments_of_the_constructor() -> None:
    theirs = TheirNetworks(n_actions=4, sequence_length=2, n_heads=4, **{**TINY_SIZES, **FEW_LAYERS, "embed_dim": 16})
    model = load(to_file(make_checkpoint(theirs)), policy_kwargs=None, gamma=0.9)
    assert model.gamma == 0.9
    model = load(to_file(make_checkpoint(theirs)), policy_kwargs={"robust_tokenizer": "auto"})
    assert (
        model.policy_kwargs["robust_tokenizer"] is model.policy.tokenizer.robust is False
    )  # though it has no perceptual loss
    assert model.policy.world_model.transformer.n_heads == 4  # the paper's
