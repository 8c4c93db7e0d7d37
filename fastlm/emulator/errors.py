"""What can go wrong, by who has to act."""


class EmulatorError(Exception):
    """Base of every error of the emulator."""


class TranslationError(EmulatorError):
    """PTX that the translator does not know: the text names the instruction and what to add."""


class CompilerError(EmulatorError):
    """nvcc or g++ is missing, or refused its input."""


class KernelError(EmulatorError):
    """A fault found while a kernel ran.

    Attributes: `kernel`, `reason`, `where` (source file and line, or the PTX line), `block` and
    `thread` (three indices each, or None when the launch itself was refused).
    """

    def __init__(self, kernel, reason, where=None, block=None, thread=None, hint=None, more=()):
        self.kernel, self.reason, self.where = kernel, reason, where
        self.block, self.thread = block, thread
        lines = [f"{kernel}: {reason}"]
        if where:
            lines.append(f"  at {where}")
        if block is not None:
            lines.append(f"  in block {tuple(block)}, thread {tuple(thread)}")
        if hint:
            lines.append(f"  look at: {hint}")
        lines += map(str, more)
        super().__init__("\n".join(lines))
