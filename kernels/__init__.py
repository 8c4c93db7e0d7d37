"""Triton kernels, installed as fastlm.kernels. Nothing imports them at start-up, so that a machine
without Triton works.

In a clone this folder can also be found as `kernels`, the name of a package on PyPI that others
look for; under that name it offers nothing.
"""

if __name__ != "fastlm.kernels":

    def __getattr__(name: str):
        raise AttributeError(f"{__name__}.{name}: these are fastlm's kernels: use fastlm.kernels")
