"""fastlm's benchmarks: `python -m benchmarks` prints every op beside its baselines, its error and
its floor.
"""
