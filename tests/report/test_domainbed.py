"""DomainBed's tables from records of our own making, whose answers are computed by hand."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from dynmoe.records import RecordError, RunFolder
from dynmoe.report.domainbed import collect, read, tables, to_text, write

# One line per run, accuracies in per cent, evaluated at steps 0 and 100. `..` is a number that no
# rule may look at; it is recorded as 99. Trial 1 of ERM has no pair run {0,2} for draw 1; DynMoE
# has no pair runs, nothing on environment 2, and trial 1 on environment 0 alone.
GOLDEN = """
#         trial draw test   step 0:  in       out          step 100:  in       out
ERM       0     0    0      50 .. ..     60 80 70          40 .. ..     55 80 90
ERM       0     1    0      62 .. ..     70 90 84          58 .. ..     50 84 80
ERM       0     0    1      .. 70 ..     60 71 80          .. 74 ..     66 72 74
ERM       0     1    1      .. 64 ..     55 68 65          .. 66 ..     62 76 66
ERM       0     0    2      .. .. 10     50 70 12          .. .. 12     90 80 11
ERM       0     1    2      .. .. 18     80 90 14          .. .. 16     80 70 11
ERM       0     0    0,1    20 30 ..     .. .. ..          30 50 ..     .. .. ..
ERM       0     0    0,2    80 .. 70     .. .. ..          60 .. 40     .. .. ..
ERM       0     0    1,2    .. 40 60     .. .. ..          .. 50 70     .. .. ..
ERM       0     1    0,1    50 40 ..     .. .. ..          10 44 ..     .. .. ..
ERM       0     1    0,2    20 .. 50     .. .. ..          30 .. 54     .. .. ..
ERM       0     1    1,2    .. 30 50     .. .. ..          .. 40 60     .. .. ..
ERM       1     0    0      50 .. ..     40 70 70          60 .. ..     50 80 70
ERM       1     1    0      66 .. ..     50 80 90          64 .. ..     44 70 80
ERM       1     0    1      .. 72 ..     70 60 60          .. 78 ..     80 70 60
ERM       1     1    1      .. 60 ..     50 50 50          .. 68 ..     60 74 60
ERM       1     0    2      .. .. 8      60 60 9           .. .. 9      70 60 7
ERM       1     1    2      .. .. 12     50 50 13          .. .. 14     60 64 15
ERM       1     0    0,1    30 40 ..     .. .. ..          40 50 ..     .. .. ..
ERM       1     0    0,2    50 .. 50     .. .. ..          60 .. 30     .. .. ..
ERM       1     0    1,2    .. 50 50     .. .. ..          .. 60 60     .. .. ..
ERM       1     1    0,1    60 50 ..     .. .. ..          70 50 ..     .. .. ..
ERM       1     1    1,2    .. 50 60     .. .. ..          .. 50 50     .. .. ..
DynMoE    0     0    0      70 .. ..     60 90 80          72 .. ..     64 92 84
DynMoE    0     1    0      74 .. ..     66 80 80          76 .. ..     70 84 88
DynMoE    0     0    1      .. 80 ..     50 70 60          .. 82 ..     60 72 60
DynMoE    0     1    1      .. 84 ..     70 74 70          .. 78 ..     60 60 60
DynMoE    1     0    0      60 .. ..     50 70 70          68 .. ..     58 80 80
DynMoE    1     1    0      64 .. ..     54 60 70          66 .. ..     56 70 70
"""

# Training-domain validation: mean out accuracy of the two training environments -> test in, the
# better step of each draw, then the better draw.
#   ERM, trial 0, env 0: draw 0: (80+70)/2 = 75 -> 50, (80+90)/2 = 85 -> 40: 85 -> 40
#                        draw 1: (90+84)/2 = 87 -> 62, (84+80)/2 = 82 -> 58: 87 -> 62; best 62
#                 env 1: draw 0: (60+80)/2 = 70 -> 70, (66+74)/2 = 70 -> 74: of equal steps the
#                        first, 70 -> 70; draw 1: 60 -> 64, 64 -> 66: 64 -> 66; best 70
#                 env 2: draw 0: 60 -> 10, 85 -> 12: 85 -> 12; draw 1: 85 -> 18, 75 -> 16: 85 -> 18;
#                        of equal draws the higher hparams seed: 18
#        trial 1, env 0: draw 0: 70 -> 50, 75 -> 60; draw 1: 85 -> 66, 75 -> 64; best 66
#                 env 1: draw 0: 65 -> 72, 70 -> 78; draw 1: 50 -> 60, 60 -> 68; best 78
#                 env 2: draw 0: 60 -> 8, 65 -> 9;   draw 1: 50 -> 12, 62 -> 14; best 9
#   Two values a, b have the mean (a+b)/2 and the standard error |a-b|/2/sqrt(2):
#     62, 66: 64.0, 2/1.414 = 1.4;  70, 78: 74.0, 2.8;  18, 9: 13.5, 4.5/1.414 = 3.2
#   Avg (64+74+13.5)/3 = 50.5. Averages: trial 0 (62+70+18)/3 = 50, trial 1 (66+78+9)/3 = 51:
#     50.5, 0.5/1.414 = 0.4
#   DynMoE, trial 0, env 0: 85 -> 70, 88 -> 72; 80 -> 74, 86 -> 76; best 72
#                    env 1: 55 -> 80, 60 -> 82; 70 -> 84, 60 -> 78; best 84
#           trial 1, env 0: 70 -> 60, 80 -> 68; 65 -> 64, 70 -> 66; best 68
#     72, 68: 70.0, 2/1.414 = 1.4; 84 alone: 84.0, 0.0; nothing: X, and Avg X
#   Averages: trial 0 (72+84)/2 = 78, trial 1 68: 73.0, 5/1.414 = 3.5
#
# Leave-one-domain-out: the pair runs' in accuracy on the other environment -> the single run's in.
#   ERM, trial 0, env 0: draw 0: {0,1} 30, {0,2} 70: 50 -> 50; 50, 40: 45 -> 40; best 50 -> 50
#                        draw 1: 40, 50: 45 -> 62; 44, 54: 49 -> 58; best 49 -> 58; of both 50
#                 env 1: draw 0: {0,1} 20, {1,2} 60: 40 -> 70; 30, 70: 50 -> 74; best 50 -> 74
#                        draw 1: 50, 50: 50 -> 64; 10, 60: 35 -> 66; best 50 -> 64; equal draws: 64
#                 env 2: draw 0: {0,2} 80, {1,2} 40: 60 -> 10; 60, 50: 55 -> 12; best 60 -> 10
#                        draw 1: 20, 30: 25 -> 18; 30, 40: 35 -> 16; best 35 -> 16; of both 10
#        trial 1, env 0: draw 0: 40, 50: 45 -> 50; 50, 30: 40 -> 60; best 50; draw 1 lacks {0,2}
#                 env 1: draw 0: 30, 50: 40 -> 72; 40, 60: 50 -> 78; best 50 -> 78
#                        draw 1: 60, 60: 60 -> 60; 70, 50: 60 -> 68; first step 60 -> 60; of both 60
#                 env 2: draw 0: 50, 50: 50 -> 8; 60, 60: 60 -> 9; best 9; draw 1 lacks {0,2}
#     50, 50: 50.0, 0.0;  64, 60: 62.0, 1.4;  10, 9: 9.5, 0.5/1.414 = 0.4; Avg 121.5/3 = 40.5
#   Averages: 124/3 = 41.33 and 119/3 = 39.67: 40.5, 0.833/1.414 = 0.6. DynMoE has no pairs: X
#
# Oracle: at step 100, test out -> test in.
#   ERM, trial 0: env 0: 55 -> 40, 50 -> 58: 40;  env 1: 72 -> 74, 76 -> 66: 66
#                 env 2: 11 -> 12, 11 -> 16, equal draws: 16
#        trial 1: env 0: 50 -> 60, 44 -> 64: 60;  env 1: 70 -> 78, 74 -> 68: 68
#                 env 2: 7 -> 9, 15 -> 14: 14
#     40, 60: 50.0, 10/1.414 = 7.1;  66, 68: 67.0, 0.7;  16, 14: 15.0, 0.7; Avg 132/3 = 44.0
#   Averages: 122/3 = 40.67 and 142/3 = 47.33: 44.0, 3.333/1.414 = 2.4
#   DynMoE, trial 0: env 0: 64 -> 72, 70 -> 76: 76;  env 1: 72 -> 82, 60 -> 78: 82
#           trial 1: env 0: 58 -> 68, 56 -> 66: 68
#     76, 68: 72.0, 4/1.414 = 2.8; 82.0, 0.0; X. Averages: 79 and 68: 73.5, 5.5/1.414 = 3.9
TEXT = """\
Total records: 58

-------- Dataset: ColoredMNIST, model selection method: training-domain validation set
Algorithm             +90%                  +80%                  -90%                  Avg
ERM                   64.0 +/- 1.4          74.0 +/- 2.8          13.5 +/- 3.2          50.5
DynMoE                70.0 +/- 1.4          84.0 +/- 0.0          X                     X

-------- Averages, model selection method: training-domain validation set
Algorithm                  ColoredMNIST               Avg
ERM                        50.5 +/- 0.4               50.5
DynMoE                     73.0 +/- 3.5               73.0

-------- Dataset: ColoredMNIST, model selection method: leave-one-domain-out cross-validation
Algorithm             +90%                  +80%                  -90%                  Avg
ERM                   50.0 +/- 0.0          62.0 +/- 1.4          9.5 +/- 0.4           40.5
DynMoE                X                     X                     X                     X

-------- Averages, model selection method: leave-one-domain-out cross-validation
Algorithm                  ColoredMNIST               Avg
ERM                        40.5 +/- 0.6               40.5
DynMoE                     X                          X

-------- Dataset: ColoredMNIST, model selection method: test-domain validation set (oracle)
Algorithm             +90%                  +80%                  -90%                  Avg
ERM                   50.0 +/- 7.1          67.0 +/- 0.7          15.0 +/- 0.7          44.0
DynMoE                72.0 +/- 2.8          82.0 +/- 0.0          X                     X

-------- Averages, model selection method: test-domain validation set (oracle)
Algorithm                  ColoredMNIST               Avg
ERM                        44.0 +/- 2.4               44.0
DynMoE                     73.5 +/- 3.9               73.5
"""

# DynMoE's averages are over what there is; DomainBed does not say so, `write` does.
INCOMPLETE = """
Incomplete (training-domain validation set): DynMoE on ColoredMNIST, trial seed 0, has no result \
on -90%; the averages are over the rest.
Incomplete (training-domain validation set): DynMoE on ColoredMNIST, trial seed 1, has no result \
on +80%, -90%; the averages are over the rest.
Incomplete (test-domain validation set (oracle)): DynMoE on ColoredMNIST, trial seed 0, has no \
result on -90%; the averages are over the rest.
Incomplete (test-domain validation set (oracle)): DynMoE on ColoredMNIST, trial seed 1, has no \
result on +80%, -90%; the averages are over the rest.
"""

LATEX_TABLE = r"""
\subsubsection{ColoredMNIST}
\begin{center}
\adjustbox{max width=\textwidth}{%
\begin{tabular}{lcccc}
\toprule
\textbf{Algorithm} & \textbf{+90\%} & \textbf{+80\%} & \textbf{-90\%} & \textbf{Avg} \\
\midrule
ERM & 64.0 $\pm$ 1.4 & 74.0 $\pm$ 2.8 & 13.5 $\pm$ 3.2 & 50.5 \\
DynMoE & 70.0 $\pm$ 1.4 & 84.0 $\pm$ 0.0 & X & X \\
\bottomrule
\end{tabular}}
\end{center}
"""


def write_run(
    folder: Path,
    dataset: str,
    algorithm: str,
    test_envs: list[int],
    accuracies: dict[int, tuple[list[float], list[float]]],
    **args: Any,
) -> RunFolder:
    """A run with the (in, out) accuracies of all environments at each step."""
    run = RunFolder(folder)
    for step, splits in accuracies.items():
        scores = {
            f"env{env}_{split}_acc": accuracy
            for split, values in zip(("in", "out"), splits, strict=True)
            for env, accuracy in enumerate(values)
        }
        names = {"dataset": dataset, "algorithm": algorithm, "test_envs": test_envs}
        seeds = {"trial_seed": 0, "hparams_seed": 0}
        run.append("results", {"step": step, **scores, "args": {**names, **seeds, **args}})
    return run


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    # Names in no order of meaning, as DomainBed's hashes are.
    lines = GOLDEN.strip().splitlines()[1:]
    for index, line in enumerate(lines):
        algorithm, trial, draw, tested, *numbers = line.split()
        values = [0.99 if number == ".." else int(number) / 100 for number in numbers]
        write_run(
            tmp_path / f"{index * 37 % 101:03}",
            "ColoredMNIST",
            algorithm,
            [int(env) for env in tested.split(",")],
            {0: (values[:3], values[3:6]), 100: (values[6:9], values[9:])},
            trial_seed=int(trial),
            hparams_seed=int(draw),
        )
    return tmp_path


def stripped(text: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def test_all_rules_by_hand(golden: Path) -> None:
    text = write(golden)
    saved = (golden / "results.txt").read_text()
    assert stripped(saved) == TEXT
    assert text == saved + INCOMPLETE


def test_rows_are_padded_as_domainbed_pads_them(golden: Path) -> None:
    lines = to_text(collect(read(golden))).splitlines()
    cells = ("ERM", "64.0 +/- 1.4", "74.0 +/- 2.8", "13.5 +/- 3.2", "50.5")
    assert lines[4] == "  ".join(cell.ljust(20) for cell in cells) + " "
    assert lines[9] == f"{'ERM':25}  {'50.5 +/- 0.4':25}  {'50.5':25} "


def test_latex(golden: Path) -> None:
    write(golden)
    document = (golden / "results.tex").read_text()
    assert dedent(LATEX_TABLE) in document
    assert document.startswith("\\documentclass{article}\n")
    assert document.endswith("\n\\end{document}\n")
    assert document.count(r"\subsection{Model selection: ") == 3
    assert document.count(r"\subsubsection{Averages}") == 3
    begun, ended = (re.findall(rf"\\{word}{{(\w+)}}", document) for word in ("begin", "end"))
    assert sorted(begun) == sorted(ended)
    # Every brace is closed on its line, but that of adjustbox, closed after the tabular.
    for line in document.splitlines():
        opened = line.count("{") - line.count("}")
        assert opened == line.startswith(r"\adjustbox") - (line == r"\end{tabular}}"), line


def test_names_of_folders_do_not_matter(golden: Path, tmp_path: Path) -> None:
    text = write(golden)
    for index, folder in enumerate(sorted(path for path in golden.iterdir() if path.is_dir())):
        folder.rename(golden / f"run{999 - index}")
    assert write(golden) == text


def test_files_that_are_not_runs_are_ignored(golden: Path) -> None:
    text = write(golden)
    (golden / "notes").mkdir()
    (golden / "sweep.json").write_text("{}")
    assert write(golden) == text


def test_torn_last_line_is_ignored(golden: Path) -> None:
    text = write(golden)
    with (golden / "000" / "results.jsonl").open("a") as file:
        file.write('{"step": 200, "env0_in_acc": 0.')
    assert write(golden) == text


def test_leave_one_out_needs_every_pair(golden: Path) -> None:
    rule = "leave_one_domain_out"
    for folder in golden.iterdir():
        args = RunFolder(folder).read("results")[0]["args"]
        if args["algorithm"] == "ERM" and args["test_envs"] == [1, 2]:
            shutil.rmtree(folder)
    table, averages = tables(collect(read(golden)), rule)
    # Without {1,2} nothing is known of environments 1 and 2; {0,1} and {0,2} serve environment 0.
    assert table.rows[0] == ("ERM", "50.0 +/- 0.0", "X", "X", "X")
    assert averages.rows[0] == ("ERM", "50.0 +/- 0.0", "50.0")


def test_orders_names_and_the_example_of_domainbed(tmp_path: Path) -> None:
    # PACS: 10, 20, 30 % in three trials: 20.0 +/- sqrt(200/3)/sqrt(3) = 4.7 in each environment and
    # for their average. Our own names follow DomainBed's; environments without labels are env0, ...
    for trial, accuracy in enumerate((0.1, 0.2, 0.3)):
        for env in range(4):
            name, scores = f"pacs{trial}{env}", ([accuracy] * 4, [0.5] * 4)
            write_run(tmp_path / name, "PACS", "IRM", [env], {0: scores}, trial_seed=trial)
    for env, accuracy in enumerate((0.5, 0.7)):
        for algorithm in ("TopK", "GMoE", "IRM", "ERM"):
            scores = ([accuracy] * 2, [0.5] * 2)
            write_run(tmp_path / f"{algorithm}{env}", "Animals", algorithm, [env], {0: scores})
    pacs, animals, averages = tables(collect(read(tmp_path)), "oracle")
    assert (
        pacs.title == "Dataset: PACS, model selection method: test-domain validation set (oracle)"
    )
    assert pacs.columns == ("Algorithm", "A", "C", "P", "S", "Avg")
    assert pacs.rows == (
        ("ERM", "X", "X", "X", "X", "X"),
        ("IRM", "20.0 +/- 4.7", "20.0 +/- 4.7", "20.0 +/- 4.7", "20.0 +/- 4.7", "20.0"),
        ("GMoE", "X", "X", "X", "X", "X"),
        ("TopK", "X", "X", "X", "X", "X"),
    )
    assert animals.columns == ("Algorithm", "env0", "env1", "Avg")
    assert animals.rows[3] == ("TopK", "50.0 +/- 0.0", "70.0 +/- 0.0", "60.0")
    assert averages.columns == ("Algorithm", "PACS", "Animals", "Avg")
    assert averages.rows[1] == ("IRM", "20.0 +/- 4.7", "60.0 +/- 0.0", "40.0")
    assert averages.rows[2] == ("GMoE", "X", "60.0 +/- 0.0", "X")


def test_labels_need_the_number_of_environments_of_domainbed(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "PACS", "ERM", [0], {0: ([0.5] * 3, [0.5] * 3)})
    assert collect(read(tmp_path)).environments == {"PACS": ["env0", "env1", "env2"]}


def one_step(folder: Path, test_env: int = 0, environments: int = 2, **args: Any) -> RunFolder:
    scores = ([0.5] * environments, [0.5] * environments)
    return write_run(folder, "RotatedDigits", "TopK", [test_env], {0: scores}, **args)


def test_two_runs_of_one_cell_are_refused(tmp_path: Path) -> None:
    one_step(tmp_path / "topk_seed0_aaaa", seed=0)
    one_step(tmp_path / "topk_seed1_bbbb", seed=1)
    with pytest.raises(RecordError) as error:
        write(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: found two runs of TopK on RotatedDigits, test envs [0], trial seed 0, "
        "hparams seed 0, in topk_seed0_aaaa and topk_seed1_bbbb; expected one. A row of "
        "DomainBed's tables is one setting with one run for each test environment, trial seed and "
        "hparams seed. Leave only those in the folder; for sweeps over settings or seeds use "
        f"`dynmoe-report {tmp_path}`."
    )
    assert not (tmp_path / "results.txt").exists()
    assert len(read(tmp_path, keep=lambda record: record["args"]["seed"] == 1)) == 1


def test_settings_that_share_a_name_are_refused(tmp_path: Path) -> None:
    # No cell has two runs, but the row would mix 4 experts with 8.
    for env, experts in enumerate((4, 8)):
        run = one_step(tmp_path / f"env{env}", env)
        run.write_run({"config": {"moe.num_experts": experts, "seed": env}})
        run.mark_done()
    with pytest.raises(RecordError, match=r"found different hparams of TopK .* in env0 and env1"):
        read(tmp_path)


def test_hparams_may_differ_between_draws_and_their_trials(tmp_path: Path) -> None:
    for index, (draw, trial) in enumerate(((0, 0), (1, 0), (1, 1))):
        run = one_step(tmp_path / str(index), hparams_seed=draw, trial_seed=trial)
        record = run.read("results")[0] | {"hparams": {"lr": index}}
        (run.path / "results.jsonl").write_text(json.dumps(record) + "\n")
    assert len(read(tmp_path)) == 3


def test_runs_of_ours_without_a_sound_result_are_left_out_and_named(tmp_path: Path) -> None:
    for env, name in enumerate(("sound", "diverged")):
        run = one_step(tmp_path / name, env)
        run.write_run({"config": {}, **({"nonfinite_step": 7} if env else {})})
        run.mark_done()
    one_step(tmp_path / "stopped", 1, seed=1).write_run({"config": {}})
    text = write(tmp_path)
    assert len(read(tmp_path)) == 1
    assert "Left out: diverged, the training loss was not finite at step 7.\n" in text
    assert "Left out: stopped, stopped.\n" in text
    (tmp_path / "stopped" / "run.json").unlink()  # as a run of DomainBed, which has no such file
    assert len(read(tmp_path)) == 2


def test_environments_must_agree(tmp_path: Path) -> None:
    one_step(tmp_path / "a", 0, environments=2)
    one_step(tmp_path / "b", 1, environments=3)
    with pytest.raises(RecordError, match="different numbers of environments of RotatedDigits"):
        read(tmp_path)


def test_missing_keys_are_named(tmp_path: Path) -> None:
    run = one_step(tmp_path / "run")
    record = run.read("results")[0]
    del record["args"]["trial_seed"], record["env1_out_acc"]
    run.append("results", record | {"step": 1})
    with pytest.raises(RecordError) as error:
        read(tmp_path)
    assert str(error.value) == (
        f"{run.path / 'results.jsonl'}, line 2: expected a record of DomainBed's format, found no "
        "args.trial_seed, env1_out_acc; move the run folder elsewhere, or run it again"
    )


def test_test_environment_must_be_recorded(tmp_path: Path) -> None:
    one_step(tmp_path / "run", test_env=2)
    with pytest.raises(RecordError, match="found no env2_in_acc, env2_out_acc"):
        read(tmp_path)


def test_folder_without_runs(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"expected run folders with a results\.jsonl in it"):
        write(tmp_path / "nowhere")
