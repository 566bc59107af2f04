"""How many devices the processes have that tests start; fewer than the tests' own eight, as every device costs time."""

import os
import re


def of_each(count):
    """{"XLA_FLAGS": ...} for the environment of a process with `count` simulated devices."""
    return {"XLA_FLAGS": re.sub(r"(device_count)=\d+", rf"\1={count}", os.environ["XLA_FLAGS"])}
