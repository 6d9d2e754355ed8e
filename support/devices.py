"""What this machine has and can do: versions, device, dtype, micro-batch; and the memory of its C library."""

import ctypes
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

from config import PPOConfig
from support.errors import UserError

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"


# ----------------------------------------------------------------------------------------------
# Versions


def check_versions() -> None:
    """Refuse a torch or transformers that requirements.txt rules out, before it is imported."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    for line in re.findall(r"(?m)^(?:torch|transformers)\b.*", REQUIREMENTS.read_text(encoding="utf-8")):
        needed = Requirement(line)
        try:
            found = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            found = "0"
        if not needed.specifier.contains(Version(found).base_version):
            found = f"{found} is" if found != "0" else "is not"
            way = "python -m pip install -r requirements.txt"
            raise UserError(f"{needed.name} {found} installed, and {needed} is needed: {way}")


def environment(device) -> dict[str, str]:
    """What a run computes with, by name."""
    import torch

    found = {"Python": platform.python_version()}
    found |= {"torch": torch.__version__}  # which names its CUDA, as 2.15.0+cu132; what pip says may not
    found |= {name: metadata.version(name) for name in ("transformers", "numpy")}
    found |= {"system": platform.platform(), "device": str(device)}
    if device.type == "cuda":
        found["device"] += f" ({torch.cuda.get_device_name(device)})"
        found["CUDA"] = torch.version.cuda or f"ROCm {torch.version.hip}"
        found["CUDA of the driver"] = nvidia_driver()[1]
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        found["architectures"] = " ".join(torch.cuda.get_arch_list())
        found["float32 products"] = torch.get_float32_matmul_precision()  # 'highest' without TF32
    return found


def in_one_line(environment: dict[str, str]) -> str:
    """Of an environment what decides most."""
    names = ("Python", "torch", "transformers", "CUDA", "device")
    return ", ".join(f"{name} {environment[name]}" for name in names if name in environment)


# ----------------------------------------------------------------------------------------------
# Device, dtype, micro-batch


def check_device(device: str) -> None:
    """Refuse an unknown device, or one that this machine lacks."""
    if device in ("auto", "cpu"):
        return
    if not re.fullmatch(r"cuda(:\d+)?|mps", device):
        raise UserError(f"--device {device} is unknown; choose auto, cpu, cuda, cuda:N or mps")
    import torch

    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has no Apple GPU that torch can use; try --device cpu")
    if device.startswith("cuda"):
        number, n_gpus = int(device[5:] or 0), usable_gpus()
        why = why_unusable(number) or (number >= n_gpus and f"torch sees {n_gpus} CUDA GPUs here")
        if why:
            raise UserError(f"--device {device}: {why}; try --device cpu")


def usable_gpus() -> int:
    """How many CUDA GPUs torch sees; it would count one whose driver is too old for it, too."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def why_unusable(number: int) -> str | None:
    """Why torch cannot compute on an NVIDIA GPU that is there, and the way out; None where it can, or none is there."""
    import torch

    here = f"torch {torch.__version__}"
    if number < usable_gpus():
        capability = torch.cuda.get_device_capability(number)
        built_for = torch.cuda.get_arch_list() if torch.version.cuda else []  # ROCm's have other names
        if not built_for or any(runs_on(architecture, capability) for architecture in built_for):
            return None
        gpu = f"{torch.cuda.get_device_name(number)} of compute capability {capability[0]}.{capability[1]}"
        way = "https://pytorch.org/get-started/previous-versions/ has others"
        return f"{here} has no kernels for the {gpu}, only for {' '.join(built_for)}; {way}"
    n_gpus, driver = nvidia_driver()
    if usable_gpus() or not n_gpus:
        return None
    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    way = f"https://pytorch.org/get-started/locally/ has one for CUDA {driver} or older"
    return f"{here} {built} and cannot use the NVIDIA GPU here, whose driver is for CUDA {driver}; {way}"


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether what torch is built for, as sm_86, compute_90 or sm_90a, runs on a GPU of a compute capability.

    Machine code (sm) does on its major version from its minor version on, portable code (compute) on all that is newer;
    a letter keeps either to its major version, and an 'a' to the very one.
    """
    kind, major, minor, letter = re.match(r"(\w+)_(\d+)(\d)([a-z]?)", architecture).groups()
    built = int(major), int(minor)
    if letter == "a":
        return capability == built
    return capability >= built and (capability[0] == built[0] or kind == "compute" and not letter)


def nvidia_driver() -> tuple[int, str]:
    """How many GPUs the NVIDIA driver has, whatever torch makes of them, and the newest CUDA that it knows."""
    n_gpus, version = ctypes.c_int(), ctypes.c_int()
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0, "none"
    driver.cuInit(0)
    driver.cuDeviceGetCount(ctypes.byref(n_gpus))  # leaves 0 where cuInit has failed
    driver.cuDriverGetVersion(ctypes.byref(version))
    return n_gpus.value, f"{version.value // 1000}.{version.value % 1000 // 10}"


def pick_device(device: str):
    """The torch.device of a --device value, ready for use; 'auto' is a CUDA GPU, else an Apple GPU, else the CPU, and
    says where that is for a reason that can be mended.

    Below torchrun each process takes a GPU of its own. UserError where there are fewer GPUs than processes.
    """
    import torch

    if device == "auto":
        if why := why_unusable(0):
            print(f"warning: this goes on without the GPU: {why}")
        device = "cuda" if usable_gpus() and not why else "mps" if torch.backends.mps.is_available() else "cpu"
    if device.startswith("cuda") and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        check_device(device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    # cuDNN's attention plans anew for every shape, and with a mask its gradients can be NaN (pytorch issue 196678)
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(device)


def pick_dtype(dtype: str, device):
    """The torch.dtype of a --dtype value; 'auto' is bfloat16 where `device` computes it natively, else float32."""
    import torch

    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Private, and in torch 2.6 and newer; the public get_capabilities() is newer than that
        native = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if native else torch.float32


def pick_micro_batch_size(config: PPOConfig, gpt2_config, device, n_prompt: int, n_tokens: int, drawing=False) -> int:
    """How many completions of n_tokens after prompts of n_prompt go through a model at once.

    As --micro_batch_size says; unless given, as many as an eighth of a GPU's memory holds, which is idle between small
    ones, and elsewhere 2 GiB, but 64 at most. Logits take most of the memory: some six passes over them in float32
    live at the same time, 24 bytes a token and vocabulary entry. Of keys and values two copies do, 16 bytes a token,
    block and unit of width. There is room for four times as many while drawing, which has one token's logits at a time.
    """
    more = 4 if drawing else 1
    if config.micro_batch_size:
        return more * config.micro_batch_size
    import torch

    logits = 24 * n_tokens * gpt2_config.vocab_size // more
    cache = 16 * (n_prompt + n_tokens) * gpt2_config.n_layer * gpt2_config.n_embd
    if device.type == "cuda":
        return max(1, torch.cuda.get_device_properties(device).total_memory // 8 // (logits + cache))
    return min(64 * more, max(1, 2**31 // (logits + cache)))


def to_device(tensor, device):
    """A CPU tensor on a device. A CUDA GPU is not waited for: torch copies the tensor aside. An Apple GPU is: it would
    read the tensor's memory when that may be another's (pytorch issue 189690)."""
    return tensor.to(device, non_blocking=str(device).startswith("cuda"))


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks. It hands them back otherwise, and each tensor of logits would come in anew,
    page fault by page fault: a sixth of a step on a CPU (docs/speed.md)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink
