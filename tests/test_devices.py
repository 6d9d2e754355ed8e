"""With which versions and where a run computes, in which dtype, and how much at once; GPUs are pretended."""

import ctypes
import sys
import types
from importlib import metadata

import pytest
import torch

import train_ppo
from config import PPOConfig
from support import devices
from support.devices import (
    check_device,
    check_versions,
    environment,
    in_one_line,
    nvidia_driver,
    pick_device,
    pick_dtype,
    pick_micro_batch_size,
    runs_on,
    to_device,
)
from support.errors import UserError
from support.load import PROGRAM, load
from support.settings import check
from support.text_trainer import TextPPOTrainer
from tests.test_step_edges import rows_at_once


@pytest.fixture
def machine(monkeypatch):
    """Pretend a machine: machine(GPUs that torch counts, can it use them, is there an Apple GPU, GPUs that the driver
    counts and its CUDA, torch's CUDA, each GPU's compute capability, what torch is built for)."""

    def index(device):
        return device if isinstance(device, int) else device.index or 0

    def pretend(gpus=0, usable=True, mps=False, driver=(0, "none"), cuda="13.0", capabilities=((9, 0),) * 99):
        monkeypatch.setattr(torch, "__version__", "2.13.0")
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0 and usable)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[index(device)])
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90", "compute_120"] if gpus else [])
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(devices, "nvidia_driver", lambda: driver)

    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    pretend()
    return pretend


# --- versions


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"torch": "2.6.0+cu124", "transformers": "5.4.0"}, None),
        ({"torch": "2.6.0a0+df5bbc09d1.nv24.12", "transformers": "5.10.0.dev0"}, None),
        (
            {"torch": "2.15.0", "transformers": "5.3.0"},
            r"transformers 5\.3\.0 is installed, and transformers.* is needed",
        ),
        (
            {"torch": "2.5.1+cu121", "transformers": "5.4.0"},
            r"torch 2\.5\.1\+cu121 is installed, and torch>=2.6 is needed",
        ),
        (
            {"torch": "2.13.0", "transformers": "6.0.1"},
            r"transformers 6\.0\.1 is installed, and transformers.*<6.*",
        ),
        ({"torch": "2.13.0"}, "transformers is not installed, and "),
        ({"transformers": "5.4.0"}, "torch is not installed, and "),
    ],
    ids=str,
)
def test_libraries_that_cannot_work_are_one_line(monkeypatch, tmp_path, capsys, versions, said):
    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    if said is None:
        check_versions()
        return
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{said}.*: python -m pip install -r requirements.txt$"):
        TextPPOTrainer.from_pretrained("a/b")
    assert train_ppo.main(["--preset", "demo"]) == train_ppo.main(["--help"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 2 and list(tmp_path.iterdir()) == []


def test_an_environment_of_a_gpu_says_what_torch_makes_of_it(machine, monkeypatch):
    machine(gpus=2, driver=(2, "13.1"), capabilities=((8, 0), (9, 0)))
    found = environment(torch.device("cuda:1"))
    assert found["device"] == "cuda:1 (Tesla V100)" and found["capability"] == "9.0"
    assert (found["CUDA"], found["CUDA of the driver"]) == ("13.0", "13.1")
    assert found["architectures"] == "sm_75 sm_90 compute_120" and found["float32 products"] == "highest"
    assert in_one_line(found).endswith(", CUDA 13.0, device cuda:1 (Tesla V100)")
    machine(gpus=1, cuda=None)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert environment(torch.device("cuda"))["CUDA"] == "ROCm 6.4"


# --- devices


@pytest.fixture
def chosen(monkeypatch):
    """The GPUs that were made the current one."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    return chosen


WITHOUT_CUDA = {"driver": (1, "12.4"), "cuda": None}
OLD_DRIVER = {"gpus": 1, "usable": False, "driver": (1, "11.4")}
OLD_GPU = {"gpus": 2, "capabilities": ((7, 0), (9, 0)), "driver": (2, "13.0")}
NO_CUDA = (
    "torch 2.13.0 is built without CUDA and cannot use the NVIDIA GPU here, whose driver is for CUDA 12.4; "
    "https://pytorch.org/get-started/locally/ has one for CUDA 12.4 or older"
)
NO_KERNELS = (
    "torch 2.13.0 has no kernels for the Tesla V100 of compute capability 7.0, only for sm_75 sm_90 compute_120"
)


@pytest.mark.parametrize(
    ("device", "there", "said"),
    [
        ("auto", {}, None),
        ("auto", OLD_GPU, None),
        ("cpu", WITHOUT_CUDA, None),
        ("cuda:1", OLD_GPU, None),
        ("cuda", WITHOUT_CUDA, f"--device cuda: {NO_CUDA}; try --device cpu"),
        ("cuda:1", WITHOUT_CUDA, f"--device cuda:1: {NO_CUDA}"),
        ("cuda", OLD_DRIVER, "--device cuda: torch 2.13.0 is built for CUDA 13.0 and cannot use the NVIDIA GPU here, "),
        ("cuda", OLD_GPU, f"--device cuda: {NO_KERNELS}; https"),
        ("cuda:0", OLD_GPU, f"--device cuda:0: {NO_KERNELS}; https"),
        ("cuda:2", OLD_GPU, "--device cuda:2: torch sees 2 CUDA GPUs here"),
        ("cpu", {}, None),
        ("cuda", {"gpus": 1}, None),
        ("cuda:0", {"gpus": 1}, None),
        ("cuda:1", {"gpus": 2}, None),
        ("cuda:10", {"gpus": 11}, None),
        ("mps", {"mps": True}, None),
        ("cuda", {}, "--device cuda: torch sees 0 CUDA GPUs here; try --device cpu"),
        ("cuda", {"mps": True}, "--device cuda: torch sees 0 CUDA GPUs here"),
        ("cuda:1", {"gpus": 1}, "--device cuda:1: torch sees 1 CUDA GPUs here"),
        ("cuda:10", {"gpus": 2}, "--device cuda:10: torch sees 2 CUDA GPUs here"),
        ("cuda", {"gpus": 1, "usable": False}, "--device cuda: torch sees 0 CUDA GPUs here"),
        ("mps", {"gpus": 1}, "--device mps: this machine has no Apple GPU that torch can use; try --device cpu"),
        ("tpu", {}, "--device tpu is unknown; choose auto, cpu, cuda, cuda:N or mps"),
        ("cuda:", {"gpus": 1}, "--device cuda: is unknown"),
        ("cuda:x", {"gpus": 1}, "--device cuda:x is unknown"),
        ("cuda:-1", {"gpus": 1}, "--device cuda:-1 is unknown"),
        ("cuda1", {"gpus": 2}, "--device cuda1 is unknown"),
        ("mps:0", {"mps": True}, "--device mps:0 is unknown"),
        ("cpu:0", {}, "--device cpu:0 is unknown"),
        ("CPU", {}, "--device CPU is unknown"),
    ],
)
def test_a_device_is_taken_where_it_is_there(machine, device, there, said):
    machine(**there)
    if said is None:
        check_device(device)
    else:
        with pytest.raises(UserError) as error:
            check(PPOConfig(device=device))
        assert str(error.value).startswith(said)


@pytest.mark.parametrize("flags", [["--device", "cuda"], ["--device=cuda:0"], ["--device", "mps"]])
def test_a_device_that_is_not_there_is_one_line(machine, tmp_path, monkeypatch, capfd, flags):
    """A GPU whose driver is too old for torch is counted by it, but cannot be used."""
    monkeypatch.chdir(tmp_path)
    machine(gpus=1, usable=False)
    assert train_ppo.main([*flags, "--preset", "demo"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("train_ppo.py: error: --device ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("device", "there", "picked", "made_current"),
    [
        ("auto", OLD_GPU, "cpu", []),
        ("auto", WITHOUT_CUDA, "cpu", []),
        ("auto", {}, "cpu", []),
        ("auto", {"mps": True}, "mps", []),
        ("auto", {"gpus": 2, "mps": True}, "cuda", []),
        ("auto", {"gpus": 1, "usable": False}, "cpu", []),
        ("cpu", {"gpus": 1}, "cpu", []),
        ("cuda", {"gpus": 1}, "cuda", []),
        ("cuda:1", {"gpus": 2}, "cuda:1", ["cuda:1"]),
        ("mps", {"gpus": 1, "mps": True}, "mps", []),
    ],
)
def test_one_process_takes_the_device_that_was_named(machine, chosen, device, there, picked, made_current):
    machine(**there)
    assert pick_device(device) == torch.device(picked)
    assert chosen == made_current


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({}, None),
        ({"mps": True}, None),
        ({"gpus": 2}, None),
        ({"gpus": 1, "cuda": None, "capabilities": ((7, 0),)}, None),  # ROCm counts otherwise
        (WITHOUT_CUDA, NO_CUDA),
        (
            OLD_DRIVER,
            "torch 2.13.0 is built for CUDA 13.0 and cannot use the NVIDIA GPU here, whose driver is for CUDA 11.4",
        ),
        (OLD_GPU, NO_KERNELS),
    ],
    ids=str,
)
def test_a_gpu_that_is_there_and_cannot_be_used_is_told_before_any_download(machine, monkeypatch, capsys, there, said):
    def model_folder(*args):
        raise UserError("asked")

    monkeypatch.setattr("support.load.model_folder", model_folder)
    monkeypatch.setattr("support.text_trainer.model_folder", model_folder)
    machine(**there)
    for start in (lambda: load(PPOConfig()), lambda: TextPPOTrainer.from_pretrained("a/b")):
        with pytest.raises(UserError, match="asked"):
            start()
        warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
        assert len(warnings) == (said is not None)
        assert not said or warnings[0].startswith(f"warning: this goes on without the GPU: {said}")


@pytest.mark.parametrize(
    ("architecture", "runs", "does_not"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("sm_120", [(12, 0), (12, 1)], [(1, 2), (10, 0), (13, 0)]),
        ("sm_90a", [(9, 0)], [(9, 1), (10, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("compute_80", [(8, 0), (8, 6), (9, 0), (12, 0)], [(7, 5)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
        ("compute_100f", [(10, 3)], [(12, 0)]),
    ],
)
def test_which_gpus_run_what_torch_is_built_for(architecture, runs, does_not):
    assert all(runs_on(architecture, capability) for capability in runs)
    assert not any(runs_on(architecture, capability) for capability in does_not)


@pytest.mark.parametrize(("platform", "library"), [("linux", "libcuda.so.1"), ("win32", "nvcuda.dll")])
def test_the_driver_is_asked_without_torch(monkeypatch, platform, library):
    ready = []

    def count(pointer):
        if ready:
            pointer._obj.value = 2

    def version(pointer):
        pointer._obj.value = 12040

    calls = types.SimpleNamespace(cuInit=ready.append, cuDeviceGetCount=count, cuDriverGetVersion=version)
    monkeypatch.setattr(ctypes, "CDLL", {library: calls}.__getitem__)
    monkeypatch.setattr(sys, "platform", platform)
    assert nvidia_driver() == (2, "12.4") and ready == [0]


def test_a_machine_without_a_driver_has_no_nvidia_gpu(monkeypatch):
    def absent(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert nvidia_driver() == (0, "none")


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_below_torchrun_each_process_takes_a_gpu_of_its_own(machine, chosen, monkeypatch, device):
    machine(gpus=2)
    monkeypatch.setenv("WORLD_SIZE", "4")  # two machines with two processes each
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device(device) == torch.device("cuda:1") and chosen == ["cuda:1"]
    machine(gpus=1)
    with pytest.raises(UserError, match="--device cuda:1: torch sees 1 CUDA GPUs here"):
        pick_device(device)


def test_below_torchrun_a_process_whose_own_gpu_cannot_be_used_is_refused(machine, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    machine(gpus=2, capabilities=((9, 0), (7, 0)))
    with pytest.raises(UserError, match="--device cuda:1: torch 2.13.0 has no kernels for the Tesla V100"):
        pick_device("auto")


def test_below_torchrun_a_cpu_is_shared(machine, chosen, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu") and chosen == []


def test_one_process_below_torchrun_takes_the_gpu_that_was_named(machine, chosen, monkeypatch):
    machine(gpus=2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert pick_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("device", "native", "expected"),
    [
        ("cpu", {"avx"}, torch.bfloat16),
        ("cpu", {"amx"}, torch.bfloat16),
        ("cpu", {"cuda", "emulated"}, torch.float32),
        ("cuda", {"cuda"}, torch.bfloat16),
        ("cuda:1", {"cuda"}, torch.bfloat16),
        ("cuda", {"emulated", "avx", "amx"}, torch.float32),
        ("mps", {"avx", "amx", "cuda"}, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_the_device_computes_it_natively(monkeypatch, device, native, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "avx" in native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx" in native)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: "cuda" in native or (including_emulation and "emulated" in native),
    )
    device = torch.device(device)
    assert pick_dtype("auto", device) == expected
    assert pick_dtype("float32", device) == torch.float32 and pick_dtype("bfloat16", device) == torch.bfloat16


def test_attention_is_never_cudnn_s():
    torch.backends.cuda.enable_cudnn_sdp(True)
    pick_device("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# --- from the CPU to a device


@pytest.mark.parametrize(("device", "aside"), [("cuda", True), ("cuda:1", True), ("mps", False), ("cpu", False)])
def test_only_a_cuda_gpu_is_not_waited_for(device, aside):
    calls = []
    tensor = types.SimpleNamespace(to=lambda *args, **options: calls.append((*args, options)))
    to_device(tensor, torch.device(device))
    assert calls == [(torch.device(device), {"non_blocking": aside})]


def test_nothing_goes_to_a_device_by_another_way():
    files = [path for path in PROGRAM if "non_blocking" in path.read_text(encoding="utf-8")]
    assert [path.name for path in files] == ["devices.py"]


# --- how many completions at once


def test_no_more_than_micro_batch_size_completions_go_through_at_once(gpt2_folder):
    """Four times as many while sampling, which keeps no gradients; before them their one prompt."""
    settings = dict(micro_batch_size=3, batch_size=14, minibatch_size=7, ppo_epochs=1, gen_len=2, dtype="float32")
    trainer = TextPPOTrainer.from_pretrained(gpt2_folder, PPOConfig(**settings, frozen_share=0.0, device="cpu"))
    queries = trainer.encode(["衣服"] * 14)
    responses = []
    assert rows_at_once(trainer, lambda: responses.extend(trainer.generate(queries))) == [1, 12, 1, 2]
    scored = rows_at_once(trainer, lambda: trainer.step(queries, responses, [0.5] * 14))
    assert scored == [3, 3, 3, 3, 2] + [3, 3, 1] * 2


def test_micro_batches_change_nothing_but_memory(gpt2_folder):
    results = []
    for size in (1, 5, 0):
        config = PPOConfig(micro_batch_size=size, batch_size=8, minibatch_size=8, dtype="float32", device="cpu")
        trainer = TextPPOTrainer.from_pretrained(gpt2_folder, config)
        queries = trainer.encode(["衣服", "这本书很"] * 4)
        responses = trainer.generate(queries)
        stats = trainer.step(queries, responses, [0.1 * i for i in range(8)])
        results.append(([response.tolist() for response in responses], stats))
    for responses, stats in results[1:]:
        assert responses == results[0][0]
        assert stats == pytest.approx(results[0][1], abs=2e-4)


@pytest.mark.parametrize(
    ("device", "size", "n_prompt", "n_tokens", "drawing", "expected"),
    [
        ("cuda", 0, 8, 16, False, 737),  # 8 GiB / (24 * 16 * 21,128 of logits + 16 * 24 * 12 * 768 of keys and values)
        ("cuda", 0, 8, 16, True, 1_542),  # and with a quarter of the logits
        ("cuda", 0, 1_000, 16, False, 54),
        ("cuda", 0, 8, 10**6, False, 1),
        ("cuda", 7, 8, 16, False, 7),
        ("cpu", 0, 8, 16, False, 64),  # 184 would fit into 2 GiB
        ("cpu", 0, 8, 16, True, 256),
        ("mps", 0, 8, 100, False, 32),  # 2 GiB / (24 * 100 * 21,128 + 16 * 108 * 12 * 768)
        ("cpu", 0, 1_000, 16, False, 13),
        ("cpu", 0, 1_000, 16, True, 14),
        ("cpu", 0, 8, 10**6, False, 1),
        ("cpu", 1, 1_000, 16, False, 1),
        ("cpu", 500, 8, 16, True, 2_000),
    ],
)
def test_unless_given_as_many_go_through_as_memory_holds(
    monkeypatch, device, size, n_prompt, n_tokens, drawing, expected
):
    """Of the article's GPT-2, on a GPU of 64 GiB."""
    memory = types.SimpleNamespace(total_memory=64 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    gpt2_config = types.SimpleNamespace(vocab_size=21_128, n_layer=12, n_embd=768)
    config, device = PPOConfig(micro_batch_size=size), torch.device(device)
    assert pick_micro_batch_size(config, gpt2_config, device, n_prompt, n_tokens, drawing) == expected
