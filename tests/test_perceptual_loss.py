import pickle
import socket
import sys
import types
import warnings

import pytest
import torch as th
from torch import nn

from sb3_iris import IRIS, CnnLstmPolicy
from sb3_iris.perceptual_loss import VGG16_FILE, LpipsLoss, make_perceptual_loss
from tests.presets import SETTINGS, SIZES, FrameEnv, assert_equal, parameters

IMAGE_SHAPE = (3, 64, 64)


class FakeLPIPS(nn.Module):
    """
    Squared error in place of LPIPS, with its shapes, its trainable and dropped-out last layer and its warning.

    The true one needs torchvision, which cannot be imported beside every build of PyTorch (the CPU build that tests run on
    among them), and half a gigabyte of memory; ``test_true_lpips`` uses it where it is installed.
    """

    def __init__(self, net: str, verbose: bool) -> None:
        super().__init__()
        assert net == "vgg" and not verbose
        warnings.warn("The parameter 'pretrained' is deprecated", stacklevel=1)
        self.weight = nn.Parameter(th.ones(1) + 0.0 * th.rand(1))
        self.dropout = nn.Dropout(0.5)

    def forward(self, in0: th.Tensor, in1: th.Tensor) -> th.Tensor:
        assert in0.shape == in1.shape and in0.shape[1] == 3
        self.images = in0
        return self.dropout(self.weight * (in0 - in1) ** 2).mean((1, 2, 3), keepdim=True)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Fail each test of this file that opens a socket, even if the code under test swallows the error."""
    opened = []

    class NoSocket(socket.socket):
        def __init__(self, *args, **kwargs):
            opened.append(args)
            raise OSError("tests have no network")

    monkeypatch.setattr(socket, "socket", NoSocket)
    yield
    assert not opened


@pytest.fixture
def weights_path(monkeypatch, tmp_path):
    """Where torchvision looks for its weights, in an empty home; the file itself is left to the test."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / VGG16_FILE
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def fake_lpips(monkeypatch, weights_path):
    """A machine with all that LPIPS needs."""
    weights_path.touch()
    module = types.ModuleType("lpips")
    module.LPIPS = FakeLPIPS
    monkeypatch.setitem(sys.modules, "lpips", module)
    return module


def check_not_available(image_shape, *words: str) -> None:
    """``"lpips"`` raises, ``"auto"`` warns once and gives None, and both say all of ``words``."""
    with pytest.raises(ValueError, match=r"perceptual_loss='lpips' is not possible: .* perceptual_loss=None") as error:
        make_perceptual_loss("lpips", image_shape)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert make_perceptual_loss("auto", image_shape) is None
    assert len(caught) == 1
    for message in (str(error.value), str(caught[0].message)):
        assert all(word in message for word in words), message
    assert "training goes on without LPIPS" in str(caught[0].message)
    assert "perceptual_loss=None is the same without this warning" in str(caught[0].message)


def test_none_and_functions_are_used_as_they_are():
    module = nn.L1Loss()
    assert make_perceptual_loss(None, IMAGE_SHAPE) is None
    assert make_perceptual_loss(nn.functional.mse_loss, IMAGE_SHAPE) is nn.functional.mse_loss
    assert make_perceptual_loss(module, (1, 4, 4)) is module


@pytest.mark.parametrize("perceptual_loss", ["vgg", "", 1.0, True])
def test_anything_else_is_an_error(perceptual_loss):
    with pytest.raises(ValueError, match=r"perceptual_loss must be 'auto', 'lpips', None or a function, got") as error:
        make_perceptual_loss(perceptual_loss, IMAGE_SHAPE)
    assert repr(perceptual_loss) in str(error.value)


@pytest.mark.parametrize("perceptual_loss", ["auto", "lpips"])
def test_lpips_is_frozen_and_has_the_right_value(fake_lpips, perceptual_loss):
    random_state = th.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = make_perceptual_loss(perceptual_loss, IMAGE_SHAPE, th.device("cpu"))
    assert isinstance(loss, LpipsLoss)
    assert th.equal(th.get_rng_state(), random_state)  # the networks of the model get the same weights with and without
    assert not any(module.training for module in loss.modules())
    assert not any(param.requires_grad for param in loss.parameters())

    x = th.zeros(2, *IMAGE_SHAPE)
    x_hat = th.stack([th.full(IMAGE_SHAPE, 0.5), th.full(IMAGE_SHAPE, -1.0)]).requires_grad_()
    value = loss(x, x_hat)
    assert value.shape == () and value.item() == pytest.approx((0.25 + 1.0) / 2)
    value.backward()
    # d/dx_hat of mean((x_hat - x)^2) over all 2 * 3 * 64 * 64 values
    th.testing.assert_close(x_hat.grad, 2 * x_hat.detach() / x_hat.numel())
    assert all(param.grad is None for param in loss.parameters())


def test_lpips_goes_to_the_device(fake_lpips):
    loss = make_perceptual_loss("lpips", IMAGE_SHAPE, "meta")
    assert all(param.device.type == "meta" for param in loss.parameters())


def test_lpips_can_be_pickled(fake_lpips):
    loss = make_perceptual_loss("lpips", IMAGE_SHAPE, "cpu")
    x, x_hat = th.rand(2, 2, *IMAGE_SHAPE)
    assert pickle.loads(pickle.dumps(loss))(x, x_hat) == loss(x, x_hat)


@pytest.mark.parametrize("n_channels", [1, 2, 4])
def test_other_channels_are_grey_images(fake_lpips, n_channels):
    loss = make_perceptual_loss("lpips", (n_channels, 16, 20), "cpu")
    x = th.rand(2, n_channels, 16, 20)
    loss(x, th.zeros_like(x))
    assert loss.lpips.images.shape == (2 * n_channels, 3, 16, 20)
    for i, image in enumerate(loss.lpips.images):
        for channel in image:
            assert th.equal(channel, x[i // n_channels, i % n_channels])


def test_stacked_frames_are_rgb_images(fake_lpips):
    """``VecFrameStack`` puts whole frames one after the other: RGBRGB."""
    frames = th.rand(2, 4, 3, 16, 20)
    loss = make_perceptual_loss("lpips", (12, 16, 20), "cpu")
    loss(frames.reshape(2, 12, 16, 20), th.zeros(2, 12, 16, 20))
    assert th.equal(loss.lpips.images, frames.reshape(8, 3, 16, 20))


def test_shapes_must_agree(fake_lpips):
    """Broadcasting one image over a batch would give a wrong loss without a word."""
    loss = make_perceptual_loss("lpips", IMAGE_SHAPE, "cpu")
    with pytest.raises(AssertionError, match=r"differ in shape: .*\[2, 3, 64, 64\].*\[1, 3, 64, 64\]"):
        loss(th.zeros(2, *IMAGE_SHAPE), th.zeros(1, *IMAGE_SHAPE))


def test_no_weights(fake_lpips, weights_path, monkeypatch):
    """Without the file, the package that would download it is not even asked."""
    weights_path.unlink()
    monkeypatch.setattr(fake_lpips, "LPIPS", lambda **kwargs: socket.socket())
    check_not_available(IMAGE_SHAPE, f"FileNotFoundError: there is no file {weights_path}", "vgg16(weights='IMAGENET1K_V1')")


def test_no_package(weights_path, monkeypatch):
    weights_path.touch()
    monkeypatch.setitem(sys.modules, "lpips", None)
    check_not_available(IMAGE_SHAPE, "lpips", "pip install lpips", '"perceptual"')


def test_broken_torchvision(fake_lpips, monkeypatch):
    def broken(**kwargs):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(fake_lpips, "LPIPS", broken)
    check_not_available(IMAGE_SHAPE, "RuntimeError: operator torchvision::nms does not exist", f"for torch {th.__version__}")


@pytest.mark.parametrize("height, width", [(15, 64), (64, 15), (8, 8)])
def test_too_small_images(fake_lpips, height, width):
    check_not_available((3, height, width), f"images of {height}x{width} pixels are too small", "at least 16x16 pixels")


def test_true_lpips(weights_path):
    """The true package on random VGG16 weights: where it is installed, it is called rightly, and needs no network."""
    try:
        import lpips  # noqa: F401
        from torchvision.models import vgg16
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs lpips and a torchvision that fits: {error}")
    th.manual_seed(0)
    with th.device("meta"):
        shapes = {name: param.shape for name, param in vgg16().state_dict().items()}
    # zeros in the unused classifier, and only one of them on disk
    weights = {
        name: th.randn(shape) * (2 / shape[1:].numel()) ** 0.5 if name.startswith("features") else th.zeros(1).expand(shape)
        for name, shape in shapes.items()
    }
    th.save(weights, weights_path)

    random_state = th.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = make_perceptual_loss("lpips", IMAGE_SHAPE, "cpu")
    assert th.equal(th.get_rng_state(), random_state)
    assert th.equal(loss.lpips.net.slice1[0].weight, weights["features.0.weight"])
    assert not any(param.requires_grad for param in loss.parameters())
    assert not any(module.training for module in loss.modules())

    x = th.rand(2, 3, 64, 64) * 2 - 1
    x_hat = (x + 0.1 * th.randn_like(x)).requires_grad_()
    value = loss(x, x_hat)
    value.backward()
    assert loss(x, x) == 0 < value < loss(x, -x)
    assert x_hat.grad.isfinite().all() and x_hat.grad.abs().sum() > 0
    # a stack of two RGB images is their mean, and a grey image is that image in RGB
    with th.no_grad():
        stacked = loss(x.reshape(1, 6, 64, 64), x_hat.reshape(1, 6, 64, 64))
        th.testing.assert_close(stacked, value.detach())
        grey = loss(x[:, :1], x_hat[:, :1])
        th.testing.assert_close(grey, loss(x[:, :1].repeat(1, 3, 1, 1), x_hat[:, :1].repeat(1, 3, 1, 1)))
        assert loss(x[..., :16, :16], x_hat[..., :16, :16]) > 0  # the smallest side


# --- robust_tokenizer="auto" ---------------------------------------------------------------------------------------------

AS_GIVEN = {name: value for name, value in SIZES.items() if name != "robust_tokenizer"} | {"image_size": 16}


def make_model(perceptual_loss="auto", policy="CnnPolicy", **kwargs) -> IRIS:
    settings = {**SETTINGS, "perceptual_loss": perceptual_loss, "verbose": kwargs.pop("verbose", 0)}
    return IRIS(policy, FrameEnv(), policy_kwargs={**AS_GIVEN, **kwargs}, **settings)


def is_robust(model: IRIS) -> bool:
    """Whether the networks and what is said of them agree, too."""
    robust = model.policy.tokenizer.robust
    assert model.policy_kwargs["robust_tokenizer"] is model.policy._arguments["robust_tokenizer"] is robust
    assert ("tokenizer.quantizer.idle" in model.policy.state_dict()) == robust
    return robust


@pytest.mark.parametrize("explicit", [None, "auto", True, False])
def test_robust_exactly_without_a_perceptual_loss(fake_lpips, weights_path, explicit, tmp_path):
    """A warning says so once training begins; not before, as a model may be loaded to play."""
    given = {} if explicit is None else {"robust_tokenizer": explicit}
    automatic = explicit in (None, "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_robust(make_model("auto", **given).learn(0)) is (False if automatic else explicit)
        assert is_robust(make_model("lpips", **given).learn(0)) is (False if automatic else explicit)
        assert is_robust(make_model(nn.functional.mse_loss, **given).learn(0)) is (False if automatic else explicit)
        assert is_robust(make_model(None, **given).learn(0)) is (True if automatic else explicit)
        weights_path.unlink()
        model = make_model("auto", **given)
        assert is_robust(model) is (True if automatic else explicit)
        model.save(tmp_path / "model")
        loaded = IRIS.load(tmp_path / "model", env=FrameEnv())
    words = {True: "this tokenizer does not need", False: "the paper's tokenizer loses small moving things"}
    with pytest.warns(UserWarning, match="without LPIPS"):
        loaded.learn(0)
    with pytest.warns(UserWarning, match="without LPIPS") as caught:
        model.learn(0).learn(0)
    assert len(caught) == 1 and caught[0].filename == __file__
    expected = "is trained in a way that needs none (robust_tokenizer='auto')" if automatic else words[explicit]
    assert expected in str(caught[0].message)


def test_images_too_small_for_lpips_are_without(fake_lpips):
    """By the networks' size, which the environment's or ``image_size`` gives."""
    with pytest.warns(UserWarning, match="8x8 pixels are too small"):
        assert is_robust(make_model("auto", image_size=8).learn(0))
    with pytest.warns(UserWarning, match="8x8 pixels are too small"):
        assert is_robust(make_model("auto", image_size=None).learn(0))


def test_none_is_said_at_verbose_only(capsys):
    make_model(None)
    make_model(None, robust_tokenizer=True, verbose=1)
    assert "robust_tokenizer" not in capsys.readouterr().out
    make_model(None, verbose=1)
    assert capsys.readouterr().out.count("robust_tokenizer='auto'") == 1


@pytest.mark.parametrize("value", ["Auto", "", 1, 0, None, [True]])
def test_robust_tokenizer_is_checked(value):
    with pytest.raises(ValueError, match="must be True, False or 'auto'") as error:
        make_model(None, robust_tokenizer=value)
    assert f"robust_tokenizer={value!r}" in str(error.value)


def test_patches_have_no_perceptual_loss(fake_lpips):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="env gives rewards of different size")  # it does
        for loss in ("auto", None):
            make_model(loss, patch_tokenizer=True, image_size=8).learn(4)
    for given in ("lpips", nn.functional.mse_loss):
        with pytest.raises(ValueError, match=r"does not go with patch_tokenizer=True.*leave it out") as error:
            make_model(given, patch_tokenizer=True)
        assert f"perceptual_loss={given!r}" in str(error.value)


@pytest.mark.parametrize("name", ["patch_tokenizer", "relative_positions"])
@pytest.mark.parametrize("value", ["auto", 1, 0, None, [True]])
def test_booleans_of_the_networks_are_checked(name, value):
    with pytest.raises(ValueError, match="must be True or False") as error:
        make_model(None, **{name: value})
    assert f"{name}={value!r}" in str(error.value)


@pytest.mark.filterwarnings("ignore:perceptual_loss")
@pytest.mark.parametrize("with_lpips_first", [True, False])
@pytest.mark.parametrize("way", ["save", "checkpoint"])
def test_files_keep_what_was_settled(tmp_path, fake_lpips, weights_path, with_lpips_first, way):
    """On a machine with LPIPS, then on one without or the other way round: the same networks."""
    if not with_lpips_first:
        weights_path.unlink()
    model = make_model("auto").learn(4)
    if with_lpips_first:
        weights_path.unlink()
    else:
        weights_path.touch()
    assert is_robust(model) is not with_lpips_first
    if way == "save":
        model.save(tmp_path / "model")
        read, place = IRIS.load, tmp_path / "model"
    else:
        model.save_checkpoint(tmp_path / "checkpoints")
        read, place = IRIS.resume, tmp_path / "checkpoints"
    for kwargs in ({}, {"policy_kwargs": AS_GIVEN}, {"policy_kwargs": {**AS_GIVEN, "robust_tokenizer": "auto"}}):
        loaded = read(place, env=FrameEnv(), device="cpu", **kwargs)
        assert is_robust(loaded) is not with_lpips_first
        assert (loaded._perceptual_loss is not None) is not with_lpips_first
        assert_equal(parameters(loaded), parameters(model))


@pytest.mark.parametrize("robust", [True, False])
def test_files_from_before_it_was_settled(tmp_path, robust):
    """They have ``robust_tokenizer`` only where it was given, and it was False by default."""
    model = make_model(None, robust_tokenizer=robust).learn(4)
    if not robust:
        del model.policy_kwargs["robust_tokenizer"]
    model.save(tmp_path / "model")
    model.save_checkpoint(tmp_path / "checkpoints")
    for loaded in (
        IRIS.load(tmp_path / "model"),
        IRIS.load(tmp_path / "model", policy_kwargs=model.policy_kwargs),
        IRIS.resume(tmp_path / "checkpoints", FrameEnv(), device="cpu"),
    ):
        assert loaded.policy.tokenizer.robust is robust
        assert_equal(parameters(loaded), parameters(model))


def test_policies_without_the_argument(tmp_path):
    class Paper(CnnLstmPolicy):
        def __init__(self, observation_space, action_space, lr_schedule, sequence_length, weight_decay, eval_temperature):
            sizes = {**AS_GIVEN, "robust_tokenizer": False}
            super().__init__(
                observation_space, action_space, lr_schedule, sequence_length, weight_decay, eval_temperature, **sizes
            )

    model = IRIS(Paper, FrameEnv(), **SETTINGS)
    assert not model.policy.tokenizer.robust and "robust_tokenizer" not in model.policy_kwargs
    model.save_checkpoint(tmp_path)
    assert not IRIS.resume(tmp_path, FrameEnv(), policy=Paper, device="cpu").policy.tokenizer.robust
