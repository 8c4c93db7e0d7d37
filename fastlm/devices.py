"""Which device a name means, and whether it is here."""

import torch


def find_device(name: str, op: str) -> torch.device:
    """The device of that name; ValueError if it is no name, or torch finds no such device."""
    try:
        device = torch.device(name)
        module = torch.get_device_module(device)
        count = module.device_count() if module.is_available() else 0
    except (RuntimeError, AttributeError) as error:
        raise ValueError(
            f"{op}: device: expected cpu, cuda, cuda:1 or another of torch's, got {name!r}"
        ) from error
    if (device.index or 0) >= count:
        raise ValueError(
            f"{op}: device: expected one that torch finds on this machine, got {name!r}: "
            f"torch {torch.__version__} finds {count} of {device.type}"
        )
    return device
