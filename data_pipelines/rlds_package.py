"""The one place where the `rlds` package is imported: as the judge of what we write, never to train or to read."""

import importlib
import importlib.util
import sys
import types


def import_rlds() -> types.ModuleType:
    """The module `rlds`, which as installed lacks a dependency: it imports `reverb` and does not ask pip for it.

    Where `reverb` is not installed, a stand-in with the names that `rlds` mentions is there while it is imported, and gone
    afterwards. Everything but `rlds.transformations.pattern`, which is about Reverb, then works. `rlds` imports TensorFlow: call
    this in a process that has not imported JAX.

    Raises:
        ModuleNotFoundError: if `rlds` or TensorFlow is not installed.
    """
    stand_in = "reverb" not in sys.modules and importlib.util.find_spec("reverb") is None
    if stand_in:
        sys.modules["reverb"] = types.ModuleType("reverb", "Stand-in: Reverb is not installed.")
        mentioned = types.SimpleNamespace(Config=object, ReferenceStep=object, Pattern=object, Condition=object)
        vars(sys.modules["reverb"])["structured_writer"] = mentioned
    try:
        return importlib.import_module("rlds")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the rlds package needs: pip install rlds tensorflow-cpu ({error})") from error
    finally:
        if stand_in:
            del sys.modules["reverb"]
