"""Puts the host's program into the wheel, if `cargo xtask wheel` names one.

hatchling and not maturin: that would build the program by itself, where this one is there already, and is what was
tested. Without a program the wheel is pure Python, as from `pip install ./clients/python`.
"""

import os

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ProgramHook(BuildHookInterface):
    def initialize(self, version, build_data):
        program = os.environ.get("STRAIT_WHEEL_PROGRAM")
        if program:
            # As a script, so that it is on the PATH wherever the package is installed; `strait.local()` finds it in the
            # installation's record.
            build_data["shared_scripts"][program] = "strait"
            build_data["tag"] = os.environ["STRAIT_WHEEL_TAG"]
            build_data["pure_python"] = False
