"""Bugs in what a person runs beside training."""

NEAREST = {  # file: the tests nearest to it
    "tools/fuzz.py": "fuzz",
    "tools/gpu_check.py": "gpu_check",
    "tools/versions.py": "versions",
    "requirements.txt": "versions",
    "constraints.txt": "versions",
}
BUGS = [  # (file, what stands there, the bug)
    ("tools/fuzz.py", "            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))\n", ""),
    ("tools/fuzz.py", "if code not in (0, 2, 130):", "if code not in (0, 1, 2, 130):"),
    ("tools/fuzz.py", "if whole and not after.get(path, (1,))[0]", "if whole and not after.get(path, (0,))[0]"),
    ("tools/fuzz.py", "if any(was) and not any(left):", "if all(was) and not all(left):"),
    ("tools/fuzz.py", "(len(errors) != 1 or err.splitlines()[-1] != errors[0])", "len(errors) != 1"),
    ("tools/fuzz.py", 'MAY_VANISH = {"report.md", ".lock"}', 'MAY_VANISH = {"config.json", ".lock"}'),
    ("tools/fuzz.py", 'values["sha256"][path.name] = sha256(path)', "pass"),
    ("tools/gpu_check.py", "        working = working and takes_work(machine.device)\n", ""),
    ("tools/gpu_check.py", "            well &= row.ok is not False\n", "            well = row.ok is not False\n"),
    ("tools/gpu_check.py", "            print(row, flush=True)\n", "            print(row, file=sys.stderr)\n"),
    (
        "tools/gpu_check.py",
        "    except RuntimeError:\n        return False",
        "    except ValueError:\n        return False",
    ),
    ("tools/gpu_check.py", "all(second[key].equal(first[key])", "all(second[key].allclose(first[key])"),
    ("tools/gpu_check.py", '"bfloat16 update": 0.2,', '"bfloat16 update": 2.0,'),
    ("tools/gpu_check.py", 'dict.fromkeys(("float32", machine.dtype))', '("float32",)'),
    ("tools/gpu_check.py", "value <= LIMITS[limit])", "not value > LIMITS[limit])"),
    ("tools/versions.py", 'r"==\\1"', 'r">=\\1"'),
    ("tools/versions.py", '{"PIP_CONSTRAINT": str(pins)}', "{}"),
    ("tools/versions.py", ", demo and tests\n", ", demo\n"),
    ("requirements.txt", "torch>=2.6\n", "torch==2.13.0\n"),
    ("constraints.txt", "transformers==5.23.0", "transformers==5.3.0"),
]
SAME = []
