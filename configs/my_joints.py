"""As my_robot.py, for a robot that is recorded and commanded by its joints: copy this file and fill in what your dataset has.

    python launch/inspect_data.py --dataset=my_joints --register=configs/my_joints.py --source=/data/my_joints/1.0.0

Its experiment has `decoder.action_dim` and `decoder.proprio_dim` of 7, the widths of these layouts.
"""

from data_pipelines.oxe.registry import register
from data_pipelines.oxe.spec import DatasetSpec
from data_pipelines.oxe.standardise import Gripper, joints, vector

MY_JOINTS = register(
    DatasetSpec(
        name="my_joints",
        robot="my_joints",
        primary="image",
        wrist="wrist_image",
        control_hz=30.0,
        features={"action": (7,), "observation/state": (7,)},
        proprio=vector(  # `joints` are in radians; say so if they are not: joints("observation/state[0:6]", unit="degrees")
            joints("observation/state[0:6]"),
            Gripper("observation/state[6:7]", closed=0.0, open=100.0),  # here a share in percent
        ),
        actions=vector(  # targets of the joints, taken as they are
            joints("action[0:6]"),
            Gripper("action[6:7]", closed=0.0, open=100.0),
        ),
    )
)
