"""tools/gain_figure.py: dots, means and bands by hand, and what it refuses."""

import numpy as np
import pytest

from support.errors import UserError
from tests.helpers import points, words, write_evaluation, write_run
from tools.gain_figure import main

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
LIMIT = {"kl": 0.4, "reward": 0.95}


def run(folder, gain, error=0.02, **settings) -> str:
    write_run(folder, 2, settings=settings)
    write_evaluation(folder, gain={"gain": gain, "gain_se": error, "limit": LIMIT})
    return str(folder)


@pytest.fixture
def six(tmp_path) -> list[str]:
    gains = {1e-4: (0.5, 0.7), 5e-4: (0.9, 0.9), 1e-3: (0.8, 0.5)}
    return [
        run(tmp_path / f"{lr}-{seed}", gain, error=seed / 100, lr=lr, seed=seed)
        for lr, of_seeds in gains.items()
        for seed, gain in enumerate(of_seeds, 1)
    ]


def test_a_dot_for_each_run_a_line_of_means_and_a_band_of_their_spread(six, figures, capsys):
    main(["lr", *six[::-1]])
    assert capsys.readouterr().out == "wrote gain.png\n"
    (axes,) = figures[0][0].axes
    dots, line = axes.lines
    assert sorted(points(dots)) == [[1e-4, 0.5], [1e-4, 0.7], [5e-4, 0.9], [5e-4, 0.9], [1e-3, 0.5], [1e-3, 0.8]]
    bars = sorted(np.round(bar[:, 1], 3).tolist() for bar in axes.collections[0].get_segments())
    assert bars == [[0.48, 0.52], [0.49, 0.51], [0.68, 0.72], [0.79, 0.81], [0.88, 0.92], [0.89, 0.91]]
    assert np.allclose(points(line), [[1e-4, 0.6], [5e-4, 0.9], [1e-3, 0.65]])
    band = axes.collections[1].get_paths()[0].vertices
    for x, mean, sd in ((1e-4, 0.6, np.sqrt(0.02)), (5e-4, 0.9, 0), (1e-3, 0.65, np.sqrt(0.045))):
        heights = band[band[:, 0] == x][:, 1]
        assert (heights.min(), heights.max()) == pytest.approx((mean - sd, mean + sd))
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale()) == ("lr", "gain", "log")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1e-4", "5e-4", "1e-3"]
    assert not axes.xaxis.get_minor_ticks()
    assert "standard deviation over the seeds" in words(axes.get_legend())
    assert words(figures[0][0].legends[0]) == ["6 runs"]


def test_another_setting_that_differs_has_a_line_for_each_value(tmp_path, figures):
    runs = [
        run(tmp_path / f"{lam}-{n}", gain, lam=lam, episodes=n)
        for lam, gains in ((1.0, (0.5, 0.6)), (0.9, (0.3, 0.4)))
        for n, gain in zip((256, 512), gains)
    ]
    main(["episodes", *runs])
    (axes,) = figures[0][0].axes
    assert points(axes.lines[1]) == [[256, 0.3], [512, 0.4]]
    assert points(axes.lines[3]) == [[256, 0.5], [512, 0.6]]
    assert axes.lines[1].get_color() != axes.lines[3].get_color()
    assert words(figures[0][0].legends[0]) == ["lam 0.9, 2 runs", "lam 1, 2 runs"]
    assert axes.get_xscale() == "linear"  # twice is no ten times
    assert "standard deviation over the seeds" not in words(axes.get_legend())


def test_runs_whose_gains_do_not_compare_say_so(tmp_path, figures):
    main(["lr", *(run(tmp_path / f"{lr}", 0.5, lr=lr, init_kl_coef=lr) for lr in (0.1, 0.2))])
    assert "their gains do not compare" in figures[0][0].get_supxlabel().replace("\n", " ")


@pytest.mark.parametrize(
    ("settings", "gain", "flags", "said"),
    [
        ({}, 0.5, ["epochs"], "the config.json of run has no number called epochs; name another setting"),
        ({}, 0.5, ["run_name"], "the config.json of run has no number called run_name"),
        ({"kl": True}, 0.5, ["kl"], "the config.json of run has no number called kl"),
        ({}, None, ["lr"], "the gain of run is not known: see its report.md; leave this run out"),
        ({}, 0.5, ["lr"], "all these runs have lr 0.0001; a figure needs runs of several values"),
        ({"lr": 0.1}, 0.5, ["lr", "--out", "gain.txt"], "no picture ends in .txt; take .png, .pdf or .svg"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(settings, gain, flags, said, tmp_path, figures):
    setting, *flags = flags
    folder = run(tmp_path / "run", gain, **settings)
    with pytest.raises(UserError, match=said):
        main([setting, folder, run(tmp_path / "other", 0.5), *flags])
    assert not figures and not list(tmp_path.glob("*gain*"))
