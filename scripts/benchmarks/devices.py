"""A device to measure: whether it is there, how it times, and what it needs beside torch's own operators."""

from __future__ import annotations

import os
import platform
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor

from mxfp8_ops import ops
from mxfp8_ops.cpu import build, library
from mxfp8_ops.environment import DEPENDENT_LAUNCH

from . import cpu_reading, others, processor
from .options import Options, Record, Shape
from .timing import Calls, CpuTimer, CudaTimer, Timer
from .weight import Weight, random_weight

DEPENDENT_ROWS = 64
"""Up to so many rows of x dependent launches are measured: with more, kernels take long."""


class Device(ABC):
    """Where the benchmark runs. Another one is a subclass, an entry in ``DEVICES``, and its name in ``options``."""

    place: ClassVar[str]
    """Where torch makes tensors."""
    rotated_bytes: ClassVar[int]
    """More than its caches hold."""
    read_configurations: ClassVar[Sequence[Any]]
    """Ways of ``read``, of which the fastest counts."""
    packs: ClassVar[bool] = True
    """Whether there are packed weights; R reads these, else the canonical ones."""
    units: ClassVar[Sequence[str]] = ("R", "B")
    """Columns as multiples of which every time of a linear is given."""

    def __init__(self, timer: Timer) -> None:
        self.timer = timer

    @classmethod
    @abstractmethod
    def open(cls) -> Device:
        """The device, with its timer."""

    @classmethod
    @abstractmethod
    def missing(cls) -> str | None:
        """Why it cannot be measured here, None if it can."""

    @abstractmethod
    def environment(self) -> Record:
        """Its name under "device", and versions of what decides about speed."""

    @abstractmethod
    def read(self, words: Tensor, configuration: Any) -> None:
        """Reads the int32 tensor and does next to nothing with it."""

    def state(self) -> Record:
        """Its clock, ``mhz``, and what it draws, ``watts``, at this moment, as far as they are known."""
        return {}

    def marks(self, options: Options) -> Record:
        """What every record says beside its results."""
        return {}

    def weight(self, shape: Shape, dtype: torch.dtype) -> Weight:
        """A random one for x of ``dtype``."""
        return random_weight(shape, dtype, self.place, self.packs)

    def further(self, weights: Sequence[Weight], x: Tensor) -> dict[str, Calls]:
        """Columns of a linear that only this device has."""
        return {}

    def compile(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        torch.compiler.reset()  # every weight has its own code: no limit of recompiles is met
        return torch.compile(function, dynamic=False)

    def copies(self, size: int) -> int:
        """How many weights of ``size`` bytes are more than the caches hold."""
        return max(3, self.rotated_bytes // size + 1)

    @abstractmethod
    def release(self) -> None:
        """Gives back memory that is not in use."""


def cuda_timer() -> CudaTimer:
    """Before each column it reads more than caches hold: else the cache would still hold what the column before has
    written, and write it to memory on the time of this one. A reader that follows an emulation took 4 % longer so.
    """
    return CudaTimer(torch.cuda, torch.zeros(Cuda.rotated_bytes // 4, dtype=torch.int32, device="cuda").sum)


class Cuda(Device):
    place = "cuda"
    rotated_bytes = 300 << 20
    read_configurations = ((2048, 4), (4096, 2), (1024, 4))

    @classmethod
    def open(cls) -> Cuda:
        return cls(cuda_timer())

    @classmethod
    def missing(cls) -> str | None:
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        try:
            import triton  # noqa: F401
        except ImportError:
            return "the package triton is not installed"
        return None

    def further(self, weights: Sequence[Weight], x: Tensor) -> dict[str, Calls]:
        """What it is worth that a kernel may start before the one before it has ended: in a graph, which is nothing but
        one after the other.
        """
        if len(x) > DEPENDENT_ROWS:
            return {}
        return {"packed, dependent": [partial(_dependent, weight, x) for weight in weights]}

    def environment(self) -> Record:
        import triton

        name = torch.cuda.get_device_name()
        found = {"device": name, "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
        switches = {name: value for name, value in os.environ.items() if name.startswith("MXFP8_")}
        return found | {"python": platform.python_version(), "clocks": self._clocks(), "switches": switches}

    def read(self, words: Tensor, configuration: tuple[int, int]) -> None:
        from . import reading

        reading.read(words, *configuration)

    def release(self) -> None:
        torch.cuda.empty_cache()

    def state(self) -> Record:
        found = _told("clocks.sm", "power.draw")
        return {} if found is None else {"mhz": int(found[0]), "watts": round(found[1])}

    def _clocks(self) -> Record | None:
        """MHz of the multiprocessors while they multiply, and at most; None where nvidia-smi does not tell."""
        one = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
        for _ in range(500):  # some 0.8 s, in which nvidia-smi looks
            one @ one
        found = _told("clocks.sm", "clocks.max.sm")
        torch.cuda.synchronize()
        return None if found is None else {"sm": int(found[0]), "sm_max": int(found[1])}


def _told(*names: str) -> list[float] | None:
    """What nvidia-smi says of the device; None where it says nothing."""
    query = [f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    which = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"
    try:
        result = subprocess.run(["nvidia-smi", which, *query], capture_output=True, text=True, timeout=20, check=True)
        return [float(value) for value in result.stdout.split(",")]
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def cpu_level() -> str:
    """Of the kernels that compute ``mxfp8::linear`` on the CPU."""
    own = ops.kernel_name("linear", torch.device("cpu")) != "reference"
    return (library.level() if own else None) or "reference"


class Cpu(Device):
    place = "cpu"
    read_configurations = (1, 4, "torch")
    packs = False
    units = ("R", "B", "canonical")

    def __init__(self, timer: Timer) -> None:
        super().__init__(timer)
        self.caches = processor.caches()
        self.level = cpu_level()
        self._reader = cpu_reading.reader()

    @classmethod
    def open(cls) -> Cpu:
        return cls(CpuTimer())

    @classmethod
    def missing(cls) -> str | None:
        return None

    @property
    def rotated_bytes(self) -> int:  # type: ignore[override]
        """More than four times the last cache, as far as memory goes: a run has every weight in three forms."""
        largest = max([*self.caches.values(), 8 << 20])
        return min(4 * largest + 1, processor.available_memory() // 16)

    def environment(self) -> Record:
        found: Record = {"device": processor.model(), "place": self.place, "level": self.level, "caches": self.caches}
        found |= {"threads": torch.get_num_threads(), "rotated": self.rotated_bytes, "torch": torch.__version__}
        found |= {"compiler": build.compiler_version(), "python": platform.python_version()}
        found |= {"load": round(os.getloadavg()[0], 1), "torchao": others.version_of_torchao()}
        switches = ("MXFP8_CPU_LEVEL", "MXFP8_KERNELS", "OMP_NUM_THREADS")
        return found | {"switches": {name: os.environ[name] for name in switches if name in os.environ}}

    def read(self, words: Tensor, configuration: Any) -> None:
        if configuration == "torch" or self._reader is None:
            words.sum()
        else:
            self._reader(words.data_ptr(), words.numel() // 2, configuration, torch.get_num_threads())

    def marks(self, options: Options) -> Record:
        return {"place": self.place, "level": self.level, "dtype": options.dtype}

    def further(self, weights: Sequence[Weight], x: Tensor) -> dict[str, Calls]:
        return others.columns([weight.canonical for weight in weights], x)

    def release(self) -> None:
        pass


def _dependent(weight: Weight, x: Tensor) -> Tensor:
    with patch.dict(os.environ, {DEPENDENT_LAUNCH: "1"}):
        return weight.linear_packed(x)


DEVICES: dict[str, type[Device]] = {"cuda": Cuda, "cpu": Cpu}
