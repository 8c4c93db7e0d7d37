"""Triton kernels, installed as fastlm.kernels. Nothing imports them at start-up, so that a machine
without Triton works.
"""

if __name__ != "fastlm.kernels":
    raise ImportError(
        "these are fastlm's Triton kernels: import them as fastlm.kernels, not as " + __name__
    )
