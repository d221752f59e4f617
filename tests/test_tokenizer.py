import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_iris.tokenizer import (
    Downsample,
    PatchTokenizer,
    ResidualBlock,
    SpatialSelfAttention,
    Tokenizer,
    VectorQuantizer,
    moving_error,
)


def make_tokenizer(image_shape: tuple[int, int, int] = (3, 16, 16), levels: int = 3, **kwargs: Any) -> Tokenizer:
    kwargs = {"codebook_size": 16, "codebook_dim": 6, "channels": 8, "n_res_blocks": 1, **kwargs}
    return Tokenizer(image_shape, channel_multipliers=(1,) * levels, **kwargs)


def make_stub(codebook: list[list[float]], robust: bool = False) -> Tokenizer:
    """A tokenizer of 1x2 images whose convolutions do nothing: frames are scaled, quantized and given back."""
    tokenizer = make_tokenizer((2, 1, 2), levels=1, codebook_size=len(codebook), codebook_dim=2, robust=robust)
    tokenizer.encoder = nn.Sequential()
    tokenizer.decoder = nn.Sequential()
    tokenizer.quantizer.codebook.data = th.tensor(codebook)
    return tokenizer


def test_number_of_parameters() -> None:
    tokenizer = Tokenizer((3, 64, 64))
    assert sum(p.numel() for p in tokenizer.parameters()) == 4_027_523
    assert tokenizer.tokens_per_frame == 16
    assert tokenizer.quantizer.codebook.shape == (512, 512)


@pytest.mark.parametrize(
    "image_shape, levels, grid",
    [
        ((3, 64, 64), 5, (4, 4)),
        ((1, 8, 8), 2, (4, 4)),
        ((4, 8, 8), 3, (2, 2)),
        ((12, 16, 16), 3, (4, 4)),
        ((3, 16, 16), 5, (1, 1)),
        ((3, 8, 24), 3, (2, 6)),
        ((1, 12, 4), 2, (6, 2)),
        ((3, 5, 7), 1, (5, 7)),
    ],
)
def test_round_trip(image_shape: tuple[int, int, int], levels: int, grid: tuple[int, int]) -> None:
    tokenizer = make_tokenizer(image_shape, levels, codebook_size=16)
    frames = th.rand(2, 3, *image_shape)
    tokens = tokenizer.encode(frames)
    assert tokens.shape == (2, 3, math.prod(grid)) == (2, 3, tokenizer.tokens_per_frame)
    assert tokens.dtype == th.int64
    assert tokens.min() >= 0 and tokens.max() < 16
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == frames.shape
    assert decoded.dtype == th.float32
    assert not decoded.requires_grad

    # other leading axes, the same frames
    assert th.equal(tokenizer.encode(frames.flatten(0, 1)), tokens.flatten(0, 1))
    assert th.equal(tokenizer.encode(frames[1, 2]), tokens[1, 2])
    th.testing.assert_close(tokenizer.decode(tokens[1, 2]), decoded[1, 2])
    assert tokenizer.decode(tokens[:, :0]).shape == (2, 0, *image_shape)
    assert tokenizer.encode(frames[:, :0]).shape == (2, 0, math.prod(grid))


@th.no_grad()
def test_ranges() -> None:
    """The networks work on [-1, 1], outside of them frames are in [0, 1]."""
    tokenizer = make_stub([[-1.0, -1.0], [-0.5, 0.25], [3.0, -7.0]])
    decoded = tokenizer.decode(th.tensor([[0, 1], [2, 0]]))
    expected = [[[[0.0, 0.25]], [[0.0, 0.625]]], [[[1.0, 0.0]], [[0.0, 0.0]]]]  # clamped
    assert decoded.tolist() == expected
    # (0, 0) is -1, -1 to the networks and (0.3, 0.6) is -0.4, 0.2
    assert tokenizer.encode(th.tensor([[[[0.0, 0.3]], [[0.0, 0.6]]]])).tolist() == [[0, 1]]


@pytest.mark.parametrize("height, width", [(1, 1), (2, 3), (3, 2), (4, 4)])
@th.no_grad()
def test_nearest_code_by_brute_force(height: int, width: int) -> None:
    quantizer = VectorQuantizer(codebook_size=20, codebook_dim=4)
    quantizer.codebook.copy_(th.randn(20, 4))
    z = th.randn(3, 4, height, width)
    tokens = quantizer.nearest(z)
    assert tokens.shape == (3, height * width)
    codebook = quantizer.codebook.numpy()
    for b, i, j in itertools.product(range(3), range(height), range(width)):
        distances = [np.linalg.norm(z[b, :, i, j].numpy() - code) for code in codebook]
        assert tokens[b, i * width + j] == np.argmin(distances)  # raster order
        assert th.equal(quantizer.lookup(tokens, (height, width))[b, :, i, j], quantizer.codebook[np.argmin(distances)])


def test_codebook_initialisation() -> None:
    codebook = VectorQuantizer(codebook_size=50, codebook_dim=400).codebook.detach()
    assert codebook.abs().max() <= 1 / 50
    # a uniform law: mean 0, standard deviation width / sqrt(12)
    assert codebook.mean().abs() < 5 * (0.04 / 12**0.5) / 20_000**0.5
    th.testing.assert_close(codebook.std(), th.tensor(0.04 / 12**0.5), rtol=0.02, atol=0)


def test_quantizer_by_hand() -> None:
    quantizer = VectorQuantizer(codebook_size=3, codebook_dim=2)
    quantizer.codebook.data = th.tensor([[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]])
    z = th.tensor([[[[0.1, 0.9]], [[0.2, 0.6]]]], requires_grad=True)  # (0.1, 0.2) and (0.9, 0.6)
    output = quantizer(z)
    assert output.tokens.tolist() == [[0, 1]]
    th.testing.assert_close(output.z_q, th.tensor([[[[0.0, 1.0]], [[0.0, 1.0]]]]))
    mean_square = (0.1**2 + 0.2**2 + 0.1**2 + 0.4**2) / 4
    assert output.codebook_loss.item() == pytest.approx(mean_square)
    assert output.commitment_loss.item() == pytest.approx(mean_square)

    # the codebook loss moves codes that were used, the commitment loss moves encoder outputs
    codebook = quantizer.codebook
    to_z, to_codebook = th.autograd.grad(output.codebook_loss, (z, codebook), retain_graph=True, allow_unused=True)
    assert to_z is None
    th.testing.assert_close(to_codebook, th.tensor([[-0.1, -0.2], [0.1, 0.4], [0.0, 0.0]]) / 2)
    to_z, to_codebook = th.autograd.grad(output.commitment_loss, (z, codebook), retain_graph=True, allow_unused=True)
    th.testing.assert_close(to_z, th.tensor([[[[0.1, -0.1]], [[0.2, -0.4]]]]) / 2)
    assert to_codebook is None

    # straight through: z gets exactly the gradient of z_q
    gradient = th.randn_like(z)
    to_z, to_codebook = th.autograd.grad(output.z_q, (z, codebook), gradient, allow_unused=True)
    assert th.equal(to_z, gradient)
    assert to_codebook is None


def test_straight_through_from_decoder_to_encoder() -> None:
    tokenizer = make_tokenizer()
    seen = {}

    def keep(name: str, x: th.Tensor) -> None:
        x.retain_grad()
        seen[name] = x

    tokenizer.encoder.register_forward_hook(lambda module, inputs, output: keep("z", output))
    tokenizer.decoder.register_forward_pre_hook(lambda module, inputs: keep("z_q", inputs[0]))
    tokenizer.loss(th.rand(2, 3, 16, 16))[0].backward()
    z, z_q = seen["z"], seen["z_q"]
    assert z.grad is not None and z_q.grad is not None and z_q.grad.abs().max() > 0
    th.testing.assert_close(z.grad, z_q.grad + 2 * (z - z_q) / z.numel())  # the latter from the commitment term
    assert all(p.grad is not None for p in tokenizer.parameters())


def test_loss_by_hand() -> None:
    tokenizer = make_stub([[0.0, 0.0], [1.0, -1.0], [5.0, 5.0], [-5.0, 5.0]])
    # on the [-1, 1] scale: (0.2, -0.4) and (0.8, -0.6), then (-0.2, 0) and (0.2, 0.2)
    frames = th.tensor([[[[0.6, 0.9]], [[0.3, 0.2]]], [[[0.4, 0.6]], [[0.5, 0.6]]]])
    differences = np.array([[0.2, -0.4, -0.2, 0.4], [-0.2, 0.0, 0.2, 0.2]])  # x minus its code, which is also x_hat
    loss, logs = tokenizer.loss(frames)
    assert logs["reconstruction_loss"].item() == pytest.approx(np.abs(differences).mean())
    assert logs["codebook_loss"].item() == pytest.approx(np.square(differences).mean())
    assert logs["commitment_loss"].item() == pytest.approx(np.square(differences).mean())
    expected = np.abs(differences).mean() + 2 * np.square(differences).mean()
    assert loss.item() == logs["loss"].item() == pytest.approx(expected)
    # tokens 0, 1, 0, 0: two of four codes, with frequencies 3/4 and 1/4
    assert logs["codebook_usage"].item() == 0.5
    assert logs["codebook_perplexity"].item() == pytest.approx(4 / 3**0.75)
    assert logs["varying_positions"].item() == 0.5
    assert not any(value.requires_grad for value in logs.values())

    def perceptual_loss(x: th.Tensor, x_hat: th.Tensor) -> th.Tensor:
        th.testing.assert_close(x, 2 * frames - 1)
        assert x_hat.requires_grad
        return 10 * (x - x_hat).square().sum((1, 2, 3))  # (B,), not yet averaged

    loss, logs = tokenizer.loss(frames.clone().requires_grad_(), perceptual_loss)
    assert logs["perceptual_loss"].item() == pytest.approx(10 * np.square(differences).sum(1).mean())
    assert loss.item() == pytest.approx(expected + logs["perceptual_loss"].item())


@pytest.mark.parametrize(
    "channels, n_groups",
    [(1, 1), (2, 1), (3, 1), (7, 1), (9, 3), (10, 5), (12, 6), (48, 24), (66, 22), (32, 32), (64, 32), (96, 32), (256, 32)],
)
def test_groups(channels: int, n_groups: int) -> None:
    norm = ResidualBlock(channels, channels).norm1
    assert (norm.num_groups, norm.num_channels, norm.eps) == (n_groups, channels, 1e-6)


@pytest.mark.parametrize("channels", [1, 3, 10])
def test_odd_channels(channels: int) -> None:
    tokenizer = make_tokenizer((1, 8, 8), channels=channels, codebook_dim=channels)
    loss, _ = tokenizer.loss(th.rand(2, 1, 8, 8))
    loss.backward()
    gradients = [p.grad for p in tokenizer.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    "image_shape, levels, resolutions, in_encoder, in_decoder",
    [  # one attention in the middle, and one behind each residual block: 2 in the encoder's levels, 3 in the decoder's
        ((3, 64, 64), 5, (8, 16), 2 + 1 + 2, 3 + 1 + 3),
        ((3, 64, 64), 3, (8, 16), 2 + 1, 1 + 3),
        ((3, 64, 64), 5, (), 1, 1),
        ((3, 8, 16), 2, (16,), 2 + 1, 1 + 3),  # the longer side counts
    ],
)
def test_where_attention_is(
    image_shape: tuple[int, int, int], levels: int, resolutions: tuple[int, ...], in_encoder: int, in_decoder: int
) -> None:
    tokenizer = make_tokenizer(image_shape, levels, n_res_blocks=2, attention_resolutions=resolutions)
    for part, expected in ((tokenizer.encoder, in_encoder), (tokenizer.decoder, in_decoder)):
        assert sum(isinstance(module, SpatialSelfAttention) for module in part) == expected


@th.no_grad()
def test_attention_by_hand() -> None:
    attention = SpatialSelfAttention(channels=4)
    x = th.randn(1, 4, 2, 3)
    q, k, v = (part.flatten(1).t() for part in attention.qkv(attention.norm(x))[0].split(4))  # each (6, 4)
    y = th.stack([F.softmax(th.stack([q[i] @ k[j] / 2 for j in range(6)]), dim=0) @ v for i in range(6)])
    th.testing.assert_close(attention(x), x + attention.proj(y.t().view(1, 4, 2, 3)))


@th.no_grad()
def test_downsampling_pads_right_and_bottom() -> None:
    downsample = Downsample(channels=1)
    downsample.conv.weight.fill_(1.0)
    assert downsample.conv.bias is not None
    downsample.conv.bias.fill_(100.0)
    sums = downsample(th.arange(16.0).view(1, 1, 4, 4))
    assert sums.tolist() == [[[[145.0, 139.0], [166.0, 150.0]]]]


def test_robust_loss_by_hand() -> None:
    tokenizer = make_stub([[0.0, 0.0], [1.0, -1.0]], robust=True).eval()
    # on the [-1, 1] scale: (0.2, -0.4) and (0.8, -0.6), then (-0.2, 0) and (0.2, 0.2)
    frames = th.tensor([[[[0.6, 0.9]], [[0.3, 0.2]]], [[[0.4, 0.6]], [[0.5, 0.6]]]])
    differences = np.array([[0.2, -0.4, -0.2, 0.4], [-0.2, 0.0, 0.2, 0.2]])
    variance = np.mean([0.2**2, 0.2**2, 0.3**2, 0.4**2])  # both frames are half their difference away from their mean
    loss, logs = tokenizer.loss(frames)
    assert logs["reconstruction_loss"].item() == pytest.approx(np.square(differences).mean() / variance, rel=1e-4)
    expected = np.square(differences).mean() * (1 / variance + 1 + 0.25)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@th.no_grad()
def test_robust_encoder_outputs_are_normalised() -> None:
    tokenizer = make_tokenizer(robust=True)
    z = tokenizer.encoder(th.rand(2, 3, 16, 16))
    th.testing.assert_close(z.mean(1), th.zeros(2, 4, 4))
    th.testing.assert_close(z.var(1, unbiased=False), th.ones(2, 4, 4), rtol=0.02, atol=0)


@th.no_grad()
def test_idle_codes_are_revived() -> None:
    quantizer = VectorQuantizer(codebook_size=4, codebook_dim=2, revive_after=3)
    batches = [th.full((1, 2, 1, 2), float(i)) for i in range(5)]
    initial = quantizer.codebook.clone()
    quantizer.eval()(batches[4])
    assert th.equal(quantizer.codebook, initial)  # only in training

    quantizer.train()
    codes = []
    for z in batches:
        quantizer(z)
        codes.append(quantizer.codebook[:, 0].tolist())
    # the first batch gives all codes, but its outputs, as those of the next two, need only one of them; the fourth batch
    # replaces the three others, and then the first one is not the nearest any more
    assert codes == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 3, 3, 3], [0, 3, 3, 3]]
    for _ in range(2):
        quantizer(batches[4])
    assert quantizer.codebook[:, 0].tolist() == [4, 3, 4, 4]


@th.no_grad()
def test_revived_codes_are_drawn_from_the_batch() -> None:
    quantizer = VectorQuantizer(codebook_size=50, codebook_dim=3, revive_after=3).train()
    z = th.randn(4, 3, 2, 2)
    outputs = {tuple(vector) for vector in z.movedim(1, -1).reshape(-1, 3).tolist()}
    quantizer(z)
    codes = {tuple(code) for code in quantizer.codebook.tolist()}
    assert codes <= outputs
    assert len(codes) > 10  # of 16


def test_moving_error_counts_what_moves_only() -> None:
    frames = -th.ones(5, 1, 2, 2)
    frames[1, 0, 0, 1] = 1.0  # a ball, white on black, in one frame of five
    lost = -th.ones(5, 1, 2, 2)
    lost[:, 0, 1, 1] = 0.5  # wrong, but nothing moves there
    assert moving_error(frames, lost).item() == pytest.approx(1.0)
    lost[1, 0, 0, 1] = 0.0
    assert moving_error(frames, lost).item() == pytest.approx(0.5)
    assert moving_error(frames[:1], lost[:1]).item() == 0.0
    frames[1, 0, 0, 1] = -0.85  # the difference of 0.075 is less than what counts as moving
    assert moving_error(frames, lost).item() == 0.0


# --- Patches -----------------------------------------------------------------------------------------------------------------


def mosaics(tiles: th.Tensor, n: int, generator: th.Generator) -> th.Tensor:
    """(n, C, 4, 6) frames of 2x2 tiles (n_tiles, C, 2, 2), drawn at random."""
    drawn = tiles[th.randint(len(tiles), (n, 2, 3), generator=generator)]  # (n, 2, 3, C, 2, 2)
    return drawn.permute(0, 3, 1, 4, 2, 5).reshape(n, tiles.shape[1], 4, 6)


@pytest.fixture
def tiles() -> th.Tensor:
    """Ten tiles of few colours, as games have them."""
    tiles = th.randint(3, (10, 3, 2, 2), generator=th.Generator().manual_seed(3)) / 2
    assert len(tiles.unique(dim=0)) == 10
    return tiles


def test_patches_are_kept_exactly_and_for_ever(tiles: th.Tensor) -> None:
    """A token means the same tile at all positions, before and after others were learned."""
    generator = th.Generator().manual_seed(0)
    tokenizer = PatchTokenizer((3, 4, 6), codebook_size=16, patch_size=2).train()
    assert (tokenizer.grid, tokenizer.tokens_per_frame, tokenizer.codebook_dim) == ((2, 3), 6, 12)
    first = mosaics(tiles[:4], 20, generator)
    tokenizer.loss(first)
    tokens = tokenizer.encode(first)
    assert tokens.unique().tolist() == [0, 1, 2, 3]
    th.testing.assert_close(tokenizer.decode(tokens), first)

    both = th.cat([first, mosaics(tiles, 40, generator)])
    _, logs = tokenizer.loss(both)
    assert th.equal(tokenizer.encode(first), tokens)
    th.testing.assert_close(tokenizer.decode(tokenizer.encode(both)), both)
    assert logs["n_patches"] == 10 and logs["codebook_usage"] == 10 / 16 and logs["moving_error"] < 1e-6
    columns = mosaics(tiles[4:5], 1, generator)
    assert len(tokenizer.encode(columns).unique()) == 1


def test_actor_critic_sees_how_patches_differ_from_the_background(tiles: th.Tensor) -> None:
    """In [-1, 1], as patches of 2x2 pixels on their grid, a channel's four pixels in raster order; others have their codes."""
    generator = th.Generator().manual_seed(0)
    background = mosaics(tiles[4:5], 11, generator)
    tokenizer = PatchTokenizer((3, 4, 6), codebook_size=16, patch_size=2).train()
    tokenizer.loss(th.cat([mosaics(tiles[:4], 10, generator), background]))
    frames = mosaics(tiles, 20, generator)
    tokenizer.loss(th.cat([frames, mosaics(tiles[:1], 100, generator)]))  # what comes later is no other background
    codes = tokenizer.codes(tokenizer.encode(frames).view(4, 5, 6))
    assert codes.shape == (4, 5, 12, 2, 3)
    th.testing.assert_close(codes[1, 2, :, 1, 0].view(3, 2, 2), (frames[7] - background[0])[:, 2:, :2])
    assert not tokenizer.codes(tokenizer.encode(background)).any()

    plain = Tokenizer((3, 4, 6), codebook_size=16, codebook_dim=5, channels=4, channel_multipliers=(1, 1))
    tokens = th.arange(12).view(2, 6)
    assert th.equal(plain.codes(tokens)[1, :, 1, 2], plain.quantizer.codebook[11])


def test_patches_are_learned_in_training_only(tiles: th.Tensor) -> None:
    tokenizer = PatchTokenizer((3, 4, 6), codebook_size=16, patch_size=2).eval()
    frames = mosaics(tiles, 20, th.Generator().manual_seed(0))
    _, logs = tokenizer.loss(frames)
    assert logs["n_patches"] == 0 and logs["moving_error"] > 0.2
    loss, logs = tokenizer.train().loss(frames)
    assert logs["n_patches"] == 10 and not loss.requires_grad


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_patches_that_differ_get_a_code_of_their_own(precision: str) -> None:
    """By one level of 255 in one of many values, also where PyTorch may multiply float32 in less than that; and only once."""
    tokenizer = PatchTokenizer((3, 8, 8), codebook_size=64, patch_size=8).train()
    levels = th.randint(100, (1, 3, 8, 8), generator=th.Generator().manual_seed(0)).repeat(40, 1, 1, 1)
    for n in range(1, 40):
        levels[n].view(-1)[4 * n] += 1
    frames = levels / 255
    before = th.get_float32_matmul_precision()
    th.set_float32_matmul_precision(precision)
    try:
        for _ in range(2):
            _, logs = tokenizer.loss(frames)
        tokens = tokenizer.encode(frames)
    finally:
        th.set_float32_matmul_precision(before)
    assert tokens[:, 0].tolist() == list(range(40))
    assert logs["n_patches"] == 40 and logs["loss"] == 0


def test_full_codebook_takes_the_nearest() -> None:
    tokenizer = PatchTokenizer((1, 1, 1), codebook_size=2, patch_size=1).train()
    values = th.tensor([0.0, 1.0, 0.3, 0.8]).view(4, 1, 1, 1)
    for frame in values.split(1):
        _, logs = tokenizer.loss(frame)
    assert tokenizer.encode(values).flatten().tolist() == [0, 1, 0, 1]
    assert logs["n_patches"] == 2 and logs["loss"].item() == pytest.approx(0.4)  # of 0.8 and 1 on the [-1, 1] scale


def test_codes_without_a_patch_are_grey_and_nobody_s_nearest() -> None:
    tokenizer = PatchTokenizer((1, 1, 1), codebook_size=3, patch_size=1).train()
    tokenizer.loss(th.ones(1, 1, 1, 1))
    assert tokenizer.encode(th.full((1, 1, 1, 1), 0.5)).item() == 0
    assert tokenizer.decode(th.tensor([[2]])).item() == 0.5
