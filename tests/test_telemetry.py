"""GPU telemetry against a fake of NVML: what is read, what is said when it fails, and that nobody waits."""

import logging
import threading
from types import SimpleNamespace

import aiohttp
import pynvml
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch.telemetry import GpuReading, GpuSampler, GpuUsage
from tests import child
from tests.fakes import PATIENCE_S, FakeLlamaServer
from tests.test_gpu import FakeNvml

NOT_SUPPORTED, LOST = pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_GPU_IS_LOST


class BusyNvml(FakeNvml):
    """Devices at work. `faults` are raised by the function of that name, for the device if one is given.

    `gate`: hold every call of `nvmlDeviceGetCount` until it is set; `asked` is set when one has come.
    """

    NVML_ERROR_NOT_SUPPORTED = NOT_SUPPORTED
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU

    def __init__(self, *names: str | bytes, init: int | None = None) -> None:
        super().__init__(*names, init=init)
        self.faults: dict[tuple[str, int | None], Exception] = {}
        self.memory: dict[int, SimpleNamespace] = {}
        self.inits = 0
        self.samples = 0
        self.asked = threading.Event()
        self.gate: threading.Event | None = None

    def fail(self, name: str, error: Exception | int, device: int | None = None) -> None:
        """Raise it from now on."""
        self.faults[name, device] = pynvml.NVMLError(error) if isinstance(error, int) else error

    def _fault(self, name: str, device: int | None = None) -> None:
        for key in ((name, device), (name, None)):
            if key in self.faults:
                raise self.faults[key]

    def nvmlInit(self) -> None:
        """Count it."""
        assert not self.running, "opened twice"
        self.inits += 1
        super().nvmlInit()

    def nvmlShutdown(self) -> None:
        """May fail too."""
        super().nvmlShutdown()
        self._fault("nvmlShutdown")

    def nvmlDeviceGetCount(self) -> int:
        """Wait at the gate, if there is one."""
        self.samples += 1
        self.asked.set()
        if self.gate is not None:
            assert self.gate.wait(PATIENCE_S), "the test never opened the gate"
        self._fault("nvmlDeviceGetCount")
        return super().nvmlDeviceGetCount()

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        """A quarter is in use, unless `memory` says otherwise."""
        self._fault("nvmlDeviceGetMemoryInfo", handle)
        return self.memory.get(handle, SimpleNamespace(total=24 * 2**30, used=6 * 2**30))

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        """Device n does 90 + n percent."""
        self._fault("nvmlDeviceGetUtilizationRates", handle)
        return SimpleNamespace(gpu=90 + handle, memory=1)

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        """Of the one sensor there is."""
        assert sensor == self.NVML_TEMPERATURE_GPU
        self._fault("nvmlDeviceGetTemperature", handle)
        return 60 + handle


def usage(index: int, **other: int | None) -> GpuUsage:
    """What the fake says of a device."""
    told = {"utilization": 90 + index, "temperature_c": 60 + index} | other
    return GpuUsage(
        index,
        f"RTX {index}",
        f"GPU-{index}",
        told["utilization"],
        6 * 2**30,
        24 * 2**30,
        told["temperature_c"],
    )


def sampled(nvml: BusyNvml, *, required: bool = True) -> GpuReading:
    """What one sampling gives."""
    sampler = GpuSampler(nvml, required=required)
    sampler.sample()
    return sampler.reading


@pytest.mark.parametrize("names", [("RTX 0", "RTX 1"), (b"RTX 0", b"RTX 1")])
def test_every_device_is_read(names: tuple[str | bytes, ...]) -> None:
    """Name, id, load, memory and temperature of each, and the driver, from text or bytes."""
    assert sampled(BusyNvml(*names)) == GpuReading("570.86", (usage(0), usage(1)), None)


def test_nvml_is_opened_once() -> None:
    """However often it is sampled."""
    nvml = BusyNvml("RTX 0")
    sampler = GpuSampler(nvml, required=True)
    for _ in range(3):
        sampler.sample()
    assert (nvml.inits, nvml.samples) == (1, 3)


def test_what_a_device_cannot_tell_is_none() -> None:
    """Not supported is no fault."""
    nvml = BusyNvml("RTX 0")
    nvml.fail("nvmlDeviceGetUtilizationRates", NOT_SUPPORTED)
    nvml.fail("nvmlDeviceGetTemperature", NOT_SUPPORTED)
    assert sampled(nvml) == GpuReading("570.86", (usage(0, utilization=None, temperature_c=None),), None)


@pytest.mark.parametrize("name", ["nvmlDeviceGetMemoryInfo", "nvmlDeviceGetTemperature"])
def test_a_lost_device_is_said_and_the_others_are_read(name: str) -> None:
    """Once it is back it is read again, by a library opened anew."""
    nvml = BusyNvml("RTX 0", "RTX 1")
    sampler = GpuSampler(nvml, required=True)
    nvml.fail(name, LOST, device=0)
    sampler.sample()
    assert sampler.reading.gpus == (usage(1),)
    assert sampler.reading.fault == f"GPU 0: {pynvml.NVMLError(LOST)}"
    nvml.faults.clear()
    sampler.sample()
    assert sampler.reading == GpuReading("570.86", (usage(0), usage(1)), None)
    assert nvml.inits == 2


@pytest.mark.parametrize(
    ("required", "value", "fault"),
    [
        (True, pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "NVML: "),
        (True, pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "NVML: "),
        (True, pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "NVML: "),
        (False, pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "NVML: "),
        (False, pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, None),
        (False, pynvml.NVML_ERROR_DRIVER_NOT_LOADED, None),
    ],
)
def test_a_library_that_does_not_open(required: bool, value: int, fault: str | None) -> None:
    """Is a fault with its cause; where no GPU is required, a machine without a driver is none."""
    reading = sampled(BusyNvml(init=value), required=required)
    assert reading.gpus == ()
    if fault is None:
        assert reading.fault is None
    else:
        assert reading.fault == f"{fault}{pynvml.NVMLError(value)}: check `nvidia-smi`"


@pytest.mark.parametrize(("required", "fault"), [(True, "the NVIDIA driver shows no GPU"), (False, None)])
def test_a_driver_without_a_device(required: bool, fault: str | None) -> None:
    """Is a fault where a GPU is required."""
    nvml = BusyNvml("RTX 0")
    sampler = GpuSampler(nvml, required=required)
    nvml.nvmlSystemGetDriverVersion = lambda: "570.86"  # type: ignore[method-assign]
    nvml.names = ()
    sampler.sample()
    assert sampler.reading == GpuReading("570.86", (), fault)


def test_what_no_driver_should_raise_is_a_fault_too() -> None:
    """Its class is said, and the next sampling begins anew, whatever the shutdown says."""
    nvml = BusyNvml("RTX 0")
    nvml.fail("nvmlDeviceGetCount", OSError("secret /dev/path"))
    nvml.fail("nvmlShutdown", pynvml.NVML_ERROR_UNINITIALIZED)
    sampler = GpuSampler(nvml, required=True)
    sampler.sample()
    assert sampler.reading.fault == "NVML can't be read: OSError"
    nvml.faults.clear()
    sampler.sample()
    assert sampler.reading == GpuReading("570.86", (usage(0),), None)


def test_a_fault_is_logged_when_it_comes_and_when_it_goes(caplog: pytest.LogCaptureFixture) -> None:
    """One line each, however long it lasts."""
    nvml = BusyNvml("RTX 0")
    sampler = GpuSampler(nvml, required=True)
    with caplog.at_level(logging.INFO, "llorch.telemetry"):
        sampler.sample()
        nvml.fail("nvmlDeviceGetCount", LOST)
        sampler.sample()
        sampler.sample()
        nvml.faults.clear()
        sampler.sample()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_a_thread_samples_from_start_to_stop() -> None:
    """It closes the library when it ends."""
    nvml = BusyNvml("RTX 0")
    sampler = GpuSampler(nvml, required=True)
    assert sampler.reading == GpuReading()
    before = set(threading.enumerate())
    sampler.start()
    assert nvml.asked.wait(PATIENCE_S)
    [thread] = set(threading.enumerate()) - before
    sampler.stop()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert (sampler.reading.gpus, nvml.running) == ((usage(0),), False)


def test_a_driver_that_hangs_delays_nobody_and_is_said() -> None:
    """Start, stop and every reading return while a call hangs; the last values stand, with the fault."""
    nvml, clock = BusyNvml("RTX 0"), [100.0]
    sampler = GpuSampler(nvml, required=True, now=lambda: clock[0])
    sampler.sample()
    nvml.asked.clear()
    nvml.gate = threading.Event()
    before = set(threading.enumerate())
    sampler.start()
    assert nvml.asked.wait(PATIENCE_S)
    assert sampler.reading.fault is None
    clock[0] += 7.0
    assert sampler.reading.gpus == (usage(0),)
    assert sampler.reading.fault is not None
    assert sampler.reading.fault.startswith("NVML has not answered for 7 s")
    [thread] = set(threading.enumerate()) - before
    assert thread.daemon, "it would keep the process alive"
    sampler.stop()
    assert thread.is_alive()
    nvml.gate.set()
    thread.join(PATIENCE_S)
    assert sampler.reading.fault is None


@given(
    st.lists(st.tuples(st.integers(0, 2**36), st.integers(0, 2**36)), max_size=5),
    st.lists(st.integers(0, 6), unique=True, max_size=4),
    st.sets(st.integers(0, 4)),
)
@settings(deadline=None, max_examples=60)
def test_free_memory_is_that_of_the_devices_named(
    memory: list[tuple[int, int]], devices: list[int], lost: set[int]
) -> None:
    """The sum over them and no others; not known where none is named, or one of them can't be read."""
    nvml = BusyNvml(*(f"RTX {index}" for index in range(len(memory))))
    for index in lost:
        nvml.fail("nvmlDeviceGetMemoryInfo", LOST, device=index)
    nvml.memory = {
        index: SimpleNamespace(total=free + used, used=used) for index, (free, used) in enumerate(memory)
    }
    sampler = GpuSampler(nvml, required=False)
    assert sampler.free_vram(tuple(devices)) is None, "nothing was read yet"
    sampler.sample()
    known = bool(devices) and all(index < len(memory) and index not in lost for index in devices)
    expected = sum(memory[index][0] for index in devices) if known else None
    assert sampler.free_vram(tuple(devices)) == expected


def test_free_memory_of_long_ago_is_not_known() -> None:
    """While NVML hangs its last figures count for nothing: what they would prefer may be full by now."""
    nvml, clock = BusyNvml("RTX 0"), [100.0]
    sampler = GpuSampler(nvml, required=True, now=lambda: clock[0])
    sampler.sample()
    assert sampler.free_vram((0,)) == 18 * 2**30
    sampler._asked_at = clock[0]
    clock[0] += 4.9
    assert sampler.free_vram((0,)) == 18 * 2**30
    clock[0] += 0.1
    assert sampler.free_vram((0,)) is None


async def test_a_process_starts_serves_and_stops_while_nvml_hangs(fake_engine: FakeLlamaServer) -> None:
    """A driver that never answers keeps nobody from the door, nor the process from its end."""
    hangs = "import pynvml, threading; pynvml.nvmlInit = threading.Event().wait"
    async with child.llorch({"adapter.endpoint": fake_engine.url}, before=hangs) as process:
        async with aiohttp.ClientSession() as session, session.get(f"{process.url}/v1/status") as answer:
            status = await answer.json()
        assert (answer.status, status["gpus"]) == (200, [])
        assert await process.stop() == 0


def test_the_real_library_gives_a_reading() -> None:
    """On any machine: devices, or a reason, and no exception."""
    sampler = GpuSampler(required=True)
    sampler.sample()
    reading = sampler.reading
    assert reading.gpus or reading.fault
    assert all(0 < gpu.vram_used_bytes <= gpu.vram_total_bytes for gpu in reading.gpus)
