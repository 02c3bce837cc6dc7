"""Reading prompts: formats, conventions, presets, and errors in words."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from surpass.prompts.sources import DataError, MissingSourceError, load_prompts
from surpass.records import Prompt
from surpass.tasks import task_prompts


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load_one(tmp_path, row, **options) -> Prompt:
    return load_prompts(write(tmp_path / "one.jsonl", [row]), **options)[0]


def test_all_formats_read_alike(tmp_path, monkeypatch):
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1), "level": i} for i in range(3)]
    expected = load_prompts(write(tmp_path / "a.jsonl", rows))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    write(tmp_path / "lines.json", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "d"))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "e"))
    (tmp_path / "f").mkdir()
    write(tmp_path / "f" / "train-0.jsonl", rows)
    for name in ("b.json", "lines.json", "c.parquet", "d", "e", "f"):
        assert load_prompts(str(tmp_path / name)) == expected, name
    asked = {}

    def load_dataset(name, configuration, split):
        asked.update(name=name, configuration=configuration, split=split)
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_prompts("owner/name:main", split="test") == expected
    assert asked == {"name": "owner/name", "configuration": "main", "split": "test"}
    assert expected[2] == Prompt(id=expected[2].id, messages="2+1=", answer="3", columns={"level": 2})


def test_limit_reads_the_first_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": str(i)} for i in range(9)])
    assert [p.messages for p in load_prompts(path, limit=2)] == ["0", "1"]
    with pytest.raises(DataError, match="at least 1, found 0"):
        load_prompts(path, limit=0)


@pytest.mark.parametrize(
    ("row", "messages", "response"),
    [
        ({"prompt": "2+2="}, "2+2=", None),
        ({"question": "2+2?"}, ({"role": "user", "content": "2+2?"},), None),
        ({"problem": "2+2?"}, ({"role": "user", "content": "2+2?"},), None),
        (
            {"prompt": [{"role": "user", "content": "q", "name": None}], "completion": "a"},
            ({"role": "user", "content": "q"},),
            "a",
        ),
        (
            {"prompt": "q", "completion": [{"role": "assistant", "content": "a"}]},
            "q",
            "a",
        ),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            ({"role": "user", "content": "q"},),
            "a",
        ),
    ],
)
def test_conventions(tmp_path, row, messages, response):
    prompt = load_one(tmp_path, row)
    assert (prompt.messages, prompt.response) == (messages, response)


def test_domain_comes_from_the_argument_then_the_row_then_the_default(tmp_path):
    row = {"prompt": "q", "data_source": "numina", "extra_info": {"opd_teacher": "math", "index": 3}}
    assert load_one(tmp_path, row).domain == "math"
    assert load_one(tmp_path, row, domain="mine").domain == "mine"
    assert load_one(tmp_path, {"prompt": "q", "data_source": "numina"}).domain == "numina"
    assert load_one(tmp_path, {"prompt": "q"}).domain == "default"
    # The rest of a nested column stays available to reward functions.
    assert load_one(tmp_path, row).columns["extra_info"]["index"] == 3


def test_privileged_texts_never_enter_the_messages(tmp_path):
    row = {
        "prompt": "q",
        "solution": "s",
        "hint": "h",
        "privileged": {"skill": "k", "none": None},
        "privileged_context": "c",
    }
    prompt = load_one(tmp_path, row)
    assert prompt.privileged == {"solution": "s", "hint": "h", "skill": "k", "privileged_context": "c"}
    assert prompt.messages == "q"
    with pytest.raises(DataError, match=r"privileged hint to be text, found \[1\]"):
        load_one(tmp_path, {"prompt": "q", "h": [1]}, fields={"hint": "h"})


def test_fields_rename_columns(tmp_path):
    prompt = load_one(
        tmp_path,
        {"q": "2+2=", "gold": {"value": 4}, "kind": "sums", "key": 17},
        fields={"prompt": "q", "answer": "gold.value", "domain": "kind", "id": "key"},
    )
    assert (prompt.messages, prompt.answer, prompt.domain, prompt.id) == ("2+2=", 4, "sums", "17")


ROWS = st.lists(
    st.fixed_dictionaries({"prompt": st.text(min_size=1).filter(str.strip), "answer": st.integers(0, 3)}),
    min_size=1,
    max_size=8,
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS)
def test_hashed_ids_are_unique_and_do_not_depend_on_place(tmp_path, rows):
    ids = [p.id for p in load_prompts(write(tmp_path / "a.jsonl", rows))]
    assert len(set(ids)) == len(rows)
    back = [p.id for p in load_prompts(write(tmp_path / "b.jsonl", rows[::-1]))]
    assert sorted(ids) == sorted(back)
    assert load_one(tmp_path, rows[-1]).id == back[0]


def test_repeated_given_ids_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}])
    with pytest.raises(DataError, match="first '1'"):
        load_prompts(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n\n{"prompt": \n', r"a.jsonl line 3: not valid JSON"),
        ('{"prompt": "a"}\n[1]\n', "line 2: expected an object with named fields, found list"),
        ('{"promt": "a"}\n', r"line 1: no prompt: looked for prompt or messages .*did you mean 'promt'"),
        ('{"prompt": null}\n', r"line 1: the prompt field \(prompt\) is empty"),
        ('{"prompt": "  "}\n', r"line 1: the prompt field \(prompt\) is blank"),
        ('{"prompt": 3}\n', "text or a list of messages, found 3"),
        ('{"prompt": [{"content": "a"}]}\n', "messages with role and content"),
        (
            '{"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n',
            "nothing is left to answer",
        ),
        ("\n", "found no rows"),
    ],
)
def test_malformed_rows_are_errors_with_their_place(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        load_prompts(str(tmp_path / "a.jsonl"))


def test_missing_and_unsupported_sources(tmp_path, monkeypatch):
    for source in (tmp_path / "no.jsonl", tmp_path / "no" / "folder"):
        with pytest.raises(MissingSourceError) as caught:
            load_prompts(str(source))
        assert isinstance(caught.value, FileNotFoundError)
        assert isinstance(caught.value, ValueError)
    (tmp_path / "a.csv").write_text("prompt\n")
    with pytest.raises(DataError, match=r"cannot read \.csv"):
        load_prompts(str(tmp_path / "a.csv"))
    with pytest.raises(DataError, match="neither saved by"):
        load_prompts(str(tmp_path))
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(DataError, match="not a readable Parquet"):
        load_prompts(str(tmp_path / "bad.parquet"))

    def absent(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(MissingSourceError, match="no data set of that name"):
        load_prompts("owner/name")


def test_unknown_split_names_the_known_ones(tmp_path):
    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"prompt": "a"}])}).save_to_disk(
        str(tmp_path / "e")
    )
    with pytest.raises(DataError, match=r"no split 'eval'; there are \['train'\]"):
        load_prompts(str(tmp_path / "e"), split="eval")


def test_unknown_names_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a"}])
    with pytest.raises(DataError, match=r"unknown field 'anser'.*did you mean 'answer'"):
        load_prompts(path, fields={"anser": "x"})
    with pytest.raises(DataError, match="no answer: looked for gold"):
        load_prompts(path, fields={"answer": "gold"})
    with pytest.raises(DataError, match=r"unknown preset 'gsm'; there are .*gsm8k"):
        load_prompts(path, preset="gsm")


def test_embedded_tasks_bring_their_verifier():
    made = load_prompts("embedded:sort", limit=5, seed=3, split="eval", domain="mine")
    assert [p.id for p in made] == [p.id for p in task_prompts("sort", 5, 3, "eval")]
    assert {(p.domain, p.columns["verifier"]) for p in made} == {("mine", "embedded:sort")}
    assert {p.domain for p in load_prompts("embedded:sort+chain", limit=4)} == {"sort", "chain"}
