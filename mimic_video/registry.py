"""Parts that a configuration names: tokenizers, backbones, text encoders, simulators.

A name is one that was registered, or "module:attribute", which is imported and so is found wherever a configuration is read: in
worker processes, in a policy server, after a restart.

    @TOKENIZERS.register("mine")
    class Mine(nnx.Module): ...

What a part has to have, say the protocols of mimic_video/models/protocols.py and evaluation/simulators.py.
"""

import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mimic_video.errors import ConfigError

Part = TypeVar("Part", bound=Callable[..., Any])


class Registry:
    """Names → parts. Those of this package are imported when they are asked for.

    Args:
        field: of the configuration, for errors.
        parts: "module:attribute" of each name.
    """

    def __init__(self, field: str, parts: Mapping[str, str]):
        self._field, self._parts = field, dict[str, Any](parts)

    def register(self, name: str) -> Callable[[Part], Part]:
        """A decorator that gives a part its name; the same part again, as of a module that is run twice, changes nothing.

        Raises:
            ValueError: if another part has the name, or it has a colon.
        """

        def add(part: Part) -> Part:
            if ":" in name or _place(self._parts.get(name, part)) != _place(part):
                raise ValueError(f"{self._field} {name!r} has a colon, or is another part's; expected a name of its own")
            self._parts[name] = part
            return part

        return add

    def __getitem__(self, name: str) -> Any:
        """The part of that name. Raises ConfigError, saying which there are, if there is none."""
        part, cause = self._parts.get(name, name), None
        if not isinstance(part, str):
            return part
        if ":" in part:
            try:
                return pkgutil.resolve_name(part)
            except (ImportError, AttributeError, ValueError) as error:
                cause = error
        raise ConfigError(
            f"config field '{self._field}' is {name!r}; expected one of {', '.join(map(repr, sorted(self._parts)))}, or "
            "'module:attribute'; a module that registers a part has to be imported in the experiment's file"
            + (f" ({cause})" if cause else "")
        ) from cause


def _place(part: Any) -> str:
    return part if isinstance(part, str) else f"{part.__module__}:{part.__qualname__}"


TOKENIZERS = Registry(
    "tokenizer.kind",
    {"pca": "mimic_video.models.patch_tokenizer:PatchTokenizer", "wan": "mimic_video.models.wan_vae:WanVAE"},
)
BACKBONES = Registry("backbone.kind", {"cosmos": "mimic_video.models.video_dit:VideoDiT"})
SIMULATORS = Registry("evaluation.simulator", {"metaworld": "mimic_video.evaluation.metaworld:make_factory"})
TEXT_ENCODERS = Registry(
    "text.kind", {"hash": "mimic_video.models.text:HashTextEncoder", "t5": "mimic_video.models.text:T5TextEncoder"}
)
