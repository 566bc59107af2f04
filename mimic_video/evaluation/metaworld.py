"""Meta-World's tasks and scripted experts, with a software renderer that needs no GPU and no display."""

import atexit
import contextlib
import ctypes.util
import dataclasses
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from mimic_video.errors import ConfigError, nearest
from mimic_video.evaluation.environment import GymObservation, checked_action
from mimic_video.evaluation.simulators import EnvironmentSettings

ACTION_REPEAT = 4  # simulator steps of 12.5 ms per control step
STEP = 0.01 * ACTION_REPEAT  # metres that an action of 1 asks for in a control step

_UPRIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # rot6d of a hand that does not turn
_WIDTHS = {"native": 4, "delta": 10}  # of actions and of proprioception, by layout

INSTRUCTIONS = {
    "assembly-v3": "pick up the wrench and put its ring over the peg",
    "basketball-v3": "pick up the basketball and put it through the hoop",
    "bin-picking-v3": "move the cube from the red bin to the blue bin",
    "box-close-v3": "pick up the lid and close the box",
    "button-press-topdown-v3": "press the button down from above",
    "button-press-topdown-wall-v3": "press the button behind the wall down from above",
    "button-press-v3": "push the button in from the front",
    "button-press-wall-v3": "reach around the wall and push the button in",
    "coffee-button-v3": "press the button on the coffee machine",
    "coffee-pull-v3": "pull the mug away from the coffee machine",
    "coffee-push-v3": "push the mug under the coffee machine",
    "dial-turn-v3": "turn the dial",
    "disassemble-v3": "lift the wrench off the peg",
    "door-close-v3": "close the door",
    "door-lock-v3": "lock the door",
    "door-open-v3": "open the door",
    "door-unlock-v3": "unlock the door",
    "drawer-close-v3": "close the drawer",
    "drawer-open-v3": "open the drawer",
    "faucet-close-v3": "turn the faucet off",
    "faucet-open-v3": "turn the faucet on",
    "hammer-v3": "pick up the hammer and drive the nail into the wood",
    "hand-insert-v3": "push the block into the hole in the table",
    "handle-press-side-v3": "press the handle down from the side",
    "handle-press-v3": "press the handle down",
    "handle-pull-side-v3": "pull the handle up from the side",
    "handle-pull-v3": "pull the handle up",
    "lever-pull-v3": "pull the lever up",
    "peg-insert-side-v3": "pick up the peg and insert it into the hole in the side of the block",
    "peg-unplug-side-v3": "pull the peg out of the hole in the side of the block",
    "pick-out-of-hole-v3": "pick the puck out of the hole",
    "pick-place-v3": "pick up the puck and hold it at the target",
    "pick-place-wall-v3": "pick up the puck and carry it over the wall to the target",
    "plate-slide-back-side-v3": "slide the plate sideways out of the cabinet",
    "plate-slide-back-v3": "slide the plate back out of the cabinet",
    "plate-slide-side-v3": "slide the plate sideways into the cabinet",
    "plate-slide-v3": "slide the plate into the cabinet",
    "push-back-v3": "pull the puck back to the target",
    "push-v3": "push the puck to the target",
    "push-wall-v3": "push the puck around the wall to the target",
    "reach-v3": "move the gripper to the target",
    "reach-wall-v3": "move the gripper over the wall to the target",
    "shelf-place-v3": "pick up the block and place it on the shelf",
    "soccer-v3": "push the soccer ball into the goal",
    "stick-pull-v3": "pick up the stick and pull the thermos with it",
    "stick-push-v3": "pick up the stick and push the thermos with it",
    "sweep-into-v3": "sweep the block into the hole",
    "sweep-v3": "sweep the block off the table",
    "window-close-v3": "slide the window closed",
    "window-open-v3": "slide the window open",
}


# Where each camera looks at, from what distance, azimuth and elevation; or its name in the model.
CAMERAS: dict[str, tuple[tuple[float, float, float], float, float, float] | str] = {
    # Facing the robot from above: left and right of the gripper are left and right in the image, with nothing in front.
    "primary": ((0.0, 0.68, 0.12), 0.95, 270, -50),
    "secondary": ((0.0, 0.68, 0.12), 1.1, 190, -20),  # from the side
    "wrist": "gripperPOV",
}


def make_factory(task: str, settings: EnvironmentSettings) -> "MetaworldFactory":
    """What `evaluation.simulator` = "metaworld" means."""
    return MetaworldFactory(task, settings.image_size, settings.layout, settings.cameras)


@dataclasses.dataclass(frozen=True)
class MetaworldFactory:
    """Makes environments of one task, in this process or, being picklable, in a pool's workers; has an expert and knows the hand.

    Attributes:
        task: a key of `INSTRUCTIONS`.
        image_size: (height, width) of the camera images in pixels.
        layout: of actions and proprioception, "native" or "delta", see `MetaworldEnvironment`.
        cameras: of `CAMERAS`.

    Raises:
        ConfigError: for an unknown task, naming the nearest known one, an unknown layout or camera. Meta-World itself is only
            needed by the call.
    """

    task: str
    image_size: tuple[int, int]
    layout: str = "native"
    cameras: tuple[str, ...] = ("primary",)

    def __post_init__(self):
        if self.task not in INSTRUCTIONS:
            raise ConfigError(f"unknown Meta-World task '{self.task}'; did you mean '{nearest(self.task, INSTRUCTIONS)}'?")
        if min(self.image_size) < 1:
            raise ConfigError(f"image_size is {self.image_size}; expected a positive height and width")
        if self.layout not in _WIDTHS:
            raise ConfigError(f"config field 'evaluation.layout' is {self.layout!r}; expected one of {', '.join(_WIDTHS)}")
        if not self.cameras or not set(self.cameras) <= set(CAMERAS):
            raise ConfigError(f"cameras are {self.cameras}; expected some of {', '.join(CAMERAS)}")

    def __call__(self) -> "MetaworldEnvironment":
        return MetaworldEnvironment(self.task, self.image_size, self.layout, self.cameras)

    def expert(self) -> "MetaworldExpert":
        return MetaworldExpert(self.task, self.layout)

    def hold(self, last: np.ndarray | None, robots: int) -> np.ndarray:
        """Actions (robots, m) of hands that stay where they are, with their fingers as in the last actions, or at rest."""
        native = np.zeros((robots, 4), np.float32)
        if last is not None:
            native[:, 3] = _to_native(last, self.layout)[:, 3]
        return _to_layout(native, self.layout)

    def positions(self, proprio: np.ndarray) -> np.ndarray:
        return proprio[:, :3]

    def commanded_positions(self, actions: np.ndarray) -> np.ndarray:
        return np.cumsum(STEP * np.clip(_to_native(actions, self.layout)[:, :3], -1, 1), axis=0)


class MetaworldEnvironment:
    """A Sawyer arm over a table. Object and goal positions are drawn from the seed at every reset.

    Actions (m=4) are the gripper's displacement along x, y, z in units of 1 cm per simulator step, and the force that closes
    its fingers. The controller saturates each at ±1. Proprioception (p=4) is the gripper's position in metres and its
    opening, 0 closed to 1 open.

    In the layout "delta" the same robot speaks in pose vectors (m=p=10): actions are [displacement in metres per control step |
    rot6d | opening 0 … 1], proprioception is [position | rot6d | opening]. Its hand never turns.

    An episode is never over by itself, nor by success: Meta-World's own limit of 500 simulator steps is lifted, and how long it
    lasts is the caller's decision. The reward is Meta-World's, summed over the simulator steps.
    """

    def __init__(self, task: str, image_size: tuple[int, int], layout: str, cameras: tuple[str, ...]):
        """Prefer `MetaworldFactory`, which checks its arguments. Raises ConfigError when Meta-World or OpenGL is missing."""
        self._instruction, self._layout, self._cameras = INSTRUCTIONS[task], layout, cameras
        self._simulator = _make_simulator(task)
        self._renderer = _renderer_for(task, image_size, self._simulator.model)
        self._state: np.ndarray | None = None

        from gymnasium import spaces

        def real(width: int) -> spaces.Box:
            return spaces.Box(-np.inf, np.inf, (width,), np.float32)

        images = {camera: spaces.Box(0, 255, (*image_size, 3), np.uint8) for camera in cameras}
        self.action_space = real(_WIDTHS[layout])
        self.observation_space = spaces.Dict({**images, "proprio": real(_WIDTHS[layout])})
        self.metadata = {"render_modes": [], "render_fps": 1 / (self._simulator.dt * ACTION_REPEAT)}

    @property
    def state(self) -> np.ndarray:
        """float64 (39,), Meta-World's full observation with object and goal positions: what scripted experts act on."""
        if self._state is None:
            raise RuntimeError("reset the environment first")
        return self._state

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[GymObservation, dict[str, Any]]:
        """Without a seed, the next episode of the last one. There are no options."""
        if seed is not None:
            self._simulator.seed(seed)
        self._simulator.reset()
        self._state = _settled_state(self._simulator)
        return self._observe(), {"instruction": self._instruction}

    def step(self, action: np.ndarray) -> tuple[GymObservation, float, bool, bool, dict[str, Any]]:
        if self._state is None:
            raise RuntimeError("reset the environment before stepping it")
        action = np.clip(_to_native(checked_action(action, _WIDTHS[self._layout]), self._layout), -1, 1)
        success, reward = False, 0.0
        for _ in range(ACTION_REPEAT):
            self._state, simulator_reward, _, _, info = self._simulator.step(action)
            success, reward = success or bool(info["success"]), reward + float(simulator_reward)
        return self._observe(), reward, False, False, {"success": success}

    def close(self) -> None:
        self._simulator.close()
        self._state = None

    def _observe(self) -> GymObservation:
        model, data = self._simulator.model, self._simulator.data
        x, y, z, opening = self.state[:4]
        proprio = (x, y, z, opening) if self._layout == "native" else (x, y, z, *_UPRIGHT, opening)
        images = {camera: self._renderer.render(model, data, camera) for camera in self._cameras}
        return {**images, "proprio": np.asarray(proprio, np.float32)}


class MetaworldExpert:
    """Meta-World's scripted expert of a task. Noise is on x, y, z, before the controller saturates."""

    max_steps = 125  # Meta-World's own limit

    def __init__(self, task: str, layout: str):
        _choose_graphics()  # before Meta-World imports MuJoCo
        from metaworld.policies import ENV_POLICY_MAP

        make_policy: Any = ENV_POLICY_MAP[task]
        self._policy, self._layout = make_policy(), layout
        self.action_layout: Literal["vector", "delta"] = "vector" if layout == "native" else "delta"

    def __call__(
        self, environment: MetaworldEnvironment, noise: float, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Constant")  # "... may be too high": the clip below is what it asks for
            action = np.clip(self._policy.get_action(environment.state), -1, 1).astype(np.float32)
        executed = action.copy()
        executed[:3] += noise * random.standard_normal(3)
        return _to_layout(action, self._layout), _to_layout(executed, self._layout)


def to_delta(action: np.ndarray) -> np.ndarray:
    """Native actions (..., 4) in the layout "delta" (..., 10)."""
    upright = np.broadcast_to(np.asarray(_UPRIGHT, action.dtype), (*action.shape[:-1], 6))
    return np.concatenate([action[..., :3] * STEP, upright, (1 - action[..., 3:]) / 2], axis=-1).astype(action.dtype)


def from_delta(action: np.ndarray) -> np.ndarray:
    """The inverse of `to_delta`; the rotation is not looked at."""
    return np.concatenate([action[..., :3] / STEP, 1 - 2 * action[..., 9:]], axis=-1).astype(action.dtype)


def _to_layout(native: np.ndarray, layout: str) -> np.ndarray:
    return native if layout == "native" else to_delta(native)


def _to_native(actions: np.ndarray, layout: str) -> np.ndarray:
    return actions if layout == "native" else from_delta(actions)


def _make_simulator(task: str) -> Any:
    _choose_graphics()
    try:
        with _graphics_explained():
            import mujoco.gl_context  # noqa: F401
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    except ModuleNotFoundError as error:
        raise ConfigError(f"Meta-World is not installed ({error}): pip install 'mimic-video-jax[sim]'") from error
    simulator = ALL_V3_ENVIRONMENTS[task]()
    simulator._set_task_called = True  # instead of set_task, which would freeze one goal
    simulator._freeze_rand_vec = False
    simulator.seeded_rand_vec = True
    simulator._partially_observable = False  # scripted experts need the goal in `state`
    del simulator.sawyer_observation_space  # cached for the partially observable case; `step` clips the state to it
    simulator.max_path_length = sys.maxsize
    # These dominate the cost of a software-rendered image and have to be off before the renderer is created.
    simulator.model.vis.quality.offsamples = 0
    simulator.model.vis.quality.shadowsize = 0
    simulator.model.light_castshadow[:] = 0
    simulator.model.mat_reflectance[:] = 0
    return simulator


def _settled_state(simulator: Any) -> np.ndarray:
    """The state after a reset, with every body and goal marker where the reset put it.

    Meta-World moves bodies after its last forward pass: without another one, the first image and the first state show
    the drawer or door where the model file has it, not where the episode does.
    """
    import mujoco

    mujoco.mj_forward(simulator.model, simulator.data)
    for name, position in simulator._target_site_config:
        simulator._set_pos_site(name, position)
    state = simulator._get_obs()
    state[18:36] = state[:18]  # the "previous" half: an episode starts at rest
    return state


def _choose_graphics() -> None:
    """Points MuJoCo at a headless OpenGL. It reads the variable once, at import, so a choice made already is left alone."""
    if not sys.platform.startswith("linux") or os.environ.get("MUJOCO_GL"):
        return
    if "mujoco" in sys.modules:
        raise ConfigError("mujoco was imported before its graphics could be chosen: set MUJOCO_GL=osmesa (or egl) in the shell")
    libraries = {"osmesa": "OSMesa", "egl": "EGL"}  # software first: the same image everywhere, and the GPU is left alone
    available = [backend for backend, library in libraries.items() if ctypes.util.find_library(library)]
    if not available:
        raise ConfigError(
            "rendering needs OpenGL without a display, and neither libOSMesa nor libEGL was found: apt-get install libosmesa6"
        )
    os.environ["MUJOCO_GL"] = available[0]


@contextlib.contextmanager
def _graphics_explained() -> Iterator[None]:
    """Makes ConfigErrors of what MuJoCo and PyOpenGL raise where a backend does not work, which is of many kinds."""
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise ConfigError(
            f"environment variable MUJOCO_GL is {os.environ.get('MUJOCO_GL', '')!r}, and MuJoCo cannot render with that here "
            f"({' '.join(str(error).split())}); expected osmesa (apt-get install libosmesa6), egl where a GPU's driver has it, "
            "or no value, for one that is installed"
        ) from error


_gl_context: Any = None  # the process's only one: under OSMesa a second silently returned stale or flipped images
_renderers: dict[tuple[str, tuple[int, ...]], "_Renderer"] = {}


def _renderer_for(task: str, image_size: tuple[int, int], model: Any) -> "_Renderer":
    """The process's renderer for a task: its environments have identical meshes and textures, so one upload serves all."""
    global _gl_context
    key = (task, tuple(image_size))
    with _graphics_explained():
        if _gl_context is None:
            from mujoco.gl_context import GLContext

            _gl_context = GLContext(64, 64)  # any size: images are drawn in MuJoCo's own offscreen buffer
            atexit.register(_release_graphics)
        if key not in _renderers:
            _renderers[key] = _Renderer(model, *image_size)
    return _renderers[key]


def _release_graphics() -> None:
    for renderer in _renderers.values():
        renderer.release()
    _renderers.clear()
    _gl_context.free()


class _Renderer:
    """Draws the same views of any simulator whose model has the assets of the one given here."""

    def __init__(self, model: Any, height: int, width: int):
        import mujoco

        self._mujoco = mujoco
        self._height, self._width = height, width
        model.vis.global_.offheight, model.vis.global_.offwidth = height, width
        _gl_context.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        self._option = mujoco.MjvOption()
        self._cameras = {name: self._camera(model, name) for name in CAMERAS}

    def _camera(self, model: Any, name: str) -> Any:
        camera, place = self._mujoco.MjvCamera(), CAMERAS[name]
        if isinstance(place, str):
            camera.type, camera.fixedcamid = self._mujoco.mjtCamera.mjCAMERA_FIXED, model.camera(place).id
        else:
            camera.lookat[:], camera.distance, camera.azimuth, camera.elevation = place
        return camera

    def render(self, model: Any, data: Any, camera: str) -> np.ndarray:
        """uint8 (height, width, 3) of one of `CAMERAS`."""
        mujoco = self._mujoco
        _gl_context.make_current()
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        view = mujoco.MjrRect(0, 0, self._width, self._height)
        mujoco.mjv_updateScene(model, data, self._option, None, self._cameras[camera], mujoco.mjtCatBit.mjCAT_ALL, self._scene)
        mujoco.mjr_render(view, self._scene, self._context)
        image = np.empty((self._height, self._width, 3), np.uint8)
        mujoco.mjr_readPixels(image, None, view, self._context)
        return np.ascontiguousarray(image[::-1])  # OpenGL counts rows from the bottom

    def release(self) -> None:
        _gl_context.make_current()
        self._context.free()
