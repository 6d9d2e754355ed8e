"""What comes from elsewhere, as names, model folders and prompts: it runs no code, steers no terminal, takes no memory
for nothing, and is told in one line where it will not do."""

import subprocess
import sys

import pytest

from support.errors import UserError
from tests.conftest import ROOT
from train_ppo import main

# --- on the screen

STEERING = ["\x1b[31m", "\x1b]0;title\x07", "\b", "\x7f", "\x9b1m", "\u202e", "\u2066", "\u200f", "\u2028", "\x85"]
HARMLESS = "刚收到货　，“感觉”é ñ 👍🏽 👨‍👩‍👧 \\x1b"


@pytest.mark.parametrize("name", STEERING)
def test_names_steer_no_terminal(name, capsys):
    assert main(["--model_name", f"./感觉{name}/no", "--preset", "demo"]) == 2
    err = capsys.readouterr().err
    assert name not in err and f"./感觉{ascii(name)[1:-1]}/no" in err and err.count("\n") == 1


def test_an_error_is_one_line_of_plain_text():
    """Whatever file or exception it quotes."""
    assert str(UserError("a\nb\r\n\tc\0")) == "a\\nb\\r\\n\\tc\\x00"
    assert str(UserError(HARMLESS)) == HARMLESS


def test_what_is_printed_steers_no_terminal_but_a_progress_bar_stays_one():
    """And nobody closes the streams."""
    code = (
        "import sys\n"
        "from support.streams import hold_streams\n"
        "from tqdm import tqdm\n"
        "hold_streams()\n"
        "for number in tqdm(range(2), desc='bar\\x1b[0m', mininterval=0):\n"
        "    tqdm.write(sys.argv[1] + 'a\\tb\\rc')\n"
        "    sys.stdout.close(), sys.stderr.close()\n"
        "raise KeyError(ValueError(sys.argv[1]))\n"
    )
    printed = "".join(STEERING) + HARMLESS
    result = subprocess.run([sys.executable, "-c", code, printed], cwd=ROOT, capture_output=True)
    out, err = result.stdout.decode(), result.stderr.decode()
    shown = "".join(ascii(name)[1:-1] for name in STEERING) + HARMLESS
    assert out == f"{shown}a\tb\\rc\n" * 2
    assert "\rbar\\x1b[0m: 100%" in err and "\x1b" not in err and "Traceback" in err and result.returncode == 1
