"""A dataset of one's own robot as a user would register it, in another layout than ours."""

from data_pipelines.oxe.registry import register
from data_pipelines.oxe.spec import DatasetSpec
from data_pipelines.oxe.standardise import Values, vector

POINT_ROBOT = register(
    DatasetSpec(
        name="point_robot",
        robot="point",
        primary="camera",
        language="language_instruction",
        control_hz=5.0,
        features={"action": (4,), "observation/state": (5,)},
        proprio=vector(Values("observation/state[1:4]")),
        actions=vector(Values("action[2:4]", scale=0.5)),
    )
)
