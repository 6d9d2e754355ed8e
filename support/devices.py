"""Which device, dtype and micro-batch this machine can do, and the memory of its C library."""

import ctypes
import os
import re
import sys

from config import PPOConfig
from support.errors import UserError


def check_device(device: str) -> None:
    """Refuse an unknown device, or one that this machine lacks."""
    if device in ("auto", "cpu"):
        return
    if not re.fullmatch(r"cuda(:\d+)?|mps", device):
        raise UserError(f"--device {device} is unknown; choose auto, cpu, cuda, cuda:N or mps")
    import torch

    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has no Apple GPU that torch can use; try --device cpu")
    # torch counts a GPU whose driver is too old for it, too
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.startswith("cuda") and int(device[5:] or 0) >= usable:
        raise UserError(f"--device {device}: torch sees {usable} CUDA GPUs here; try --device cpu")


def pick_device(device: str):
    """The torch.device of a --device value, ready for use; 'auto' is a CUDA GPU, else an Apple GPU, else the CPU.

    Below torchrun each process takes a GPU of its own. UserError where there are fewer GPUs than processes.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
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
