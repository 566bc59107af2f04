"""mimic-video (Video-Action Models) in JAX.

What is named here is the public interface; each name is imported when it is first used, so that `import mimic_video` stays cheap.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimic_video.config import ConfigError as ConfigError
    from mimic_video.config import ExperimentConfig as ExperimentConfig
    from mimic_video.config import experiment_from as experiment_from
    from mimic_video.policy.policy import Policy as Policy
    from mimic_video.training.loop import train as train
    from mimic_video.vam import VideoActionModel as VideoActionModel

__version__ = "0.1.0"

_HOME = {
    "ConfigError": "mimic_video.config",
    "ExperimentConfig": "mimic_video.config",
    "Policy": "mimic_video.policy.policy",
    "VideoActionModel": "mimic_video.vam",
    "experiment_from": "mimic_video.config",
    "train": "mimic_video.training.loop",
}
__all__ = ["ConfigError", "ExperimentConfig", "Policy", "VideoActionModel", "__version__", "experiment_from", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its names are {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)
