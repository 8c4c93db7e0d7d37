"""A copy of the tree, built for one instruction set in a way of its own, and its tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPIED = ("csrc", "fastlm", "kernels", "tests", "setup.py", "pyproject.toml", "README.md")


def replace_once(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    if text.count(old) != 1:
        raise SystemExit(f"{path.name} holds {old!r} {text.count(old)} times, not once")
    path.write_text(text.replace(old, new))


class TreeCopy:
    """In `folder`, for this machine's best instruction set; `environment` holds for every run."""

    def __init__(self, folder: Path, **environment: str):
        self.folder = folder.resolve()
        self.environment = {
            **os.environ, "PYTHONPATH": str(self.folder), "FASTLM_CUDA": "0",
            "OMP_WAIT_POLICY": "passive", **environment,
        }  # fmt: skip
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.so", "emulator")
                shutil.copytree(source, self.folder / name, ignore=ignored)
            elif source.exists():
                shutil.copy(source, self.folder / name)
        self.isa = self._keep_one_isa()

    def _keep_one_isa(self) -> str:
        from fastlm import _cpu

        best = _cpu.available_isas()[0]
        dispatch = self.folder / "csrc" / "cpu" / "dispatch.cpp"
        text = dispatch.read_text()
        line = next(s for s in text.splitlines() if s.endswith("X(avx2) X(baseline)"))
        replace_once(dispatch, line, f"#define FASTLM_FOR_EACH_ISA(X) X({best})")
        replace_once(
            self.folder / "setup.py",
            "return ISAS if x86",
            f'return {{"{best}": ISAS["{best}"]}} if x86',
        )
        return best

    def build(self) -> None:
        found = self.run("setup.py", "build_ext", "--inplace")
        if found.returncode:
            raise SystemExit(f"the copy does not build\n{found.stdout}{found.stderr}")

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess:
        """A Python command in the copy."""
        return subprocess.run(
            [sys.executable, *command], cwd=self.folder, capture_output=True, text=True,
            env={**self.environment, **environment},
        )  # fmt: skip

    def check_it_is_imported(self, **environment: str) -> None:
        found = self.run("-c", "import fastlm._cpu as m; print(m.__file__)", **environment)
        if not found.stdout.startswith(str(self.folder)):
            raise SystemExit(f"the copy's tests would test {found.stdout}{found.stderr}")
