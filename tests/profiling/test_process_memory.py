import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from recon.profiling import process_memory as memory
from recon.profiling.process_memory import PeakMeter, Peaks, resident_bytes

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("small_heap")]

MIB = 2**20
HAS_STATUS = memory.STATUS.exists()
needs_proc = pytest.mark.skipif(not HAS_STATUS, reason="needs Linux's /proc/self/status")


def is_exact() -> bool:
    return PeakMeter().exact


@pytest.fixture(params=["exact", "sampled"])
def meter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PeakMeter:
    if request.param == "exact":
        if not is_exact():
            pytest.skip("needs a /proc/self/clear_refs that may be written")
    else:
        monkeypatch.setattr(memory, "CLEAR_REFS", Path("/no/such/directory/clear_refs"))
    meter = PeakMeter()
    assert meter.exact == (request.param == "exact")
    return meter


def use(mebibytes: int) -> None:
    """Touch so much memory, for a moment."""
    block = np.ones(mebibytes * MIB // 8)
    time.sleep(0.05)
    del block


@needs_proc
def test_what_was_freed_within_a_phase_counts_for_it_and_not_for_the_next(meter: PeakMeter) -> None:
    meter.start()
    before = resident_bytes()
    use(64)
    assert resident_bytes() - before < 16 * MIB
    first = meter.stop()
    assert 60 * MIB <= first.host_bytes - before <= 96 * MIB
    meter.start()
    second = meter.stop()
    assert second.host_bytes - before < 16 * MIB


@needs_proc
def test_what_is_still_held_counts_for_the_next_phase_too(meter: PeakMeter) -> None:
    before = resident_bytes()
    block = np.ones(64 * MIB // 8)
    meter.start()
    peaks = meter.stop()
    assert peaks.host_bytes - before >= 60 * MIB
    assert block[-1] == 1


def test_what_is_measured_on_this_machine_and_how(meter: PeakMeter) -> None:
    meter.start()
    peaks = meter.stop()
    assert isinstance(peaks, Peaks)
    assert peaks.host_bytes > 10 * MIB
    assert (peaks.device_allocated_bytes is None) == (not torch.cuda.is_available())
    assert meter.method == ("VmHWM, reset per phase" if meter.exact else "resident size sampled every 5 ms")


def test_the_sampler_leaves_no_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CLEAR_REFS", Path("/no/such/directory/clear_refs"))
    before, meter = threading.active_count(), PeakMeter()
    for _ in range(3):
        meter.start()
        assert threading.active_count() == before + 1
        meter.stop()
        assert threading.active_count() == before


@needs_proc
def test_resident_memory_is_that_of_the_kernel() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    import resource

    assert resident_bytes() == pytest.approx(pages * resource.getpagesize(), rel=0.05)


def test_without_proc_the_peak_of_the_process_is_the_best_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "STATUS", Path("/no/such/status"))
    monkeypatch.setattr(memory, "CLEAR_REFS", Path("/no/such/directory/clear_refs"))
    meter = PeakMeter()
    meter.start()
    assert meter.stop().host_bytes == resident_bytes() > 10 * MIB


@needs_proc
def test_a_field_that_the_kernel_does_not_have_is_named() -> None:
    with pytest.raises(OSError, match="has no VmNothing"):
        memory._status_bytes("VmNothing")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_memory_is_measured_per_phase() -> None:
    meter = PeakMeter()
    meter.start()
    block = torch.ones(64 * MIB, dtype=torch.uint8, device="cuda")
    del block
    first = meter.stop()
    meter.start()
    second = meter.stop()
    assert first.device_allocated_bytes is not None
    assert second.device_allocated_bytes is not None
    assert first.device_allocated_bytes - second.device_allocated_bytes >= 64 * MIB
    assert (first.device_reserved_bytes or 0) >= first.device_allocated_bytes
