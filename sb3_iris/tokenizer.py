"""
The tokenizer: a discrete autoencoder between frames and K tokens each.

The convolutional stacks have the shape of VQGAN's (https://arxiv.org/abs/2012.09841), the quantizer is that of
VQ-VAE (https://arxiv.org/abs/1711.00937).
"""

import math
from collections.abc import Sequence

import torch as th
from torch import nn
from torch._compile import _disable_dynamo  # as in torch.optim: th.compiler.disable would load the compiler for all
from torch.nn import functional as F

from sb3_iris.type_aliases import Logs, PerceptualLoss, QuantizerOutput

MOVING = 0.1  # difference of a value from the median frame, on the [0, 1] scale, from which on it counts as moving
HALF_LEVEL = 0.5 / 255  # on the [0, 1] scale; by more than that bytes differ


def _group_norm(channels: int) -> nn.GroupNorm:
    """32 groups as in the paper where they divide the channels, else as many as leave at least two channels in each."""
    most = max(channels // 2, 1)
    n_groups = 32 if channels % 32 == 0 else max(n for n in range(1, min(most, 32) + 1) if channels % n == 0)
    return nn.GroupNorm(n_groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Twice GroupNorm, SiLU and 3x3 convolution, beside an identity or 1x1 shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: th.Tensor) -> th.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class SpatialSelfAttention(nn.Module):
    """Single-head self-attention among the pixels of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: th.Tensor) -> th.Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)  # each (B, H * W, C)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Halves height and width by a strided 3x3 convolution; zeros are padded at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width by nearest-neighbour interpolation and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of every pixel, without parameters."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)


class VectorQuantizer(nn.Module):
    """
    Nearest codebook entry by Euclidean distance, with a straight-through gradient.

    :param codebook_size: Number of entries V.
    :param codebook_dim: Dimension of an entry.
    :param revive_after: Training batches after which an entry that none of them used is replaced by an encoder output of
        the batch; the first batch replaces all of them. None never replaces any.
    """

    idle: th.Tensor  # (V,) int64, training batches since an entry was used

    def __init__(self, codebook_size: int, codebook_dim: int, revive_after: int | None = None) -> None:
        super().__init__()
        self.revive_after = revive_after
        self.codebook = nn.Parameter(th.empty(codebook_size, codebook_dim).uniform_(-1 / codebook_size, 1 / codebook_size))
        if revive_after is not None:
            self.register_buffer("idle", th.full((codebook_size,), revive_after))

    def forward(self, z: th.Tensor) -> QuantizerOutput:
        """
        :param z: (B, codebook_dim, h, w) encoder output
        :return: Quantized output, its tokens and the two unweighted loss terms.
        """
        if self.training and self.revive_after is not None:
            self._revive(z, self.revive_after)
        tokens = self.nearest(z)
        z_q = self.lookup(tokens, z.shape[2:])
        codebook_loss = F.mse_loss(z_q, z.detach())
        commitment_loss = F.mse_loss(z, z_q.detach())
        return QuantizerOutput(z + (z_q - z).detach(), tokens, codebook_loss, commitment_loss)

    @_disable_dynamo  # it changes what the gradients are of, and draws as it does without compilation
    @th.no_grad()
    def _revive(self, z: th.Tensor, revive_after: int) -> None:
        """Replace idle entries by outputs of the batch drawn at random, then count which entries the batch uses."""
        flat = z.transpose(0, 1).flatten(1).t()  # (B * K, codebook_dim)
        drawn = flat[th.randint(len(flat), self.idle.shape, device=z.device)]
        self.codebook.copy_(th.where((self.idle >= revive_after).unsqueeze(1), drawn, self.codebook))
        self.idle.remainder_(revive_after).add_(1)
        self.idle[self.nearest(z).flatten()] = 0

    @th.no_grad()
    def nearest(self, z: th.Tensor) -> th.Tensor:
        """
        :param z: (B, codebook_dim, h, w)
        :return: (B, K) int64, tokens in raster order
        """
        flat = z.flatten(2).transpose(1, 2)  # (B, K, codebook_dim)
        with th.autocast(z.device.type, enabled=False):  # entries differ by less than bfloat16 tells apart
            # |z - e|^2 without |z|^2, which is the same for all entries
            codebook = self.codebook.to(flat.dtype)
            distances = self._squares(codebook) - 2 * flat @ codebook.t()  # (B, K, V)
        return distances.argmin(-1)

    def _squares(self, codebook: th.Tensor) -> th.Tensor:
        """(V,) squared lengths of the entries."""
        return codebook.square().sum(1)

    def lookup(self, tokens: th.Tensor, grid: Sequence[int]) -> th.Tensor:
        """
        :param tokens: (B, K) int64
        :param grid: Height and width of the token grid.
        :return: (B, codebook_dim, h, w)
        """
        return F.embedding(tokens, self.codebook).transpose(1, 2).unflatten(2, tuple(grid))


class PatchCodebook(VectorQuantizer):
    """
    Codes that are patches as they are seen, each that is not there yet. They are added as they come and never change, so that
    a token means the same for ever: the nearest-neighbour tokenizer of "Improving Transformer World Models for Data-Efficient
    RL", https://arxiv.org/abs/2502.01591.

    :param codebook_size: Most entries V.
    :param codebook_dim: Values in a patch.
    """

    n_patches: th.Tensor  # () int64, entries so far; the others are grey
    background: th.Tensor  # () int64, the entry that was most frequent when the first were added

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__(codebook_size, codebook_dim)
        self.codebook.requires_grad_(False).zero_()
        self.register_buffer("n_patches", th.zeros((), dtype=th.int64))
        self.register_buffer("background", th.zeros((), dtype=th.int64))

    @th.no_grad()
    def add(self, z: th.Tensor) -> th.Tensor:
        """
        Add the patches that are unlike all entries, as long as there is room.

        :param z: (B, codebook_dim, h, w) on the [-1, 1] scale
        :return: (B, K) int64, the tokens of all
        """
        flat = z.flatten(2).transpose(1, 2).flatten(0, 1)  # (B * K, codebook_dim)
        n_patches = int(self.n_patches)
        first = n_patches == 0
        tokens = self.nearest(z)
        new = flat if first else flat[_unlike(flat, self.codebook[tokens.flatten()])]
        if len(new) == 0 or n_patches == len(self.codebook):
            return tokens
        while len(new) and n_patches < len(self.codebook):
            self.codebook[n_patches] = new[0]
            n_patches += 1
            new = new[_unlike(new, new[0])]
        self.n_patches.fill_(n_patches)
        tokens = self.nearest(z)
        if first:
            self.background.copy_(tokens.flatten().bincount().argmax())
        return tokens

    def nearest(self, z: th.Tensor) -> th.Tensor:
        """As in ``VectorQuantizer``, in float64: patches may differ by less than products of float32 or TF32 tell apart."""
        return super().nearest(z if z.device.type == "mps" else z.double())  # MPS has no float64

    def _squares(self, codebook: th.Tensor) -> th.Tensor:
        """Not those of the entries that are not there yet, which are nobody's nearest."""
        there = th.arange(len(self.codebook), device=self.codebook.device) < self.n_patches
        return super()._squares(codebook).masked_fill(~there, math.inf)


def _unlike(patches: th.Tensor, others: th.Tensor) -> th.Tensor:
    """Whether a byte differs, for each of the patches (..., codebook_dim) on the [-1, 1] scale."""
    return ((patches - others).abs() > 2 * HALF_LEVEL).any(-1)


class BaseTokenizer(nn.Module):
    """
    What is common to all tokenizers: encoder, quantizer and decoder, and how well they do.

    :param image_shape: (C, H, W) of a frame.
    :param downsampling: Side in pixels of what a token stands for, which divides H and W.
    :param encoder: (B, C, H, W) on the [-1, 1] scale to (B, codebook_dim, h, w).
    :param quantizer: The codebook.
    :param decoder: (B, codebook_dim, h, w) to (B, C, H, W).
    """

    robust = False  # whether small moving things are kept without a perceptual loss

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        downsampling: int,
        encoder: nn.Sequential,
        quantizer: VectorQuantizer,
        decoder: nn.Sequential,
    ) -> None:
        super().__init__()
        _, height, width = image_shape
        assert height % downsampling == width % downsampling == 0, (image_shape, downsampling)
        self.image_shape = image_shape
        self.grid = (height // downsampling, width // downsampling)
        self.tokens_per_frame = math.prod(self.grid)
        self.codebook_size, self.codebook_dim = quantizer.codebook.shape
        self.encoder = encoder
        self.quantizer = quantizer
        self.decoder = decoder

    @th.no_grad()
    def encode(self, frames: th.Tensor) -> th.Tensor:
        """
        :param frames: (..., C, H, W) float32 in [0, 1]
        :return: (..., K) int64 in [0, V), raster order
        """
        leading = frames.shape[:-3]
        tokens = self.quantizer.nearest(self.encoder(2 * frames.reshape(-1, *frames.shape[-3:]) - 1).float())
        return tokens.view(*leading, self.tokens_per_frame)

    @th.no_grad()
    def decode(self, tokens: th.Tensor) -> th.Tensor:
        """
        :param tokens: (..., K) int64 in [0, V), raster order
        :return: (..., C, H, W) float32 in [0, 1]
        """
        leading = tokens.shape[:-1]
        frames = self.decoder(self.quantizer.lookup(tokens.reshape(-1, tokens.shape[-1]), self.grid)).float()
        return ((frames + 1) / 2).clamp(0, 1).view(*leading, *self.image_shape)

    def codes(self, tokens: th.Tensor) -> th.Tensor:
        """
        :param tokens: (..., K) int64 in [0, V), raster order
        :return: (..., codebook_dim, h, w) float32, what an actor-critic that sees codes sees
        """
        return F.embedding(tokens, self.quantizer.codebook.detach()).transpose(-2, -1).unflatten(-1, self.grid)

    def loss(self, frames: th.Tensor, perceptual_loss: PerceptualLoss | None = None) -> tuple[th.Tensor, Logs]:
        """
        :param frames: (B, C, H, W) float32 in [0, 1]
        :param perceptual_loss: Takes frames and their reconstructions, (B, C, H, W) on the [-1, 1] scale, and gives
            distances whose mean is added; None for none.
        :return: The loss and what to log of it.
        """
        raise NotImplementedError

    @_disable_dynamo  # it has sizes that depend on values
    @th.no_grad()
    def _quality(self, x: th.Tensor, x_hat: th.Tensor, tokens: th.Tensor) -> Logs:
        """What to log of frames, their reconstructions (B, C, H, W) on the [-1, 1] scale, and their tokens (B, K)."""
        frequencies = tokens.flatten().bincount(minlength=self.codebook_size) / tokens.numel()
        return {
            "codebook_usage": (frequencies > 0).float().mean(),
            "codebook_perplexity": th.special.entr(frequencies).sum().exp(),
            "varying_positions": (tokens != tokens[:1]).any(0).float().mean(),
            "moving_error": moving_error(x, x_hat),
        }


class PatchTokenizer(BaseTokenizer):
    """
    Frames to tokens and back without a network: a token is a patch, see ``PatchCodebook``. For games that are drawn from few
    different patches, of which each is kept as it is; what comes once the codebook is full looks like the nearest.

    :param image_shape: (C, H, W) of a frame; H and W are multiples of ``patch_size``.
    :param codebook_size: Most codes V.
    :param patch_size: Side of a patch in pixels.
    """

    quantizer: PatchCodebook
    robust = True

    def __init__(self, image_shape: tuple[int, int, int], codebook_size: int, patch_size: int) -> None:
        quantizer = PatchCodebook(codebook_size, image_shape[0] * patch_size**2)
        to_patches, to_frame = nn.PixelUnshuffle(patch_size), nn.PixelShuffle(patch_size)
        super().__init__(image_shape, patch_size, nn.Sequential(to_patches), quantizer, nn.Sequential(to_frame))

    def codes(self, tokens: th.Tensor) -> th.Tensor:
        """
        As how the pixels, on the [0, 1] scale, differ from the background's. What is nearly everywhere is zero then; else it
        drowns what the actor-critic has to see.
        """
        background = F.embedding(self.quantizer.background, self.quantizer.codebook)  # an index would make a GPU wait
        return (super().codes(tokens) - background[:, None, None]) / 2

    def loss(self, frames: th.Tensor, perceptual_loss: PerceptualLoss | None = None) -> tuple[th.Tensor, Logs]:
        """
        In training mode new patches are learned at once. There is no gradient; the loss says how much is not as it should be.

        :param frames: (B, C, H, W) float32 in [0, 1]
        :param perceptual_loss: None
        :return: The loss and what to log of it.
        """
        assert perceptual_loss is None, perceptual_loss
        x = 2 * frames - 1
        z = self.encoder(x)
        tokens = self.quantizer.add(z) if self.training else self.quantizer.nearest(z)
        x_hat = self.decoder(self.quantizer.lookup(tokens, self.grid))
        loss = F.l1_loss(x_hat, x)
        return loss, {**self._quality(x, x_hat, tokens), "n_patches": self.quantizer.n_patches.float(), "loss": loss}


class Tokenizer(BaseTokenizer):
    """
    Frames to tokens and back (Sec. 2.1 and App. A.1 of "Transformers are Sample-Efficient World Models",
    https://arxiv.org/abs/2209.00588).

    :param image_shape: (C, H, W) of a frame; H and W are multiples of 2 ** (levels - 1).
    :param codebook_size: Number of codes V.
    :param codebook_dim: Dimension of a code.
    :param channels: Base number of channels.
    :param channel_multipliers: Channels of each level over ``channels``; one level per entry, each of half the resolution.
    :param n_res_blocks: Residual blocks per level of the encoder; the decoder has one more.
    :param attention_resolutions: Sides of feature maps (the longer one) at which residual blocks are followed by attention.
    :param latent_channels: Channels between the convolutional stacks and the 1x1 convolutions beside the codebook;
        ``codebook_dim`` if None.
    :param robust: Whether to train in a way that keeps small moving things without a perceptual loss, where the paper's way
        loses them: encoder outputs are normalised, the codebook starts from data and unused codes are revived, the commitment
        term weighs 0.25, and the reconstruction loss is the squared error over the variance of the batch about its mean frame.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        codebook_size: int = 512,
        codebook_dim: int = 512,
        channels: int = 64,
        channel_multipliers: Sequence[int] = (1, 1, 1, 1, 1),
        n_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (8, 16),
        latent_channels: int | None = None,
        robust: bool = False,
    ) -> None:
        image_channels, height, width = image_shape
        latent_channels = codebook_dim if latent_channels is None else latent_channels

        level_channels = [channels * multiplier for multiplier in channel_multipliers]
        attention = [max(height, width) >> level in attention_resolutions for level in range(len(level_channels))]
        lowest = level_channels[-1]

        encoder: list[nn.Module] = [nn.Conv2d(image_channels, channels, 3, padding=1)]
        in_channels = channels
        for level, out_channels in enumerate(level_channels):
            for _ in range(n_res_blocks):
                encoder.append(ResidualBlock(in_channels, out_channels))
                in_channels = out_channels
                if attention[level]:
                    encoder.append(SpatialSelfAttention(out_channels))
            if level < len(level_channels) - 1:
                encoder.append(Downsample(out_channels))
        encoder += [ResidualBlock(lowest, lowest), SpatialSelfAttention(lowest), ResidualBlock(lowest, lowest)]
        encoder += [_group_norm(lowest), nn.SiLU(), nn.Conv2d(lowest, latent_channels, 3, padding=1)]
        encoder += [nn.Conv2d(latent_channels, codebook_dim, 1)]
        if robust:
            encoder.append(ChannelNorm())

        quantizer = VectorQuantizer(codebook_size, codebook_dim, revive_after=100 if robust else None)

        decoder: list[nn.Module] = [nn.Conv2d(codebook_dim, latent_channels, 1)]
        decoder += [nn.Conv2d(latent_channels, lowest, 3, padding=1)]
        decoder += [ResidualBlock(lowest, lowest), SpatialSelfAttention(lowest), ResidualBlock(lowest, lowest)]
        in_channels = lowest
        for level, out_channels in reversed(list(enumerate(level_channels))):
            for _ in range(n_res_blocks + 1):
                decoder.append(ResidualBlock(in_channels, out_channels))
                in_channels = out_channels
                if attention[level]:
                    decoder.append(SpatialSelfAttention(out_channels))
            if level > 0:
                decoder.append(Upsample(out_channels))
        decoder += [_group_norm(in_channels), nn.SiLU(), nn.Conv2d(in_channels, image_channels, 3, padding=1)]
        downsampling = 2 ** (len(channel_multipliers) - 1)
        super().__init__(image_shape, downsampling, nn.Sequential(*encoder), quantizer, nn.Sequential(*decoder))
        self.robust = robust

    def loss(self, frames: th.Tensor, perceptual_loss: PerceptualLoss | None = None) -> tuple[th.Tensor, Logs]:
        """
        Reconstruction, codebook, commitment and perceptual loss (Sec. 2.1), means over everything.

        :param frames: (B, C, H, W) float32 in [0, 1]
        :param perceptual_loss: Takes frames and their reconstructions, (B, C, H, W) on the [-1, 1] scale, and gives
            distances whose mean is added; None for none.
        :return: The loss and what to log of it.
        """
        x = 2 * frames - 1
        quantized = self.quantizer(self.encoder(x).float())
        x_hat = self.decoder(quantized.z_q).float()
        if self.robust:
            variance = (x - x.mean(0)).square().mean()
            reconstruction_loss = F.mse_loss(x_hat, x) / variance.clamp(min=1e-4)  # as of a batch of one frame
        else:
            reconstruction_loss = F.l1_loss(x_hat, x)
        commitment_weight = 0.25 if self.robust else 1.0
        loss = reconstruction_loss + quantized.codebook_loss + commitment_weight * quantized.commitment_loss
        logs = {
            "reconstruction_loss": reconstruction_loss,
            "codebook_loss": quantized.codebook_loss,
            "commitment_loss": quantized.commitment_loss,
        }
        if perceptual_loss is not None:
            logs["perceptual_loss"] = perceptual_loss(x, x_hat).mean()
            loss = loss + logs["perceptual_loss"]
        logs |= self._quality(x, x_hat, quantized.tokens)
        logs["loss"] = loss
        return loss, {name: value.detach() for name, value in logs.items()}


@th.no_grad()
def moving_error(x: th.Tensor, x_hat: th.Tensor, threshold: float = MOVING) -> th.Tensor:
    """
    Mean absolute error where something moves: a lost ball costs nothing in the mean over all pixels, everything in the game.

    :param x: (B, C, H, W) on the [-1, 1] scale
    :param x_hat: (B, C, H, W), reconstructions of x
    :param threshold: Difference from the batch's median frame, on the [0, 1] scale, from which on a value counts as moving.
    :return: Scalar on the [0, 1] scale; 0 if nothing moves.
    """
    moving = (x - x.median(dim=0).values).abs() > 2 * threshold
    return ((x - x_hat).abs() * moving).sum() / (2 * moving.sum().clamp(min=1))
