"""Python imports this at its start from PYTHONPATH: a breakpoint in the first step of a learner, for a run that is
debugged, as its user would write it into the code."""

import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec


class _Breaks(MetaPathFinder):
    """Is asked for every module before it is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "learner.rank":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: _with_breakpoint(execute, module)
        return spec


def _with_breakpoint(execute, module):
    execute(module)
    step = module.Rank.step

    def stopping(self, number, groups, demonstrations, weights):
        module.Rank.step = step
        breakpoint()
        return step(self, number, groups, demonstrations, weights)

    module.Rank.step = stopping


sys.meta_path.insert(0, _Breaks())
