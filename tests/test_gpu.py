"""The GPU preflight, with NVML's own errors: what is found, and what is said when nothing is."""

from types import SimpleNamespace

import pynvml
import pytest

from llorch.gpu import Gpu, GpuSnapshot, GpuUnavailable, preflight


class FakeNvml:
    """NVML with these devices; `init` and `count` are raised, if given, where they stand."""

    NVMLError = pynvml.NVMLError
    NVML_ERROR_LIBRARY_NOT_FOUND = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    NVML_ERROR_DRIVER_NOT_LOADED = pynvml.NVML_ERROR_DRIVER_NOT_LOADED

    def __init__(self, *names: str | bytes, init: int | None = None, count: int | None = None) -> None:
        self.names = names
        self.init, self.count = init, count
        self.running = False

    def nvmlInit(self) -> None:
        """Start, or fail."""
        self._raise(self.init)
        self.running = True

    def nvmlShutdown(self) -> None:
        """Stop."""
        assert self.running
        self.running = False

    def nvmlDeviceGetCount(self) -> int:
        """How many there are."""
        self._raise(self.count)
        return len(self.names)

    def nvmlSystemGetDriverVersion(self) -> str | bytes:
        """As text or bytes, as the library's version has it."""
        return b"570.86" if isinstance(self.names[0], bytes) else "570.86"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        """The index is as good as any."""
        return index

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:
        """Its name."""
        return self.names[handle]

    def nvmlDeviceGetUUID(self, handle: int) -> str | bytes:
        """Its id, for ever."""
        uuid = f"GPU-{handle}"
        return uuid.encode() if isinstance(self.names[handle], bytes) else uuid

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        """All of it."""
        return SimpleNamespace(total=24 * 2**30)

    def _raise(self, value: int | None) -> None:
        if value is not None:
            raise pynvml.NVMLError(value)


def refusal(nvml: FakeNvml) -> str:
    """What the preflight says."""
    with pytest.raises(GpuUnavailable) as error:
        preflight(nvml)
    assert not nvml.running, "NVML was left open"
    return str(error.value)


@pytest.mark.parametrize("names", [("RTX 4090", "RTX A6000"), (b"RTX 4090", b"RTX A6000")])
def test_the_gpus_of_the_machine_are_told(names: tuple[str | bytes, ...]) -> None:
    """Driver, name, id and memory of each, from libraries that speak text or bytes [MVP-010]."""
    nvml = FakeNvml(*names)
    snapshot = preflight(nvml)
    assert snapshot == GpuSnapshot(
        "570.86",
        (Gpu(0, "RTX 4090", "GPU-0", 24 * 2**30), Gpu(1, "RTX A6000", "GPU-1", 24 * 2**30)),
    )
    assert str(snapshot) == "RTX 4090 (24576 MiB), RTX A6000 (24576 MiB); driver 570.86"
    assert not nvml.running, "NVML was left open"


@pytest.mark.parametrize("value", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_a_missing_driver_is_said_to_be_missing(value: int) -> None:
    """With the way to install one."""
    message = refusal(FakeNvml(init=value))
    assert message.startswith("no NVIDIA driver (")
    assert "install the driver" in message


@pytest.mark.parametrize(
    "nvml",
    [
        FakeNvml(init=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH),
        FakeNvml("RTX", count=pynvml.NVML_ERROR_NO_PERMISSION),
        FakeNvml("RTX", count=pynvml.NVML_ERROR_GPU_IS_LOST),
    ],
)
def test_an_error_of_the_library_is_told_with_its_cause(nvml: FakeNvml) -> None:
    """A driver that was updated, a device that may not be opened: other cures than a missing driver's."""
    cause = str(pynvml.NVMLError(nvml.init or nvml.count))
    message = refusal(nvml)
    assert message.startswith(f"the NVIDIA library reports an error ({cause})")
    assert "/dev/nvidia" in message


def test_a_driver_without_a_device_is_a_third_thing() -> None:
    """The driver is there and sees nothing."""
    assert refusal(FakeNvml()).startswith("the NVIDIA driver is loaded but shows no GPU")


@pytest.mark.parametrize("nvml", [FakeNvml(), FakeNvml(init=pynvml.NVML_ERROR_DRIVER_NOT_LOADED)])
def test_every_refusal_names_the_carve_out(nvml: FakeNvml) -> None:
    """CI and demos learn how to start all the same."""
    assert "gpu.required = false" in refusal(nvml)


def test_the_real_library_says_one_or_the_other() -> None:
    """On any machine the preflight gives a snapshot with a GPU, or a refusal, and nothing else."""
    try:
        assert preflight().gpus
    except GpuUnavailable as error:
        assert "gpu.required" in str(error)  # noqa: PT017
