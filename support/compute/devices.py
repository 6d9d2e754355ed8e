"""Library versions, device and dtype."""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

from support.common.errors import UserError, first_line

ROOT = Path(__file__).resolve().parents[2]


def check_versions() -> None:
    """Raise UserError if requirements.txt doesn't allow the version of torch or transformers. Imports neither."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    for line in re.findall(r"(?m)^(?:torch|transformers)\b.*", requirements):
        needed = Requirement(line)
        found = next((package.version for package in metadata.distributions(name=needed.name)), None)
        if found is None or not needed.specifier.contains(Version(found).base_version):
            raise UserError(f"{needed} is needed, not {found}; run: python -m pip install -r requirements.txt")


def environment(device) -> dict[str, str]:
    """Return the versions, code hash, system and device of a run, by name."""
    found = {"Python": platform.python_version()}
    found |= {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}
    found |= {"code": code_hash(), "system": platform.platform(), "device": str(device)}
    if device.type == "cuda":
        import torch

        found["device"] += f" ({torch.cuda.get_device_name(device)})"
        found["CUDA"] = torch.version.cuda or f"ROCm {torch.version.hip}"
    return found


@functools.cache  # a file edited after the import isn't what runs
def code_hash() -> str:
    """Return 12 digits of a SHA-256 of the files that affect a run, except for config.py, whose values are saved."""
    top = [ROOT / name for name in ("gpt2_value_head.py", "ppo.py", "reward.py", "train_ppo.py")]
    digest = hashlib.sha256()
    for file in sorted([*top, *ROOT.glob("support/**/*.py")]):
        digest.update(f"{file.relative_to(ROOT).as_posix()}\n".encode() + b"\n".join(file.read_bytes().splitlines()))
    return digest.hexdigest()[:12]


def in_one_line(environment: dict[str, str]) -> str:
    names = ("Python", "torch", "transformers", "CUDA", "device")
    return ", ".join(f"{name} {environment[name]}" for name in names if name in environment)


def pick_device(device: str):
    """Return the torch.device of a --device value. 'auto' is a CUDA GPU, else an Apple GPU, else the CPU.

    'auto' warns if torch can't use this machine's NVIDIA GPU. Under torchrun each process takes its own GPU. Raises
    UserError, with torch's reason, if torch can't use that GPU or a device given by name.
    """
    import torch

    auto, several = device == "auto", int(os.environ.get("WORLD_SIZE", 1)) > 1
    if auto:
        nvidia = torch.cuda.is_available() or (shutil.which("nvidia-smi") and "CUDA_VISIBLE_DEVICES" not in os.environ)
        device = "cuda" if nvidia else "mps" if torch.backends.mps.is_available() else "cpu"
    if device.startswith("cuda") and several:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.ones(1, device=device).add(1).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        reason = f"torch can't use {device} ({first_line(error)}); see https://pytorch.org/get-started/locally/"
        if several or not auto:
            raise UserError(f"--device {device}: {reason}, or try --device cpu")
        print(f"warning: this run uses the CPU: {reason}")
        device = "cpu"
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    # cuDNN's attention plans again for every shape, and with a mask its gradients can be NaN (pytorch issue 196678)
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(device)


def pick_dtype(dtype: str, device):
    """Return the torch.dtype of a --dtype value. 'auto' is bfloat16 if the device supports it, else float32."""
    import torch

    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Private, and in torch 2.6 and newer; the public get_capabilities() is newer than that
        native = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if native else torch.float32


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks. Otherwise page faults for each tensor of logits take a sixth of a CPU step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: never map a single block
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
