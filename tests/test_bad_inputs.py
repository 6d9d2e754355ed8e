"""Every case of tests/bad_inputs.py: exit code 2, one line on stderr, nothing harmed."""

import pytest

from tools.bad_inputs import BROKEN, FLAGS, try_out, workplace


@pytest.mark.parametrize(("flags", "said"), FLAGS, ids=[flags for flags, _ in FLAGS])
def test_bad_flags(flags, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, err, _ = try_out(flags)
    assert code == 2 and err.count("\n") == 1
    assert said in err and err.startswith("train_ppo.py: error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("what", "change", "command", "said"), BROKEN, ids=[case[0] for case in BROKEN])
def test_broken_files(what, change, command, said, demo, finished):
    with workplace(*demo, finished):
        code, err, unharmed = try_out(command, change)
    lines = err.strip().splitlines()
    assert code == 2 and said in lines[-1] and "error: " in lines[-1]
    assert "Traceback" not in err and unharmed
