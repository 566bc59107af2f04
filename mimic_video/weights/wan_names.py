"""Parameter names of the Wan 2.1 VAE ↔ our paths: as published, and as Hugging Face's diffusers has them (SPEC 1.4)."""

from collections.abc import Iterator

from mimic_video.weights.published import Names, Place

Parts = tuple[tuple[str, str, str, int], ...]

# Parts of a layer: our name, theirs as published and in diffusers, and trailing axes of length one that only theirs have.
_RESIDUAL = (
    ("norm1/scale", "residual.0.gamma", "norm1.gamma", 3),
    ("conv1", "residual.2", "conv1", 0),
    ("norm2/scale", "residual.3.gamma", "norm2.gamma", 3),
    ("conv2", "residual.6", "conv2", 0),
)
_WIDENING = (*_RESIDUAL, ("shortcut", "shortcut", "conv_shortcut", 3))
_ATTENTION = (("norm/scale", "norm.gamma", "norm.gamma", 2), ("qkv", "to_qkv", "to_qkv", 2), ("proj", "proj", "proj", 2))
_RESAMPLING = (("conv", "resample.1", "resample.1", 0),)
_RESAMPLING_TIME = (*_RESAMPLING, ("time_conv", "time_conv", "time_conv", 2))
_ENDS = (
    ("conv_in", "conv1", "conv_in", 0),
    ("norm_out/scale", "head.0.gamma", "norm_out.gamma", 3),
    ("conv_out", "head.2", "conv_out", 0),
)

_MIDDLE = (("resnets.0", _RESIDUAL), ("attentions.0", _ATTENTION), ("resnets.1", _RESIDUAL))
_DOWN = {2: _RESAMPLING, 3: _WIDENING, 5: _RESAMPLING_TIME, 6: _WIDENING, 8: _RESAMPLING_TIME}  # all others: _RESIDUAL
_UP = {3: _RESAMPLING_TIME, 4: _WIDENING, 7: _RESAMPLING_TIME, 11: _RESAMPLING}


def _layers() -> Iterator[tuple[str, str, str, Parts]]:
    """(our prefix, published prefix, diffusers prefix, parts) of everything in the network.

    Our coders keep their three middle layers in the same list as the others: after the encoder's 11, before the decoder's 15.
    """
    yield "", "", "", (("quant_conv", "conv1", "quant_conv", 3), ("post_quant_conv", "conv2", "post_quant_conv", 3))
    for coder, middle_at in (("encoder", 11), ("decoder", 0)):
        yield f"{coder}/", f"{coder}.", f"{coder}.", _ENDS
        for i, (theirs, parts) in enumerate(_MIDDLE):
            yield f"{coder}/layers/{middle_at + i}/", f"{coder}.middle.{i}.", f"{coder}.mid_block.{theirs}.", parts
    for i in range(11):
        parts = _DOWN.get(i, _RESIDUAL)
        yield f"encoder/layers/{i}/", f"encoder.downsamples.{i}.", f"encoder.down_blocks.{i}.", parts
    for i in range(15):
        stage, within = divmod(i, 4)
        theirs = "upsamplers.0" if within == 3 else f"resnets.{within}"
        parts = _UP.get(i, _RESIDUAL)
        yield f"decoder/layers/{3 + i}/", f"decoder.upsamples.{i}.", f"decoder.up_blocks.{stage}.{theirs}.", parts


def _names() -> tuple[Names, Names]:
    published, diffusers = dict[str, Place](), dict[str, Place]()
    for ours, *prefixes, parts in _layers():
        for path, *theirs, ones in parts:
            for names, prefix, name in zip((published, diffusers), prefixes, theirs, strict=True):
                if path.endswith("/scale"):
                    names[prefix + name] = Place(ours + path, ones)
                else:
                    names[f"{prefix}{name}.weight"] = Place(f"{ours}{path}/kernel", ones)
                    names[f"{prefix}{name}.bias"] = Place(f"{ours}{path}/bias")
    return published, diffusers


WAN_VAE_NAMES, DIFFUSERS_VAE_NAMES = _names()
