"""Which device is meant, and what an error says of one: it failed, after which no process goes on, or is too small."""

from collections.abc import Iterator

import torch

from rapidin_vdb.errors import SpecError
from rapidin_vdb.gradient.memory import is_out_of_memory

# What plain errors say of it: those of CUDA's libraries and driver, and Triton's. For those of CUDA's runtime, such as
# an illegal access, an assertion or an error of memory that could not be corrected, torch has a kind of its own.
_FAILED = ("CUDA error: ", "CUDA driver", "CUDA unknown error", "No CUDA GPUs are available", "cudaGetDeviceCount",
           "cuDNN error: ", "Triton Error [CUDA]: ")  # fmt: skip
# What torch says of a file that has no place in the memory.
_UNMAPPED = "Cannot allocate memory"


def resolve_device(device: str) -> str:
    """Return the device meant by `auto`, or the one named.

    Raises:
        SpecError: no such device here.
    """
    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise SpecError(f"--device {device} is no device; give auto, cpu, cuda or cuda:N") from error
    if kind.type == "cuda":
        found = torch.cuda.device_count()
        if (kind.index or 0) >= found:
            raise SpecError(f"--device {device}: this machine has {found} CUDA devices; give --device cpu")
        return f"cuda:{kind.index or 0}"
    if kind.type != "cpu":
        raise SpecError(f"--device {device} is not supported; give auto, cpu, cuda or cuda:N")
    return "cpu"


def resolve_devices(devices: str) -> list[str]:
    """Return the devices of a list such as `cuda:0,cuda:1`, each once.

    Raises:
        SpecError: one of them is not here.
    """
    return list(dict.fromkeys(resolve_device(name.strip()) for name in str(devices).split(",")))


def device_failure(error: BaseException) -> str | None:
    """Return what an error, or one that it came of, says of a device that failed, on one line; None for any other."""
    for cause in _causes(error):
        if isinstance(cause, RuntimeError) and not is_out_of_memory(cause):
            said = str(cause).strip()
            if isinstance(cause, torch.AcceleratorError) or any(words in said for words in _FAILED):
                # What follows is advice for whoever looks for a bug.
                return said.partition("\n")[0][:300]
    return None


def lacks_memory(error: BaseException) -> bool:
    """Say whether an error, or one that it came of, means that what was to be loaded does not fit the memory."""
    return any(
        is_out_of_memory(cause) or (isinstance(cause, RuntimeError) and _UNMAPPED in str(cause))
        for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
