import json
import math
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support.models import tiny_llama, tiny_tokenizer, token_batches

from zssvd_lightning import CompressionConfig, compress
from zssvd_lightning.errors import NonFiniteError, TaskError
from zssvd_lightning.evaluation import zero_shot
from zssvd_lightning.evaluation.rows import LOCAL
from zssvd_lightning.evaluation.zero_shot import accuracy, load_tasks, side_by_side, table

ROWS = {
    "piqa": [
        {"goal": goal, "choices": choices, "gold": i % 2}
        for i, (goal, choices) in enumerate(
            [
                ("Boil an egg", ["Hold it in warm breath ", "Put it in boiling water for eight minutes."]),
                ("dry", ["sun", "a wet cloth that's cold"]),
                ('Say "no"', ['By "no", and \\n {{goal}}', "n"]),
                ("sew", ["with a needle", "with an eel"]),
                ("Émile's bike", ["oil the chain of it", "é"]),
                ("sit", ["on a chair", "on two chairs at once"]),
            ]
        )
    ],
    "arc_easy": [
        {"id": i, "question": question, "choices": choices, "gold": i % len(choices)}
        for i, (question, choices) in enumerate(
            [
                ("Which is soft?", ["fur", "a rock", "the hull of a ship", "ice"]),
                ("What burns?", ["wood", "water", "sand"]),
                ("12 of 4?", ["3", "16", "8", "48"]),
                ("Which way is up?", ["where birds fly", "[1]", "4", "to the north"]),
                ("Who barks?", ["a dog", "trees have bark, but they do not"]),
            ]
        )
    ],
    "winogrande": [
        {"sentence": sentence, "choices": choices, "gold": i % 2}
        for i, (sentence, choices) in enumerate(
            [
                ("Ann met Bo, as _ was late.", ["Ann", "Bo"]),
                ("_ is an owl, not a cat_.", ["Tim", "The other one"]),
                ("The bed or the _ ?  ", ["quilt", "mat"]),
                ("He put it in the _, it fit.", ["box", "large chest"]),
                ("No, _'s 3.", ["it", "everybody"]),
            ]
        )
    ],
}


def write(folder: Path, rows=ROWS):
    for name, of_task in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in of_task)
        (folder / LOCAL[name].file).write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture
def data(tmp_path):
    return write(tmp_path)


def model_of(kind="dense"):
    model = tiny_llama(max_position_embeddings=256)
    for p in model.parameters():  # far enough apart for every choice to have its own likelihood
        p.data.mul_(4)
    if kind == "compressed":
        compress(model, token_batches(2), CompressionConfig(prune_ratio=0.4, corrections=0))
    return model


def tokenizer_with_end():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<unk>"
    return tokenizer


def log_likelihood(model, tokenizer, context, continuation):
    ids = tokenizer(context + continuation, return_tensors="pt").input_ids
    log_p = model(input_ids=ids).logits[0].log_softmax(-1)
    return sum(log_p[t - 1, ids[0, t]].item() for t in range(len(tokenizer(context).input_ids), ids.shape[1]))


def asked(name, row):
    """The context and the continuation of each choice."""
    if name == "winogrande":
        before, after = row["sentence"].split("_", 1)
        return [(before + choice, " " + after.strip()) for choice in row["choices"]]
    return [(f"Question: {row[LOCAL[name].field]}\nAnswer:", " " + choice) for choice in row["choices"]]


def right(name, row, model, tokenizer):
    """Whether the likeliest choice is right: plainly, and by character."""
    scores = [log_likelihood(model, tokenizer, *pair) for pair in asked(name, row)]
    by_character = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
    return {
        "acc": scores.index(max(scores)) == row["gold"],
        "acc_norm": by_character.index(max(by_character)) == row["gold"],
    }


@pytest.mark.parametrize("kind", ["dense", "compressed"])
@torch.no_grad()
def test_accuracy_is_that_of_log_likelihoods_taken_by_hand(data, kind, monkeypatch, capsys):
    model, tokenizer = model_of(kind).train(), tokenizer_with_end()
    here = data / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    scores = accuracy(model, tokenizer, load_tasks(ROWS, data), batch_size=3)
    assert list(scores) == list(ROWS)
    assert not list(here.iterdir())
    assert capsys.readouterr().out == ""
    assert all(module.training for module in model.modules())
    assert tokenizer.pad_token is None
    model.eval()
    for name, rows in ROWS.items():
        n = len(rows)
        expected = {"rows": n}
        for metric in LOCAL[name].metrics:
            p = sum(right(name, row, model, tokenizer)[metric] for row in rows) / n
            expected |= {metric: p, f"{metric}_stderr": math.sqrt(p * (1 - p) / (n - 1))}
        assert scores[name] == pytest.approx(expected)


@torch.no_grad()
def test_likelihoods_in_padded_batches_are_those_of_single_rows(data, monkeypatch):
    model, tokenizer, results = model_of().double(), tokenizer_with_end(), []
    *harness, evaluate = zero_shot._harness()

    def keeping(*told, **named):
        results.append(evaluate(*told, **named))
        return results[-1]

    monkeypatch.setattr(zero_shot, "_harness", lambda: (*harness, keeping))
    state = torch.get_rng_state()
    accuracy(model, tokenizer, load_tasks(ROWS, data), batch_size=5)
    assert torch.equal(torch.get_rng_state(), state)
    for name, rows in ROWS.items():
        samples = sorted(results[0]["samples"][name], key=lambda sample: sample["doc_id"])
        for row, sample in zip(rows, samples, strict=True):
            found = [response[0] for response in sample["filtered_resps"]]
            expected = [log_likelihood(model, tokenizer, *pair) for pair in asked(name, row)]
            assert found == pytest.approx(expected, rel=1e-9)


def test_files_are_tasks_of_their_own(data, tmp_path):
    (data / "my rows.jsonl").write_text((data / "arc_easy_test.jsonl").read_text())
    (data / "piqa_val.jsonl").rename(data / "line\u2028.jsonl")
    model, tokenizer = model_of(), tokenizer_with_end()
    files = ["my rows.jsonl", "line\u2028.jsonl", str(data / "winogrande_val.jsonl")]
    scores = accuracy(model, tokenizer, load_tasks([*files, "arc_easy"], data))
    assert list(scores) == ["my rows", "line\u2028", "winogrande_val", "arc_easy"]
    assert scores["my rows"] == scores["arc_easy"]
    assert "acc_norm" not in scores["winogrande_val"]
    assert scores["line\u2028"]["rows"] == len(ROWS["piqa"])
    for names in (["arc_easy", "arc_easy"], ["my rows.jsonl", str(data / "my rows.jsonl")]):
        with pytest.raises(TaskError, match="two tasks have the name"):
            load_tasks(names, data)
    (data / "arc_easy_test.jsonl").write_text(json.dumps(ROWS["piqa"][0]))
    with pytest.raises(TaskError, match="line 1: no text 'question'"):
        load_tasks(["arc_easy"], data)
    for first in ('{"prompt": "a", "choices": ["b", "c"], "gold": 0}', '{"goal": "a", "question": "a"}', "[1]"):
        (data / "my rows.jsonl").write_text("\n" + first)
        with pytest.raises(TaskError, match="line 2: rows have one of the fields 'goal', 'question', 'sentence'"):
            load_tasks(["my rows.jsonl"], data)
    with pytest.raises(TaskError, match="cannot read the rows"):
        load_tasks([str(tmp_path / "nowhere.jsonl")])
    with pytest.raises(TaskError, match="NUL"):
        load_tasks(["a\0.jsonl"])


def test_plain_and_normalized_accuracy_differ_by_the_length_of_choices(tmp_path):
    rows = [{"goal": "go", "choices": ["a", "a" * 20], "gold": 1}] * 3
    model = model_of()
    for p in model.parameters():
        p.data.zero_()  # every character is as likely, so that the short choice wins, and by character neither
    scores = accuracy(model, tokenizer_with_end(), load_tasks(["piqa"], write(tmp_path, {"piqa": rows})))
    assert scores["piqa"]["acc"] == 0
    rows[0] = rows[0] | {"choices": ["a" * 20, "a"]}
    scores = accuracy(model, tokenizer_with_end(), load_tasks(["piqa"], write(tmp_path, {"piqa": rows})), limit=1)
    assert scores["piqa"]["acc"] == 1
    assert scores["piqa"]["rows"] == 1
    assert "acc_stderr" not in scores["piqa"]


def as_on_the_hub(name, row):
    if name == "piqa":
        sol1, sol2 = row["choices"]
        return {"goal": row["goal"], "sol1": sol1, "sol2": sol2, "label": row["gold"]}
    if name == "arc_easy":
        labels = "ABCD"[: len(row["choices"])]
        choices = {"text": row["choices"], "label": list(labels)}
        return {"question": row["question"], "choices": choices, "answerKey": labels[row["gold"]]}
    option1, option2 = row["choices"]
    return {"sentence": row["sentence"], "option1": option1, "option2": option2, "answer": str(row["gold"] + 1)}


@pytest.mark.parametrize("name", LOCAL)
def test_requests_are_those_of_the_harness(data, name):
    from datasets import Dataset
    from lm_eval import tasks

    rows = Dataset.from_list([as_on_the_hub(name, row) for row in ROWS[name]])
    splits = {"training_split": None, "validation_split": "rows", "test_split": None}
    its = {"task": name, "custom_dataset": lambda **_: {"rows": rows}, **splits}
    folder = Path(tasks.__file__).parent / {"arc_easy": "arc"}.get(name, name)
    manager = tasks.TaskManager(include_path=folder, include_defaults=False)
    theirs = manager.load([{"group": "own", "task": [its]}])["tasks"][name]
    ours = load_tasks([name], data)["tasks"][name]
    results = [(-float(i), False) for i in range(4)]
    assert theirs.config.num_fewshot is None
    for task in (ours, theirs):
        task.build_all_requests()
    assert [r.args for r in ours.instances] == [r.args for r in theirs.instances]
    for (_, own), (_, other), row in zip(ours.doc_iterator(), theirs.doc_iterator(), ROWS[name], strict=True):
        given = results[: len(row["choices"])]
        assert ours.process_results(own, given) == theirs.process_results(other, given)
        assert ours.process_results(own, given)["acc"] == (row["gold"] == 0)


def test_rows_are_read_anew_and_limited(data):
    model, tokenizer = model_of(), tokenizer_with_end()
    before = accuracy(model, tokenizer, load_tasks(["piqa"], data))["piqa"]["acc"]
    write(data, {"piqa": [row | {"gold": 1 - row["gold"]} for row in ROWS["piqa"]]})
    tasks = load_tasks(["piqa"], data)
    assert accuracy(model, tokenizer, tasks)["piqa"]["acc"] == pytest.approx(1 - before)
    assert accuracy(model, tokenizer, tasks, limit=2)["piqa"]["rows"] == 2


def test_tasks_of_ones_own_beside_local_rows(data, tmp_path):
    own = {
        "task": "my_words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data / "piqa_val.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{goal}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
    }
    group = {"group": "mine", "task": ["my_words"]}
    folder = tmp_path / "include"
    folder.mkdir()
    for entry in (own, group):
        (folder / f"{'group' in entry}.yaml").write_text(yaml.safe_dump(entry))
    scores = accuracy(model_of(), tokenizer_with_end(), load_tasks(["mine", "winogrande"], data, folder))
    assert set(scores) == {"my_words", "winogrande"}
    assert scores["my_words"]["rows"] == len(ROWS["piqa"])
    with pytest.raises(TaskError, match="did you mean 'my_words'"):
        load_tasks(["my_word"], data, folder)


def test_nan_is_an_error_and_no_accuracy(data):
    model = model_of()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="NaN on piqa"):
        accuracy(model, tokenizer_with_end(), load_tasks(["piqa"], data))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"goal": "a", "choices": ["b", "c"], "gold": 2}', "line 2: gold 2 is not the index"),
        ('{"goal": "a", "choices": ["b", "c"], "gold": "1"}', "line 2: gold '1' is not the index"),
        ('{"goal": "a", "choices": ["b", "c"], "gold": -1}', "gold -1"),
        ('{"goal": "a", "choices": ["b", "c"], "gold": 1.0}', "gold 1.0"),
        ('{"goal": "a", "choices": ["b", "c"], "gold": true}', "gold True"),
        ('{"goal": "a", "choices": ["b", "c"]}', "gold None"),
        ('{"goal": "a", "choices": ["b"], "gold": 0}', "not two texts or more"),
        ('{"goal": "a", "choices": ["b", ""], "gold": 0}', "not two texts or more"),
        ('{"question": "a", "choices": ["b", "c"], "gold": 0}', "no text 'goal'; rows are {goal, choices, gold}"),
        ('{"goal": "a", "choices": ["b", " "], "gold": 0}', "line 2: choices"),
        ('{"goal": " ", "choices": ["b", "c"], "gold": 0}', "line 2: no text 'goal'"),
        ('{"goal": "a", "choices": ["b", "\\ud800"], "gold": 0}', "line 2: half of a character"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('["a"]', "no text 'goal'"),
        ("{", "line 2 is not JSON"),
    ],
)
def test_malformed_rows(data, line, message):
    path = data / LOCAL["piqa"].file
    path.write_text(path.read_text().splitlines()[0] + "\n" + line)
    with pytest.raises(TaskError) as refused:
        load_tasks(["piqa"], data)
    assert message in str(refused.value)


def test_files_and_names_that_are_not_there(data, tmp_path):
    for text in ("No blank.", "Nothing behind the _ "):
        sentence = {"sentence": text, "choices": ["a", "b"], "gold": 0}
        with pytest.raises(TaskError, match="line 1: no blank '_'"):
            load_tasks(["winogrande"], write(data, {"winogrande": [sentence]}))
    (data / "piqa_val.jsonl").write_text("\n")
    with pytest.raises(TaskError, match="holds no rows"):
        load_tasks(["piqa"], data)
    (data / "piqa_val.jsonl").unlink()
    with pytest.raises(TaskError, match=r"cannot read the rows .*piqa_val\.jsonl"):
        load_tasks(["piqa"], data)
    with pytest.raises(TaskError, match="unknown task 'winogrand'; did you mean 'winogrande'"):
        load_tasks(["winogrand"], data)
    with pytest.raises(TaskError, match=r"there are piqa, arc_easy, winogrande$"):
        load_tasks(["hellaswag"], data)
    with pytest.raises(TaskError, match="does not exist"):
        load_tasks(["piqa"], data, tmp_path / "nowhere")


def test_without_data_tasks_are_the_harness_s(tmp_path, monkeypatch):
    from lm_eval import tasks

    shutil.copytree(Path(tasks.__file__).parent / "piqa", tmp_path / "piqa")  # it takes seconds to list all tasks
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "manager.py"))
    with pytest.raises(TaskError, match="unknown task 'piqqa'; did you mean 'piqa'"):
        load_tasks(["piqqa"])
    with pytest.raises(TaskError, match=r"task 'piqa' does not load: .*data=FOLDER with piqa_val\.jsonl"):
        load_tasks(["piqa"])


def test_a_tokenizer_without_an_end(data):
    with pytest.raises(TaskError, match="no bos_token and no eos_token"):
        accuracy(model_of(), tiny_tokenizer(), load_tasks(["piqa"], data))


def test_a_choice_longer_than_the_model_takes_is_an_error_with_a_name(data):
    row = {"goal": "a", "choices": ["b " * 500, "c"], "gold": 0}
    with pytest.raises(TaskError, match="piqa has no tokens, or more than the model takes"):
        accuracy(model_of(), tokenizer_with_end(), load_tasks(["piqa"], write(data, {"piqa": [row]})))


def test_without_the_harness(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(TaskError, match=r"pip install 'zssvd-lightning\[zero-shot\]'"):
        load_tasks(["piqa"], data)


def test_models_side_by_side():
    scores = {
        "dense": {"piqa": {"rows": 9, "acc": 0.75, "acc_stderr": 0.125}},
        "compressed": {"piqa": {"rows": 9, "acc": 0.5, "acc_stderr": 0.25}},
    }
    compared = side_by_side(scores)
    assert compared["piqa"]["rows"] == 9
    assert compared["piqa"]["acc"] == {"dense": 0.75, "compressed": 0.5}
    columns = [[str(cell) for cell in column.cells] for column in table(compared).columns]
    assert columns == [["piqa"], ["acc"], ["0.7500 ± 0.1250"], ["0.5000 ± 0.2500"]]
