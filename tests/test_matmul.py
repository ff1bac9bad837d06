"""Threads that want matrix products of float32 in different precisions, which torch sets for the whole process."""

import threading

import pytest
import torch

from rapidin_vdb.matmul import in_single_precision, under_tf32

HOST, DEVICE = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul


def settings() -> tuple[str, str, str]:
    return torch.get_float32_matmul_precision(), HOST.fp32_precision, DEVICE.fp32_precision


@pytest.fixture(params=["highest", "high", "medium"])
def allowed(request):
    """What a program has allowed torch for its own products."""
    before = settings()
    torch.set_float32_matmul_precision(request.param)
    yield settings()
    torch.set_float32_matmul_precision(before[0])
    HOST.fp32_precision, DEVICE.fp32_precision = before[1:]


def test_each_block_has_its_own_and_leaves_what_was_there(allowed):
    for _ in range(2):
        with in_single_precision():
            assert {HOST.fp32_precision, DEVICE.fp32_precision} == {"ieee"}
            with in_single_precision():
                assert {HOST.fp32_precision, DEVICE.fp32_precision} == {"ieee"}
            with under_tf32():
                assert {HOST.fp32_precision, DEVICE.fp32_precision} == {"ieee"}, "gives way"
        assert settings() == allowed
        with under_tf32(), under_tf32():
            assert DEVICE.fp32_precision == "tf32" and torch.get_float32_matmul_precision() != "highest"
        assert settings() == allowed


def test_single_precision_waits_for_what_another_thread_is_about():
    """And is not undone when that ends."""
    before, begun, end, seen = settings(), threading.Event(), threading.Event(), []

    def gradients():
        with under_tf32():
            begun.set()
            end.wait(60)

    def search():
        with in_single_precision():
            seen.append((HOST.fp32_precision, DEVICE.fp32_precision == "tf32", end.is_set()))

    first, second = threading.Thread(target=gradients), threading.Thread(target=search)
    first.start()
    assert begun.wait(60)
    second.start()
    second.join(0.2)
    assert second.is_alive() and not seen
    end.set()
    first.join(60)
    second.join(60)
    assert seen == [("ieee", False, True)] and settings() == before


def test_many_threads_leave_what_was_there(allowed):
    wrong: list[str] = []

    def work(number: int) -> None:
        for turn in range(200):
            if (number + turn) % 2:
                with in_single_precision():
                    if {HOST.fp32_precision, DEVICE.fp32_precision} != {"ieee"}:
                        wrong.append("fewer digits in a search")
            else:
                with under_tf32():
                    pass

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and settings() == allowed
