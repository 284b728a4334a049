"""NVIDIA GPUs as NVML sees them, read into a frozen snapshot [MVP-010]."""

from typing import Any

import msgspec
import pynvml


class GpuUnavailable(Exception):
    """No NVIDIA GPU can be used; the message says what is missing and how to mend it."""


class Gpu(msgspec.Struct, frozen=True):
    """One device; `vram_bytes` is its total memory."""

    index: int
    name: str
    uuid: str
    vram_bytes: int


class GpuSnapshot(msgspec.Struct, frozen=True):
    """The driver's version and every device it shows."""

    driver: str
    gpus: tuple[Gpu, ...]

    def __str__(self) -> str:
        names = ", ".join(f"{gpu.name} ({gpu.vram_bytes // 2**20} MiB)" for gpu in self.gpus)
        return f"{names}; driver {self.driver}"


_CARVE_OUT = "For CI or a demo without a GPU, set gpu.required = false (LLORCH_GPU_REQUIRED=false)."


def preflight(nvml: Any = pynvml) -> GpuSnapshot:
    """The GPUs of this machine; raises GpuUnavailable, with a different cure for each cause."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise GpuUnavailable(_explain(nvml, error)) from error
    try:
        count = nvml.nvmlDeviceGetCount()
        if not count:
            raise GpuUnavailable(
                "the NVIDIA driver is loaded but shows no GPU: check `nvidia-smi -L`, the BIOS, and, in a "
                f"container, that the devices are passed through. {_CARVE_OUT}"
            )
        return GpuSnapshot(
            _text(nvml.nvmlSystemGetDriverVersion()), tuple(_gpu(nvml, i) for i in range(count))
        )
    except nvml.NVMLError as error:
        raise GpuUnavailable(_explain(nvml, error)) from error
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name, uuid = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle)
    return Gpu(index, _text(name), _text(uuid), int(nvml.nvmlDeviceGetMemoryInfo(handle).total))


def _explain(nvml: Any, error: Exception) -> str:
    missing = (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED)
    if getattr(error, "value", None) in missing:
        return (
            f"no NVIDIA driver ({error}): install the driver for your GPU (Debian: nvidia-driver, Arch: "
            f"nvidia), reboot, and check with `nvidia-smi`. {_CARVE_OUT}"
        )
    return (
        f"the NVIDIA library reports an error ({error}): check `nvidia-smi`; after a driver update, reboot; "
        f"check that this user may open /dev/nvidia*. {_CARVE_OUT}"
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
