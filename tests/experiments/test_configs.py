"""A configuration is a file that one copies: it runs, its flags win, and it says which result to expect."""

import re
import statistics
from pathlib import Path

import pytest

from experiments import config, footprint, run
from experiments.config import ConfigError, parse
from experiments.sweep import Store, Sweep, filed, final
from experiments.sweep import main as sweep

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "experiments" / "configs").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_says_its_command_its_time_and_the_result_of_the_record(file: Path) -> None:
    settings, text = config.read(file)
    assert f"python -m experiments run experiments/configs/{file.name}\n" in text and "minutes" in text
    assert len(settings.methods) == 1 and settings.seed == 0 and settings.lr
    sweep = Sweep(Store(ROOT / "results" / f"{settings.name}.jsonl"), pin=False, fixed=True)
    sweep.store.add = None  # type: ignore[assignment] # all of its runs are in the record
    losses = [final(sweep.run(filed(str(file), []), settings.lr, seed)) for seed in range(3)]
    (expected,) = re.findall(r"loss of (\d\.\d{3}) nats", text)
    assert f"{statistics.mean(losses):.3f}" == expected


def test_flags_win_over_the_file_and_a_run_knows_what_it_was_started_with(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text('from experiments.pretrain import Pretrain\nCONFIG = Pretrain(method="full", steps=7, rank=8)\n')
    settings, session = parse(file, ["--steps", "9"])
    assert (settings.steps, settings.rank, settings.method) == (9, 8, "full") and session.out == Path("runs/mine")
    out = ["--out", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(config.json.dumps(vars(parse(file, [])[0])))
    assert parse(file, [*out, "--resume"])[0].steps == 7
    file.write_text(file.read_text().replace("steps=7", "steps=8"))
    with pytest.raises(ConfigError, match=r"--steps 8: .* was started with 7"):
        parse(file, [*out, "--resume"])


@pytest.mark.slow
@pytest.mark.usefixtures("settings_of_a_user")
def test_a_file_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ROOT / "experiments" / "configs" / "gpt_rank_32.py"
    run.main([str(file), "--smoke", "--out", str(tmp_path / "out")])
    assert "lowrank_adam" in capsys.readouterr().out and (tmp_path / "out" / "lowrank_adam.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no such file"),
        ("CONFIG = 3", "has to set CONFIG"),
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("CONFIG =", "SyntaxError"),
        (
            "from experiments.pretrain import Pretrain\nCONFIG = Pretrain(ranks=3)",
            "unexpected keyword argument 'ranks'",
        ),
        ("from experiments.pretrain import Pretrain\nCONFIG = Pretrain(rank=999)", "--rank 999: at most the width"),
    ],
)
@pytest.mark.parametrize("command", [run.main, sweep])
def test_a_file_that_will_not_do_is_refused_in_a_line(command, text: str | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as error:
        command([str(file)])
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pretrain"], "--method"),
        (["pretrain", "vision", "--method", "full"], "--method"),
        (["pretrain", "--method", "fulll"], "--method fulll: choose from"),
        (["pretrain", "--method", "full:lr"], "as :name=value"),
        (["experiments/configs/gpt_dense.py", "--method", "full"], "configuration files have their methods"),
        (["experiments/configs/gpt_dense.py", "experiments/configs/minilm_lora.py"], "files of one experiment"),
    ],
)
def test_a_sweep_is_of_files_or_of_methods(arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as error:
        sweep(arguments)
    assert says in str(error.value)


@pytest.mark.usefixtures("settings_of_a_user")
def test_the_footprint_of_a_step_is_that_of_its_arrays(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(ROOT / "experiments" / "configs" / "gpt_narrow.py")
    footprint.main([file, "--smoke", "--d", "64", "--layers", "1"])
    words = capsys.readouterr().out.split()
    found = dict(zip(words[1::2], map(float, words[2::2]), strict=True))
    # Embedding, head, positions and kernels, not norms and biases; with two moments each.
    values = 3 * (2 * 256 * 64 + 16 * 64 + 12 * 64**2)
    assert words[0] == "full" and found["base"] == 0
    assert found["trained"] == pytest.approx(4 * values / 1e6, rel=0.05)
    assert found["step"] > found["trained"] + found["activations"] > found["trained"]
    with pytest.raises(SystemExit, match="nothing: no such file"):
        footprint.main(["nothing"])
