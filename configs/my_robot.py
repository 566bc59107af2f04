"""A dataset of your own robot: copy this file, fill in what your dataset has, and check it before anything is trained:

    python launch/inspect_data.py --dataset=my_robot --register=configs/my_robot.py --source=/data/my_robot/1.0.0

That names every feature that is missing or has another shape, and draws windows and action histograms. For training, put it
beside your experiment's file, which says `import my_robot`. Features are RLDS paths below `steps/`; all parts of layouts and
encodings of rotations are in data_pipelines/oxe/standardise.py, and entries to copy from in data_pipelines/oxe/registry.py.
"""

from data_pipelines.oxe.registry import register
from data_pipelines.oxe.spec import DatasetSpec
from data_pipelines.oxe.standardise import Gripper, Turn, Values, pose

MY_ROBOT = register(
    DatasetSpec(
        name="my_robot",
        robot="my_robot",  # whose it is: a decoder does not tell datasets of one robot apart
        primary="image",  # keys under steps/observation; leave out cameras that there are not
        wrist="wrist_image",
        language="language_instruction",
        control_hz=10.0,  # steps per second as recorded; videos and actions are resampled from it
        features={"action": (7,), "observation/state": (7,)},  # shape per step of all that is read below
        proprio=pose(  # absolute, in metres in the base frame
            Values("observation/state[0:3]"),
            Turn("observation/state[3:6]", "euler_xyz"),
            Gripper("observation/state[6:7]", closed=0.0, open=0.08),  # here a width in metres
        ),
        actions=pose(  # `delta` for commanded steps, `vector` for joints; None without actions: stage 1 only
            Values("action[0:3]"),
            Turn("action[3:6]", "euler_xyz"),
            Gripper("action[6:7]", closed=-1.0, open=1.0, binary=True),
        ),
    )
)
