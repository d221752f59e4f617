"""The optional perceptual term of the tokenizer's loss: LPIPS on VGG16 features, from weights on disk only."""

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch as th
from stable_baselines3.common.utils import get_device
from torch import nn

from sb3_iris.type_aliases import PerceptualLoss
from sb3_iris.validation import takes_argument

if TYPE_CHECKING:
    from sb3_iris.iris import IRIS

VGG16_FILE = "vgg16-397923af.pth"  # torchvision's name for its ImageNet weights
MIN_IMAGE_SIZE = 16  # VGG16 halves the image four times before LPIPS reads it for the last time


class LpipsLoss(nn.Module):
    """
    Learned perceptual distance of two batches of images: a frozen network, through which gradients flow to the images.

    Paper: https://arxiv.org/abs/1801.03924

    LPIPS compares RGB images, so other channel counts are folded into the batch: a multiple of 3 as a stack of RGB images,
    anything else as grey images, one per channel.

    The ``lpips`` package is only asked for its network once the VGG16 weights are on disk: else it would download them.
    """

    def __init__(self) -> None:
        super().__init__()
        weights_path = Path(th.hub.get_dir()) / "checkpoints" / VGG16_FILE
        if not weights_path.is_file():
            raise FileNotFoundError(f"there is no file {weights_path}")
        import lpips  # not at the top of the file: an optional dependency

        # Building a network draws random numbers; the seeded networks of the model must not depend on it
        with th.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips calls torchvision with deprecated arguments
            self.lpips = lpips.LPIPS(net="vgg", verbose=False)
        self.eval().requires_grad_(False)

    @staticmethod
    def _fold_channels(images: th.Tensor) -> th.Tensor:
        """Turn images (B, C, H, W) into RGB images (B * C / 3, 3, H, W), or (B * C, 3, H, W) where they are grey."""
        n_channels, height, width = images.shape[1:]
        if n_channels % 3 == 0:
            return images.reshape(-1, 3, height, width)
        return images.reshape(-1, 1, height, width).expand(-1, 3, -1, -1)

    def forward(self, x: th.Tensor, x_hat: th.Tensor) -> th.Tensor:
        """
        Compute the distance, averaged over the batch.

        :param x: Images (B, C, H, W), float32 in [-1, 1]
        :param x_hat: Their reconstructions, of the same shape and scale
        :return: The mean distance, a scalar
        """
        assert x.shape == x_hat.shape, f"Images and reconstructions differ in shape: {x.shape} and {x_hat.shape}"
        return self.lpips(self._fold_channels(x), self._fold_channels(x_hat)).mean()


def make_perceptual_loss(
    perceptual_loss: str | PerceptualLoss | None,
    image_shape: tuple[int, ...],
    device: th.device | str = "auto",
    robust_tokenizer: bool | str = False,
    warn: Callable[[str], object] = warnings.warn,
) -> PerceptualLoss | None:
    """
    Turn the ``perceptual_loss`` argument of ``IRIS`` into a function of images and reconstructions. Never uses the network.

    :param perceptual_loss: ``"lpips"``; ``"auto"`` for LPIPS where it is installed together with its weights, else
        a warning and no perceptual loss; None for no perceptual loss; or a function, used as it is
    :param image_shape: Shape (C, H, W) of the images that the tokenizer reconstructs, in pixels
    :param device: Device of the tokenizer, on which LPIPS is put
    :param robust_tokenizer: The tokenizer's, for what the warning says of it
    :param warn: Called with the warning
    :return: The function, whose mean is the loss, or None
    """
    if perceptual_loss is None or callable(perceptual_loss):
        return perceptual_loss
    if perceptual_loss not in ("auto", "lpips"):
        raise ValueError(f"perceptual_loss must be 'auto', 'lpips', None or a function, got {perceptual_loss!r}")

    cause: Exception | None = None
    if min(image_shape[-2:]) < MIN_IMAGE_SIZE:
        reason = f"images of {image_shape[-2]}x{image_shape[-1]} pixels are too small for VGG16"
        way_out = f"Use images of at least {MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE} pixels"
    else:
        try:
            lpips_loss = LpipsLoss()
        except Exception as error:  # a missing package, a torchvision that does not fit, a missing or damaged file, ...
            cause, reason = error, f"{type(error).__name__}: {error}"
            way_out = (
                'Run once, with a network: pip install lpips (the extra "perceptual", with a torchvision for torch '
                f"{th.__version__}), then python -c \"from torchvision.models import vgg16; vgg16(weights='IMAGENET1K_V1')\", "
                f"which saves {VGG16_FILE} under torch.hub.get_dir(), in checkpoints (a copied file does as well)"
            )
        else:
            return lpips_loss.to(get_device(device))

    if perceptual_loss == "lpips":
        raise ValueError(
            f"perceptual_loss='lpips' is not possible: {reason}. {way_out}; or use perceptual_loss=None."
        ) from cause
    consequence = {
        "auto": "and the tokenizer is trained in a way that needs none (robust_tokenizer='auto')",
        True: "which this tokenizer does not need (robust_tokenizer=True)",
        False: "and without it the paper's tokenizer loses small moving things (robust_tokenizer=False)",
    }[robust_tokenizer]
    warn(
        f"perceptual_loss='auto': training goes on without LPIPS, unlike in the paper, {consequence}: {reason}. {way_out}; "
        "perceptual_loss=None is the same without this warning."
    )
    return None


def set_up_perceptual_loss(model: "IRIS") -> PerceptualLoss | None:
    """
    Make a model's perceptual loss and settle the ``robust_tokenizer`` in its ``policy_kwargs`` where that is ``"auto"``: True
    if there is no perceptual loss. Files have what was settled, so that their networks are the same on all machines.

    :param model: A model without networks yet.
    :return: The loss, see ``make_perceptual_loss``.
    """
    policy_kwargs, parameters = model.policy_kwargs, inspect.signature(model.policy_class).parameters
    if policy_kwargs.get("patch_tokenizer") is True:
        if model.perceptual_loss not in (None, "auto"):
            raise ValueError(
                f"perceptual_loss={model.perceptual_loss!r} does not go with patch_tokenizer=True, which is not trained by a "
                "loss: leave it out"
            )
        if policy_kwargs.get("robust_tokenizer") == "auto":
            del policy_kwargs["robust_tokenizer"]
        return None
    robust = policy_kwargs.get("robust_tokenizer", False)  # files from before there was "auto" may not have it
    default = parameters["image_size"].default if "image_size" in parameters else 64
    image_size = policy_kwargs.get("image_size", default)
    height, width = model.observation_space.shape[1:]
    if isinstance(image_size, int | np.integer):  # the policy refuses what is neither that nor None
        height = width = int(image_size)
    image_shape = (model.observation_space.shape[0], height, width)
    loss = make_perceptual_loss(model.perceptual_loss, image_shape, model.device, robust, model._training_warnings.postpone)
    if robust == "auto":
        del policy_kwargs["robust_tokenizer"]
        if takes_argument(model.policy_class, "robust_tokenizer"):
            policy_kwargs["robust_tokenizer"] = loss is None
            if model.perceptual_loss is None and model.verbose >= 1:
                print("perceptual_loss=None: the tokenizer is trained in a way that needs none (robust_tokenizer='auto')")
    return loss
