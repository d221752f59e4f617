"""
Reads checkpoints of the paper's authors' program: names and shapes only, translated into ours.

Such a file is a PyTorch state dict of tensors, read with ``weights_only=True``: no code in it can run.
"""

import io
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import torch as th

StateDict = dict[str, th.Tensor]


class ReferenceCheckpoint(NamedTuple):
    """A checkpoint in our words."""

    policy_kwargs: dict[str, Any]  # sizes of the networks, read off the tensors' shapes
    sequence_length: int  # steps in the world model's context
    n_actions: int
    state_dict: StateDict  # for our policy


def read_reference_checkpoint(path: str | pathlib.Path | BinaryIO) -> ReferenceCheckpoint:
    """
    Read a checkpoint of the authors' program.

    The number of attention heads leaves no trace in the tensors: it is not among the ``policy_kwargs`` returned.

    :param path: A file, or a file object open for reading.
    :return: Sizes and weights.
    :raises ValueError: If the file is not such a checkpoint.
    """
    file: Any = path if hasattr(path, "read") else open(path, "rb")
    try:
        n_bytes = _check_archive(file)
        reference = th.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no pickle, or half of one, fails in many ways
        raise ValueError(f"path={path!r} is not a PyTorch file of tensors: {error}") from error
    finally:
        if file is not path:
            file.close()
    if not isinstance(reference, dict) or not all(isinstance(value, th.Tensor) for value in reference.values()):
        raise ValueError(f"path={path!r} holds no state dict of tensors, so it is no checkpoint of the authors' program")
    if any(
        value.layout != th.strided or not value.is_contiguous() or value.device.type != "cpu" for value in reference.values()
    ):
        raise ValueError(f"path={path!r} has tensors that are not simply written out, so it is no checkpoint of that program")
    if sum(value.nbytes for value in reference.values()) > 2 * n_bytes:  # one stretch of memory may be many tensors
        raise ValueError(f"path={path!r} has tensors that share their memory, so it is no checkpoint of that program")
    reference = {str(name): value for name, value in reference.items() if not str(name).startswith("tokenizer.lpips.")}
    try:
        return _translate(reference)
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(
            f"path={path!r} is no checkpoint of the authors' program: {error} is missing, or has another shape than there"
        ) from error


def _check_archive(file: BinaryIO) -> int:
    """Its size, once it is known that a zip file among them is whole and unpacks to no more than itself."""
    begin = file.tell()
    n_bytes = file.seek(0, io.SEEK_END) - begin
    file.seek(begin)
    if zipfile.is_zipfile(file):
        archive = zipfile.ZipFile(file)
        if any(info.compress_type != zipfile.ZIP_STORED or info.file_size > n_bytes for info in archive.infolist()):
            raise ValueError("parts of it are compressed, as PyTorch's never are")
        if archive.testzip() is not None:
            raise ValueError(f"its {archive.testzip()} is damaged")
    file.seek(begin)
    return n_bytes


def _translate(reference: StateDict) -> ReferenceCheckpoint:
    def shape(name: str) -> th.Size:
        return reference[name].shape

    channels = shape("tokenizer.encoder.conv_in.weight")[0]
    n_levels = _count(reference, "tokenizer.encoder.down.")
    if n_levels > 12:
        raise ValueError(f"a tokenizer of {n_levels} levels")
    multipliers = [shape(f"tokenizer.encoder.down.{i}.block.0.conv1.weight")[0] // channels for i in range(n_levels)]
    n_actions, embed_dim = shape("world_model.embedder.embedding_tables.0.weight")
    sequence_length = len(reference["world_model.head_rewards.indices"])
    tokens_per_frame = len(reference["world_model.head_observations.indices"]) // sequence_length
    image_size = round(tokens_per_frame**0.5) * 2 ** (n_levels - 1)
    attended = [i for i in range(n_levels) if f"tokenizer.encoder.down.{i}.attn.0.norm.weight" in reference]
    policy_kwargs = {
        "image_size": image_size,
        "codebook_size": shape("tokenizer.embedding.weight")[0],
        "codebook_dim": shape("tokenizer.embedding.weight")[1],
        "latent_channels": shape("tokenizer.pre_quant_conv.weight")[1],
        "tokenizer_channels": channels,
        "channel_multipliers": tuple(multipliers),
        "n_res_blocks": _count(reference, "tokenizer.encoder.down.0.block."),
        "attention_resolutions": tuple(sorted(image_size >> i for i in attended)),
        "n_layers": _count(reference, "world_model.transformer.blocks."),
        "embed_dim": embed_dim,
        "lstm_hidden_size": shape("actor_critic.lstm.weight_hh")[1],
    }

    state_dict: StateDict = {}
    encoder_names = _encoder_names(n_levels, policy_kwargs["n_res_blocks"], attended)
    decoder_names = _decoder_names(n_levels, policy_kwargs["n_res_blocks"], attended)
    for part, names in (("encoder", encoder_names), ("decoder", decoder_names)):
        for index, name in enumerate(names):
            state_dict.update(_layer(reference, f"tokenizer.{name}.", f"tokenizer.{part}.{index}."))
    state_dict["tokenizer.quantizer.codebook"] = reference.pop("tokenizer.embedding.weight")

    state_dict["world_model.position_embedding.weight"] = reference.pop("world_model.pos_emb.weight")
    state_dict["world_model.action_embedding.weight"] = reference.pop("world_model.embedder.embedding_tables.0.weight")
    state_dict["world_model.token_embedding.weight"] = reference.pop("world_model.embedder.embedding_tables.1.weight")
    for ours, theirs in (("token", "observations"), ("reward", "rewards"), ("end", "ends")):
        state_dict.update(_layer(reference, f"world_model.head_{theirs}.head_module.", f"world_model.{ours}_head."))
    state_dict.update(_layer(reference, "world_model.transformer.ln_f.", "world_model.transformer.ln_out."))
    for i in range(policy_kwargs["n_layers"]):
        old, new = f"world_model.transformer.blocks.{i}.", f"world_model.transformer.blocks.{i}."
        for kind in ("weight", "bias"):
            qkv = [reference.pop(f"{old}attn.{name}.{kind}") for name in ("query", "key", "value")]
            state_dict[f"{new}attention.qkv.{kind}"] = th.cat(qkv)
        for ours, theirs in (("ln_1", "ln1"), ("ln_2", "ln2"), ("attention.proj", "attn.proj"), ("mlp", "mlp")):
            state_dict.update(_layer(reference, f"{old}{theirs}.", f"{new}{ours}."))

    for i in range(4):  # each convolution is followed by a pool and a ReLU
        state_dict.update(_layer(reference, f"actor_critic.conv{i + 1}.", f"actor_critic.cnn.{3 * i}."))
    for ours, theirs in (("lstm", "lstm"), ("actor", "actor_linear"), ("critic", "critic_linear")):
        state_dict.update(_layer(reference, f"actor_critic.{theirs}.", f"actor_critic.{ours}."))
    unused = [name for name in reference if not name.endswith((".mask", ".indices"))]
    if unused:  # a network without it would load, but be another one
        raise KeyError(unused[0])
    return ReferenceCheckpoint(policy_kwargs, sequence_length, n_actions, state_dict)


def _count(reference: StateDict, prefix: str) -> int:
    """How many numbered entries there are below a prefix."""
    return len({name[len(prefix) :].split(".")[0] for name in reference if name.startswith(prefix)})


def _layer(reference: StateDict, old: str, new: str) -> StateDict:
    """Takes all tensors below one name of theirs out and gives them under one name of ours."""
    if f"{old}q.weight" in reference:  # spatial attention: ours has one convolution for queries, keys and values
        layer = {f"{new}qkv.{kind}": th.cat([reference.pop(f"{old}{n}.{kind}") for n in "qkv"]) for kind in ("weight", "bias")}
        layer.update(_layer(reference, f"{old}norm.", f"{new}norm."))
        layer.update(_layer(reference, f"{old}proj_out.", f"{new}proj."))
        return layer
    found = {name[len(old) :]: reference.pop(name) for name in list(reference) if name.startswith(old)}
    return {new + name.replace("nin_shortcut", "shortcut"): value for name, value in found.items()}


def _encoder_names(n_levels: int, n_res_blocks: int, attended: list[int]) -> Iterator[str]:
    """Their names of the layers of our encoder, in its order; layers without weights have names that match nothing."""
    yield "encoder.conv_in"
    for level in range(n_levels):
        for block in range(n_res_blocks):
            yield f"encoder.down.{level}.block.{block}"
            if level in attended:
                yield f"encoder.down.{level}.attn.{block}"
        if level < n_levels - 1:
            yield f"encoder.down.{level}.downsample"
    yield from ("encoder.mid.block_1", "encoder.mid.attn_1", "encoder.mid.block_2")
    yield from ("encoder.norm_out", "encoder.silu", "encoder.conv_out", "pre_quant_conv")


def _decoder_names(n_levels: int, n_res_blocks: int, attended: list[int]) -> Iterator[str]:
    """The same for our decoder; their levels count from the highest resolution in both."""
    yield from ("post_quant_conv", "decoder.conv_in")
    yield from ("decoder.mid.block_1", "decoder.mid.attn_1", "decoder.mid.block_2")
    for level in reversed(range(n_levels)):
        for block in range(n_res_blocks + 1):
            yield f"decoder.up.{level}.block.{block}"
            if level in attended:
                yield f"decoder.up.{level}.attn.{block}"
        if level > 0:
            yield f"decoder.up.{level}.upsample"
    yield from ("decoder.norm_out", "decoder.silu", "decoder.conv_out")
