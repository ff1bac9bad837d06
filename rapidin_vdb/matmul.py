"""Of which precision matrix products of float32 are: torch has one setting for the whole process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_changed = threading.Condition()
# How many blocks of either kind are under way, and what torch was set to before the first of them.
_exact = 0
_tf32 = 0
_before: tuple[str, str] | None = None
_older = "highest"


def _older_switch() -> str:
    """Return what torch's older switch says; where somebody used the newer ones, it may be unwilling to say."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "high"


@contextmanager
def in_single_precision() -> Iterator[None]:
    """Let products be those of single precision, whatever a program has allowed torch for its own ones.

    Fewer digits, which newer CPUs and GPUs multiply faster, are beyond the bound of rounding by which rows are left
    out. Waits for products under TF32 that other threads are about.
    """
    global _exact, _before, _older
    host, device = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    with _changed:
        _exact += 1  # from here on no others begin under TF32
        while _tf32:
            _changed.wait()
        if _before is None:
            _before = host.fp32_precision, device.fp32_precision
            _older = _older_switch()
            if device.fp32_precision == "tf32":
                # This sets torch's older switch with the newer one; where they differ, some of torch refuses to go on.
                torch.set_float32_matmul_precision("highest")
            host.fp32_precision = "ieee"
    try:
        yield
    finally:
        with _changed:
            _exact -= 1
            if not _exact:
                assert _before is not None
                if _before[1] == "tf32":
                    torch.set_float32_matmul_precision(_older)
                    device.fp32_precision = _before[1]
                host.fp32_precision = _before[0]
                _before = None


@contextmanager
def under_tf32() -> Iterator[None]:
    """Let a GPU's products be those of TF32; of single precision, where another thread is about such ones."""
    global _tf32, _before
    host, device = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    with _changed:
        gives_way = _exact > 0 or (not _tf32 and device.fp32_precision == "tf32")  # or somebody allows it anyway
        if not gives_way:
            _tf32 += 1
            if _tf32 == 1:
                _before = host.fp32_precision, device.fp32_precision
                torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        if not gives_way:
            with _changed:
                _tf32 -= 1
                if not _tf32:
                    assert _before is not None
                    torch.set_float32_matmul_precision("highest")
                    host.fp32_precision, device.fp32_precision = _before
                    _before = None
                    _changed.notify_all()
