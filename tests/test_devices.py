"""The library versions, device, dtype and micro-batch size that a run computes with."""

import shutil
import types
from importlib import metadata

import pytest
import torch

import train_ppo
from config import PPOConfig
from support.common.errors import UserError
from support.compute.batches import to_device
from support.compute.devices import (
    check_versions,
    pick_device,
    pick_dtype,
)
from support.compute.engine import Engine


def test_an_unsupported_library_version_gives_a_one_line_error_before_anything_else(monkeypatch, capsys):
    versions = {"torch": "2.6.0a0+df5bbc09d1.nv24.12", "transformers": "5.4.0.dev0"}
    monkeypatch.setattr(metadata, "distributions", lambda name: [types.SimpleNamespace(version=versions[name])])
    check_versions()
    for name, version, refused in ("transformers", "6.0.1", "transformers"), ("torch", "2.5.1+cu121", "torch>=2.6"):
        versions[name] = version
        assert train_ppo.main(["--preset", "demo"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and refused in err and "pip install -r requirements.txt" in err
    monkeypatch.setattr(metadata, "distributions", lambda name: [])
    with pytest.raises(UserError, match="^torch.* is needed, not None"):
        check_versions()


@pytest.fixture
def machine(monkeypatch):
    """A function that fakes a machine. usable: the GPUs that torch can compute on; seen: whether torch sees a GPU;
    driver: whether NVIDIA's driver is installed."""
    ones = torch.ones

    def pretend(usable=(), seen=False, driver=False):
        def compute(*size, device):
            if device not in (*usable, "cpu"):
                raise RuntimeError(f"CUDA error: no kernel for {device}\nCompile with TORCH_USE_CUDA_DSA")
            return ones(*size)

        monkeypatch.setattr(torch, "ones", compute)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in usable)
        monkeypatch.setattr(shutil, "which", lambda program: program if driver else None)
        return chosen

    chosen = []
    for name in ("WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return pretend


def test_an_unknown_or_unusable_device_gives_a_one_line_error():
    for device in ("cuda:x", "meta", "mps"):
        with pytest.raises(UserError, match=f"^--device {device}: torch can't use {device} .*$"):
            pick_device(device)


CUDA = ["cuda", "cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("device", "there", "picked", "made_current"),
    [
        ("auto", {}, "cpu", []),
        ("auto", {"usable": ["mps"]}, "mps", []),
        ("auto", {"usable": [*CUDA, "mps"], "seen": True}, "cuda", []),
        ("cpu", {"usable": CUDA, "seen": True}, "cpu", []),
        ("cuda:1", {"usable": CUDA, "seen": True}, "cuda:1", ["cuda:1"]),
    ],
)
def test_a_run_uses_the_given_device_or_the_best_one(machine, capsys, device, there, picked, made_current):
    chosen = machine(**there)
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert pick_device(device) == torch.device(picked) and chosen == made_current
    assert not torch.backends.cuda.cudnn_sdp_enabled() and capsys.readouterr().out == ""


def test_an_nvidia_gpu_that_torch_cannot_use_causes_one_warning(machine, capsys, monkeypatch):
    """A torch build without CUDA sees no GPU. A build without kernels for this GPU sees it but can't use it."""
    for there in {"driver": True}, {"seen": True}:
        machine(**there)
        assert pick_device("auto") == torch.device("cpu")
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("warning: ") and "no kernel" in line and "pytorch.org" in line
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    machine(driver=True)
    assert pick_device("auto") == torch.device("cpu") and capsys.readouterr().out == ""


def test_under_torchrun_each_process_uses_its_own_gpu(machine, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # two machines with two processes each
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for device in ("auto", "cuda"):
        chosen = machine(usable=CUDA, seen=True)
        assert pick_device(device) == torch.device("cuda:1") and chosen.pop() == "cuda:1"
        machine(usable=["cuda", "cuda:0"], seen=True)
        with pytest.raises(UserError, match="--device cuda:1: "):
            pick_device(device)
    machine()
    assert pick_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "native", "expected"),
    [
        ("cpu", {"avx"}, torch.bfloat16),
        ("cpu", {"amx"}, torch.bfloat16),
        ("cpu", {"cuda"}, torch.float32),
        ("cuda:1", {"cuda"}, torch.bfloat16),
        ("cuda", {"emulated", "avx", "amx"}, torch.float32),
        ("mps", {"avx", "amx", "cuda"}, torch.float32),
    ],
)
def test_dtype_auto_is_bfloat16_if_the_device_supports_it_natively(monkeypatch, device, native, expected):
    def of_the_gpu(including_emulation=True):
        return "cuda" in native or (including_emulation and "emulated" in native)

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "avx" in native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx" in native)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", of_the_gpu)
    device = torch.device(device)
    assert pick_dtype("auto", device) == expected and pick_dtype("bfloat16", device) == torch.bfloat16


def test_only_copies_to_a_cuda_gpu_are_non_blocking():
    tensor = types.SimpleNamespace(to=lambda device, non_blocking: non_blocking)
    assert [to_device(tensor, torch.device(name)) for name in ("cuda:1", "mps", "cpu")] == [True, False, False]


@pytest.mark.parametrize(
    ("device", "size", "n_tokens", "drawing", "expected"),
    [
        ("cuda", 0, 16, False, 1_444),  # 8 GiB / (8 * 24 * 12 * 768 of keys and values + 68 * 16 * 5 * 768)
        ("cuda", 0, 16, True, 4_854),  # only the keys and values
        ("cuda", 0, 10**6, False, 1),
        ("cpu", 0, 16, False, 32),  # 22 would fit into 128 MiB
        ("mps", 0, 400, False, 15),  # 2 GiB / (8 * 408 * 12 * 768 + 68 * 400 * 5 * 768)
        ("cpu", 0, 10**6, False, 1),
        ("cpu", 500, 16, True, 2_000),
    ],
)
def test_a_micro_batch_is_as_large_as_memory_allows(monkeypatch, device, size, n_tokens, drawing, expected):
    """The model is the article's GPT-2, prompts have 8 tokens, and a GPU has 64 GiB."""
    memory = types.SimpleNamespace(total_memory=64 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    gpt2 = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=21_128, n_layer=12, n_embd=768), n_frozen=8)
    config = PPOConfig(micro_batch_size=size)
    engine = types.SimpleNamespace(config=config, model=gpt2, device=torch.device(device))
    assert Engine.micro_batch_size(engine, 8, n_tokens, drawing) == expected
