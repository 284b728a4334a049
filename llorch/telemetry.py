"""What the GPUs do, sampled through NVML every two seconds by a thread of its own.

The one rule: nobody waits for NVML. A driver call may fail or never come back, so readers get the last frozen
snapshot, and `fault` says in words what is wrong with it.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pynvml

log = logging.getLogger("llorch.telemetry")

INTERVAL_S = 2.0
MAX_INTERVAL_S = 30.0
SILENCE_S = 5.0


class GpuUsage(msgspec.Struct, frozen=True):
    """One device now: percent at work, bytes of memory, °C; None where the device can't tell."""

    index: int
    name: str
    uuid: str
    utilization: int | None
    vram_used_bytes: int
    vram_total_bytes: int
    temperature_c: int | None


class GpuReading(msgspec.Struct, frozen=True):
    """All devices that could be read, the driver's version, and what kept the others from it."""

    driver: str | None = None
    gpus: tuple[GpuUsage, ...] = ()
    fault: str | None = None


class GpuSampler:
    """Reads the GPUs from `start` to `stop`; `reading` is what is known now.

    `required`: whether a machine without NVIDIA driver or device is a fault, or just one without a GPU.
    """

    def __init__(
        self, nvml: Any = pynvml, *, required: bool, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._nvml = nvml
        self._required = required
        self._now = now
        self._last = GpuReading()
        self._asked_at: float | None = None
        self._stopped = threading.Event()
        self._open = False
        self._failures = 0

    def start(self) -> None:
        """Begin to sample; returns at once. The thread is a daemon: one that hangs keeps no process alive."""
        threading.Thread(target=self._work, name="gpu-telemetry", daemon=True).start()

    def stop(self) -> None:
        """Sample no more; returns at once, without waiting for a call that NVML has not answered."""
        self._stopped.set()

    @property
    def reading(self) -> GpuReading:
        """The last snapshot; it says so if NVML has not answered since."""
        last, silent_s = self._last, self._silent_s()
        if silent_s < SILENCE_S:
            return last
        fault = (
            f"NVML has not answered for {silent_s:.0f} s: check `nvidia-smi`; a reset or a reboot may help"
        )
        return msgspec.structs.replace(last, fault=fault)

    def _silent_s(self) -> float:
        """For how long NVML has kept a question waiting."""
        asked_at = self._asked_at
        return 0.0 if asked_at is None else self._now() - asked_at

    def free_vram(self, devices: tuple[int, ...]) -> int | None:
        """Bytes free on those GPUs together; None if none is named, or not all are known now."""
        gpus = [gpu for gpu in self._last.gpus if gpu.index in devices]
        if not gpus or len(gpus) < len(devices) or self._silent_s() >= SILENCE_S:
            return None
        return sum(gpu.vram_total_bytes - gpu.vram_used_bytes for gpu in gpus)

    def _work(self) -> None:
        while not self._stopped.is_set():
            self.sample()
            self._stopped.wait(min(INTERVAL_S * 2**self._failures, MAX_INTERVAL_S))
        self._close()

    def sample(self) -> None:
        """Read everything once, in this thread; what fails becomes the reading's `fault`."""
        self._asked_at = self._now()
        try:
            reading = self._read()
        except Exception as error:  # whatever a driver does, it is no more than a fault of the telemetry
            reading = GpuReading(self._last.driver, (), self._explain(error))
            self._close()
        self._failures = 0 if reading.gpus else min(self._failures + 1, 10)
        if reading.fault != self._last.fault:
            self._say(reading.fault)
        self._last, self._asked_at = reading, None

    def _read(self) -> GpuReading:
        nvml = self._nvml
        if not self._open:
            nvml.nvmlInit()
            self._open = True
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        gpus, faults = [], []
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                gpus.append(self._usage(index))
            except nvml.NVMLError as error:
                faults.append(f"GPU {index}: {error}")
        if faults:
            self._close()  # a device that was lost, or a new driver: begin anew
        return GpuReading(driver, tuple(gpus), "; ".join(faults) or self._none_there(gpus))

    def _none_there(self, gpus: list[GpuUsage]) -> str | None:
        return "the NVIDIA driver shows no GPU" if self._required and not gpus else None

    def _usage(self, index: int) -> GpuUsage:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        return GpuUsage(
            index=index,
            name=_text(nvml.nvmlDeviceGetName(handle)),
            uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
            utilization=self._if_told(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            vram_used_bytes=int(memory.used),
            vram_total_bytes=int(memory.total),
            temperature_c=self._if_told(
                lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
            ),
        )

    def _if_told(self, ask: Callable[[], int]) -> int | None:
        """What a device may be unable to tell."""
        try:
            return int(ask())
        except self._nvml.NVMLError as error:
            if getattr(error, "value", None) == self._nvml.NVML_ERROR_NOT_SUPPORTED:
                return None
            raise

    def _explain(self, error: Exception) -> str | None:
        nvml = self._nvml
        missing = (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED)
        if not self._required and getattr(error, "value", None) in missing:
            return None  # a machine without a GPU, as the configuration allows
        if isinstance(error, nvml.NVMLError):
            return f"NVML: {error}: check `nvidia-smi`"
        return f"NVML can't be read: {type(error).__name__}"

    def _say(self, fault: str | None) -> None:
        if fault is None:
            log.info("the GPUs can be read again", extra={"event": "gpu"})
        else:
            log.warning("GPU telemetry: %s", fault, extra={"event": "gpu"})

    def _close(self) -> None:
        if self._open:
            self._open = False
            try:
                self._nvml.nvmlShutdown()
            except self._nvml.NVMLError:
                pass  # it was not open any more


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
