"""Which precision the networks are trained in."""

import torch as th


def autocast_dtype(amp: str | None, device: th.device, embed_dim: int) -> th.dtype | None:
    """
    :param amp: ``"auto"``, ``"bfloat16"`` or None.
    :param device: Where the networks are.
    :param embed_dim: Embedding size of the world model.
    :return: The type that ``torch.autocast`` casts to; None if all is float32.
    :raises ValueError: If ``amp`` is something else.
    """
    if amp not in ("auto", "bfloat16", None):
        raise ValueError(f"amp={amp!r} must be 'auto', 'bfloat16' or None, which trains in float32")
    # On a CPU the casts cost more than they save in small networks, see benchmarks/SPEED.md
    pays_off = device.type == "cuda" or embed_dim >= 256
    if amp == "bfloat16" or (amp == "auto" and pays_off and _computes_bfloat16(device)):
        return th.bfloat16
    return None


def _computes_bfloat16(device: th.device) -> bool:
    """Whether the hardware multiplies bfloat16 numbers itself."""
    if device.type == "cuda":
        return th.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        return any(
            getattr(th.cpu, f"_is_{unit}_supported", lambda: False)()  # not in all releases of PyTorch
            for unit in ("avx512_bf16", "amx_tile")
        )
    return False
