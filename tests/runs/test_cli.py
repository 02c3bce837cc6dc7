"""The command line on tiny runs: every command, its exit status, and the files it leaves."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from tiny_runs import Checkpoints, arguments, metrics, tensors, weights, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from surpass.cli.main import COMMANDS, main
from surpass.cli.train import read_settings
from surpass.methods.registry import METHODS, describe
from surpass.models.zoo import bpe_tokenizer, save_tiny
from surpass.prompts.sources import load_prompts
from surpass.tasks import task_prompts
from surpass.train.settings import resolved

Output = pytest.CaptureFixture[str]


def surpass(*given: object) -> int:
    """Exit status of a command."""
    try:
        return main([str(part) for part in given])
    except SystemExit as leaving:
        return int(leaving.code or 0)


@pytest.fixture(scope="module")
def trained(models: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything a run can leave: checkpoints, samples and evaluations."""
    folder = tmp_path_factory.mktemp("runs") / "exopd"
    changes = {
        "teacher": models.teacher,
        "prompts": "embedded:sort+missing",
        "train.save_every": 2,
        "train.sample_every": 2,
        "eval.prompts": "embedded:sort+missing",
        "eval.every": 2,
        "eval.limit": 4,
        "eval.samples": 2,
        "eval.ks": "[1, 2]",
    }
    assert surpass("train", "exopd", *arguments(models.student, folder, **changes)) == 0
    return folder


# -- help and mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command: str, capsys: Output) -> None:
    assert surpass(command, "--help") == 0
    said = capsys.readouterr().out
    assert "usage: surpass" in said and command in said


@pytest.mark.parametrize("command", ["show", "merge", "embedded"])
def test_every_data_command_explains_itself(command: str, capsys: Output) -> None:
    assert surpass("data", command, "--help") == 0
    assert f"usage: surpass data {command}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("method", sorted(METHODS))
def test_help_of_a_method_lists_its_fields(
    method: str, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks inside the texts
    assert surpass("train", method, "--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--optimiser.learning_rate" in said and "Peak learning rate." in said
    for field in describe(method).fields:
        assert f"--method.{field.name} " in said
        assert " ".join(field.doc.split()) in said


def test_commands_and_versions(capsys: Output) -> None:
    for given in ([], ["--help"], ["help"]):
        assert surpass(*given) == 0
        said = capsys.readouterr().out
        assert all(f"  {command} " in said for command in COMMANDS)
    assert surpass("--version") == 0
    assert capsys.readouterr().out.startswith("surpass ")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["train"], "usage: surpass train METHOD"),
        (["plan"], "usage: surpass plan METHOD"),
        (["data"], "usage: surpass data COMMAND"),
        (["data", "shwo"], "usage: surpass data COMMAND"),
        (["train", "sft"], "student"),
        (["report"], "usage: surpass report"),
    ],
)
def test_commands_without_meaning_leave_with_status_2(given: list[str], said: str, capsys: Output) -> None:
    assert surpass(*given) == 2
    output = capsys.readouterr()
    assert said in output.out + output.err


def test_missing_folders_are_errors_in_words(tmp_path: Path, capsys: Output) -> None:
    for command in ("report", "compare"):
        assert surpass(command, tmp_path / "none") == 1
        assert "none" in capsys.readouterr().err


# -- methods ------------------------------------------------------------------------------------------------------------


def test_all_methods_in_a_table(capsys: Output) -> None:
    assert surpass("methods") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in METHODS)
    assert "2602.12125" in said


def test_one_method_with_equation_source_and_fields(capsys: Output) -> None:
    assert surpass("methods", "exopd") == 0
    said = capsys.readouterr().out
    # Brackets of equations are not taken for markup.
    assert "E_{y ~ student} [ lambda * log teacher(y)/reference(y) ]" in said
    assert "arXiv: 2602.12125" in said
    assert all(text in said for text in ("reward_scale", "1.25", "guard_entropy", "float | None"))


def test_an_unknown_method_names_the_nearest(capsys: Output) -> None:
    assert surpass("methods", "gropo") == 1
    assert "did you mean 'grpo'?" in capsys.readouterr().err


def test_a_method_of_ones_own(models: Checkpoints, tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "mine.py").write_text(
        '"""Half of SFT.\n\n    min_theta 1/2 E[-log student]\n"""\n\n'
        "from dataclasses import dataclass\n\nfrom surpass.methods.sft import SFT\n\n\n"
        "@dataclass(kw_only=True)\nclass Half(SFT):\n"
        '    """Supervised fine-tuning by halves."""\n\n'
        '    share: float = 0.5\n    """Weight of the loss."""\n'
    )
    own = f"{tmp_path / 'mine.py'}:Half"
    assert surpass("methods", own) == 0
    said = capsys.readouterr().out
    assert "min_theta 1/2 E[-log student]" in said and "Weight of the loss." in said
    given = arguments(models.student, tmp_path / "run", train__steps=1)
    assert surpass("train", own, *given, "--method.share", "0.25") == 0
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored["method"]["share"] == 0.25


# -- plan ---------------------------------------------------------------------------------------------------------------


def test_a_plan_counts_parameters_memory_and_tokens(models: Checkpoints, capsys: Output) -> None:
    given = arguments(models.student, Path("unused"), teacher=models.wide, data__limit=8)
    assert surpass("plan", "exopd", *given) == 0
    said = capsys.readouterr().out
    assert "nothing stands in the way" in said and "roles beside the student: teacher, reference" in said
    assert "KV cache" in said and "AdamW moments" in said
    assert not Path("unused").exists()


def test_a_plan_lists_everything_that_would_fail(models: Checkpoints, tmp_path: Path, capsys: Output) -> None:
    changes = {"reference": "null", "prompts": tmp_path / "none.jsonl", "rollout.top_p": 0.5}
    assert (
        surpass("plan", "exopd", *arguments(models.student, tmp_path, teacher=models.teacher, **changes)) == 1
    )
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("would fail:") == 2
    assert "set --reference student" in said and "none.jsonl: there is no such file" in said


# -- what a run leaves --------------------------------------------------------------------------------------------------


def test_the_written_configuration_gives_the_same_settings(trained: Path, models: Checkpoints) -> None:
    file = trained / "config.yaml"
    config, method, _ = read_settings("train", "exopd", ["--config", str(file)])
    assert resolved(config, method) == yaml.safe_load(file.read_text())


def test_the_configuration_of_another_method_is_refused(trained: Path, capsys: Output) -> None:
    assert surpass("train", "opd", "--config", trained / "config.yaml") == 2
    assert "is the configuration of method ExOPD, not of OPD" in capsys.readouterr().err


def test_a_repeated_run_gives_the_same_weights(trained: Path, tmp_path: Path) -> None:
    assert surpass("train", "exopd", "--config", trained / "config.yaml", "--output", tmp_path / "run") == 0
    assert weights(tmp_path / "run") == weights(trained)


def test_the_model_loads_elsewhere(trained: Path, models: Checkpoints) -> None:
    for folder in (trained / "model", trained / "checkpoints" / "step_000002" / "model"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": "sort 321"}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        assert model(ids).logits.isfinite().all()
    # The last checkpoint is the model, and neither is what training began with.
    last = (trained / "checkpoints" / "step_000004" / "model" / "model.safetensors").read_bytes()
    assert last == weights(trained) != (Path(models.student) / "model.safetensors").read_bytes()


def test_what_a_run_writes_down(trained: Path) -> None:
    rows = metrics(trained)
    assert [row["update"] for row in rows] == [1, 2, 3, 4]
    assert all(
        {"loss", "grad_norm", "kl/teacher", "kl/reference", "tokens/trained"} <= set(row) for row in rows
    )
    kept = [json.loads(line) for line in (trained / "samples" / "step_000001.jsonl").read_text().splitlines()]
    assert {len(row["tokens"]) for row in kept} == {len(row["signals"]["advantage"]) for row in kept}
    evaluations = [json.loads(line) for line in (trained / "evaluations.jsonl").read_text().splitlines()]
    assert [(row["step"], row["domain"]) for row in evaluations] == [
        (step, domain) for step in (2, 4) for domain in ("sort", "missing", "overall")
    ]
    environment = json.loads((trained / "environment.json").read_text())
    assert environment["first_prompt"].startswith("<|user|>") and len(environment["template"]) == 12


def test_a_lora_run_saves_an_adapter(models: Checkpoints, tmp_path: Path) -> None:
    given = arguments(models.student, tmp_path / "run", teacher=models.teacher)
    assert surpass("train", "exopd", *given, "--model.lora.rank", 2) == 0
    base = AutoModelForCausalLM.from_pretrained(models.student)
    ids = torch.tensor([[4, 5, 6]])
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "model")
    assert not torch.allclose(adapted(ids).logits, before)
    with adapted.disable_adapter():  # type: ignore[operator]
        torch.testing.assert_close(adapted(ids).logits, before)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").chat_template


def test_trackers_are_written_or_said_to_be_missing(
    models: Checkpoints, tmp_path: Path, capsys: Output
) -> None:
    status = surpass(
        "train", "sft", *arguments(models.student, tmp_path / "run"), "--train.trackers", "[tensorboard]"
    )
    try:
        importlib.import_module("tensorboard")
    except ImportError:
        said = capsys.readouterr().err
        assert status == 1 and "tensorboard" in said and "pip install" in said
    else:
        assert status == 0 and list((tmp_path / "run").rglob("events.out.tfevents.*"))


# -- eval, report, compare ----------------------------------------------------------------------------------------------


def test_an_evaluation_prints_and_keeps_its_numbers(
    models: Checkpoints, tmp_path: Path, capsys: Output
) -> None:
    given = [
        "--student",
        models.student,
        "--prompts",
        "embedded:sort",
        "--eval.limit",
        3,
        "--eval.samples",
        2,
    ]
    given += ["--eval.ks", "[1, 2]", "--rollout.max_new_tokens", 4, "--out", tmp_path / "found"]
    assert surpass("eval", *given) == 0
    said = capsys.readouterr().out
    assert "pass@1" in said and "pass@2" in said and "sort" in said
    assert (tmp_path / "found" / "evaluation.json").exists()
    samples = (tmp_path / "found" / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 6


def test_a_report_and_a_comparison(trained: Path, tmp_path: Path, capsys: Output) -> None:
    assert surpass("report", trained, "--out", tmp_path / "report.html") == 0
    assert "<html" in (tmp_path / "report.html").read_text()[:500]
    repeated = [
        "--config",
        trained / "config.yaml",
        "--output",
        tmp_path / "other",
        "--method.reward_scale",
        2,
    ]
    assert surpass("train", "exopd", *repeated) == 0
    capsys.readouterr()
    out = tmp_path / "comparison.html"
    assert surpass("compare", trained, tmp_path / "other", "--knob", "method.reward_scale", "--out", out) == 0
    assert "pass@1" in capsys.readouterr().out and out.stat().st_size > 1000


# -- data ---------------------------------------------------------------------------------------------------------------


def test_prompts_are_shown_as_the_model_reads_them(
    models: Checkpoints, tmp_path: Path, capsys: Output
) -> None:
    file = tmp_path / "task.jsonl"
    assert surpass("data", "embedded", "sort+missing", "--count", 6, "--out", file) == 0
    capsys.readouterr()
    given = ["--student", models.student, "--prompts", file, "--count", 2, "--data.limit", 4]
    assert surpass("data", "show", *given) == 0
    said = capsys.readouterr().out
    (first, *_) = load_prompts(str(file))
    assert f"<|user|>{first.messages[0]['content']}<|end|><|assistant|>" in said  # type: ignore[index]
    assert said.count("<|assistant|>") == 2 and "4 prompts" in said
    assert "template" in said and "reads 256 tokens" in said and "solution" in said
    assert surpass("data", "show", *given, "--data.presett", "gsm8k") == 2
    assert "did you mean data.preset?" in capsys.readouterr().err


def test_an_embedded_task_as_a_file_is_the_task(tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    assert (
        surpass("data", "embedded", "sort+chain", "--count", 6, "--split", "eval", "--seed", 3, "--out", file)
        == 0
    )
    made, read = task_prompts("sort+chain", 6, 3, "eval"), load_prompts(str(file))
    for mine, theirs in zip(made, read, strict=True):
        for name in ("id", "messages", "answer", "response", "domain", "tags", "privileged"):
            assert getattr(mine, name) == getattr(theirs, name)
        assert theirs.columns["verifier"] == "embedded:sort+chain"


def test_an_embedded_task_in_a_file_can_be_trained_on(models: Checkpoints, tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    assert surpass("data", "embedded", "sort", "--count", 24, "--out", file) == 0
    for name, prompts in (("file", file), ("task", "embedded:sort")):
        given = arguments(models.student, tmp_path / name, prompts=prompts, train__steps=2)
        assert surpass("train", "sft", *given) == 0
    assert weights(tmp_path / "file") == weights(tmp_path / "task")


def test_merged_checkpoints(models: Checkpoints, tmp_path: Path, capsys: Output) -> None:
    experts = ["--experts", models.student, models.teacher]
    assert surpass("data", "merge", "--out", tmp_path / "mean", *experts) == 0
    one, two, base = (tensors(Path(p)) for p in (models.student, models.teacher, models.other))
    mean = load_file(tmp_path / "mean" / "model.safetensors")
    further = [*experts, "--base", models.other, "--alpha", 0.5]
    assert surpass("data", "merge", "--out", tmp_path / "further", *further) == 0
    expo = load_file(tmp_path / "further" / "model.safetensors")
    for name, value in mean.items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2)
        torch.testing.assert_close(expo[name], value + 0.5 * (value - base[name]))
    AutoTokenizer.from_pretrained(tmp_path / "mean")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "mean").num_parameters() > 0
    capsys.readouterr()
    assert surpass("data", "merge", "--out", tmp_path / "mean", *experts) == 1
    assert "already holds a checkpoint" in capsys.readouterr().err


def test_merges_that_cannot_be_are_refused(models: Checkpoints, tmp_path: Path, capsys: Output) -> None:
    save_tiny(tmp_path / "words", tokenizer=bpe_tokenizer(["sort 321"], 300), hidden=16, heads=2, layers=1)
    for given, text in (
        (["--experts", models.student, models.wide], "different sizes"),
        (["--experts", models.student, tmp_path / "words"], "different vocabularies"),
        (["--experts", models.student, "--alpha", 0.5], "needs both --base DIR and --alpha"),
        (["--experts", models.student, "--base", models.other], "needs both --base DIR and --alpha"),
    ):
        assert surpass("data", "merge", "--out", tmp_path / "out", *given) == 1
        assert text in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert surpass("data", "embedded", "srot", "--out", tmp_path / "x.jsonl") == 1
    assert "did you mean 'sort'?" in capsys.readouterr().err
    assert (
        surpass(
            "data", "show", "--student", models.student, "--prompts", write_lines(tmp_path / "e.jsonl", [])
        )
        == 1
    )
    assert "found no rows" in capsys.readouterr().err
