"""Counters of a launch, in the order of runtime/counters.h."""

import dataclasses

_INSTRUCTIONS = ("integer", "float", "conversion", "move", "control", "special", "memory", "atomic",
                 "sync", "tensor", "copy")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Counters:
    """What one launch did: counts, from which a roofline can be estimated, and never times.

    instructions: executed by threads, by class
    *_read, *_written: bytes that threads asked for, by memory space
    global_requests, global_sectors, global_sectors_least: warp instructions that touched global
        memory, 32-byte sectors they touched, and the sectors that their bytes would just fill
    shared_requests, shared_wavefronts, shared_wavefronts_least: the same for shared memory; a
        wavefront serves every bank once, more than the least are bank conflicts
    matrix_*: the same for ldmatrix and stmatrix
    tensor_operations: multiplications and additions of mma and wgmma
    """

    instructions: dict[str, int]
    global_read: int
    global_written: int
    shared_read: int
    shared_written: int
    local_read: int
    local_written: int
    global_requests: int
    global_sectors: int
    global_sectors_least: int
    shared_requests: int
    shared_wavefronts: int
    shared_wavefronts_least: int
    matrix_requests: int
    matrix_wavefronts: int
    matrix_wavefronts_least: int
    tensor_operations: int

    @classmethod
    def from_array(cls, values):
        """From the runtime's array."""
        classes = dict(zip(_INSTRUCTIONS, values, strict=False))
        names = [f.name for f in dataclasses.fields(cls)][1:]
        rest = values[len(_INSTRUCTIONS) : len(_INSTRUCTIONS) + len(names)]
        return cls(classes, **dict(zip(names, rest, strict=True)))

    @property
    def sectors_per_request(self):
        """4 is a warp's perfect read of 32 floats, 32 the worst."""
        return self.global_sectors / max(1, self.global_requests)

    @property
    def shared_conflicts(self):
        """Wavefronts beyond the least possible, of ordinary shared accesses."""
        return self.shared_wavefronts - self.shared_wavefronts_least

    @property
    def matrix_conflicts(self):
        """Wavefronts beyond the least possible, of ldmatrix and stmatrix."""
        return self.matrix_wavefronts - self.matrix_wavefronts_least

    def __str__(self):
        lines = ["counts, not times:"]
        busy = {k: v for k, v in self.instructions.items() if v}
        lines.append("  instructions  " + ", ".join(f"{k} {v}" for k, v in busy.items()))
        for space in ("global", "shared", "local"):
            read, written = getattr(self, f"{space}_read"), getattr(self, f"{space}_written")
            if read or written:
                lines.append(f"  {space:13s} {read} bytes read, {written} written")
        lines.append(
            f"  coalescing    {self.global_sectors} sectors in {self.global_requests} requests, "
            f"{self.global_sectors_least} at best"
        )
        lines.append(
            f"  banks         {self.shared_conflicts} conflicts in {self.shared_requests} requests,"
            f" {self.matrix_conflicts} in {self.matrix_requests} of ldmatrix and stmatrix"
        )
        if self.tensor_operations:
            lines.append(f"  tensor cores  {self.tensor_operations} operations")
        return "\n".join(lines)
