"""Says which kernel a call would run on, and why the others are passed over."""

from .backend import KERNELS, asked_for, describe


def explain(op: str, *args, **kwargs) -> None:
    """Print, for a call of ops.<op>, each kernel and why it is taken or passed over.

    Raises ValueError for an unknown op.
    """
    print(explanation(op, *args, **kwargs))


def explanation(op: str, *args, **kwargs) -> str:
    """The text that `explain` prints."""
    from fastlm import ops

    if op not in ops.__all__:
        raise ValueError(f"explain: op: expected one of {', '.join(ops.__all__)}, got {op!r}")
    kernels = KERNELS["attention" if op == "scaled_dot_product_attention" else op]
    x, form, needs = ops.describe_call(op, *args, **kwargs)
    lines, taken = [f"{op} on {describe(x)}" + (f" with {form}" if form else "")], False
    wanted, base, emulated = asked_for()
    for kernel in kernels:
        reason = kernel.why_not(x, form, emulated, needs)
        if base not in (None, kernel.name):
            reason = f"{wanted} is asked for"
        verdict = "not needed: one above is taken" if taken else "taken"
        lines.append(f"  {kernel.name:7} " + (f"no: {reason}" if reason else verdict))
        taken = taken or reason is None
    return "\n".join(lines)
