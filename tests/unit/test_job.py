from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.support.projects import DIGITS, REPOSITORY, write_project
from torchworker import contract
from train_and_ship.infra.errors import JobError
from train_and_ship.infra.interpreter import Interpreter, our_interpreter
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.job.load import job_schema, load_job
from train_and_ship.ship.job_reference import job_reference
from train_and_ship.tasks.extras import require_extras

GOOD = """\
name: plain
model: {factory: plain:build_model}
data: {factory: plain:build_dataset}
train:
  epochs: 2
"""


def refused(tmp_path: Path, text: str) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(JobError) as caught:
        load_job(path)
    return str(caught.value).replace(str(path), "job.yaml")


def test_the_example_job_is_valid_and_its_project_is_beside_it() -> None:
    job, folder = load_job(DIGITS)
    assert (job.name, job.metrics, folder) == ("digits", ("accuracy",), DIGITS.parent)


def test_a_missing_job_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"nowhere\.yaml: no such file"):
        load_job(tmp_path / "nowhere.yaml")


def test_a_job_file_that_lies_beside_the_missing_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "job.yaml").write_text(GOOD)
    (tmp_path / "mine" / "other.yaml").write_text("a: 1\n")
    with pytest.raises(JobError, match=r"mine/job\.yml: no such file; did you mean mine/job\.yaml\?$"):
        load_job(Path("mine/job.yml"))


def test_a_yaml_error_is_named_with_its_line(tmp_path: Path) -> None:
    assert refused(tmp_path, GOOD + "export: [\n").startswith("job.yaml:7:1: not valid YAML")
    assert refused(tmp_path, "name: a\nmodel: b: c\n").startswith("job.yaml:2:")
    assert "not valid YAML" in refused(tmp_path, GOOD + "\x07")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("release: {channel: prod}\nrelease: {channel: staging}\n", ["7:@release: given twice (line 6)"]),
        ("train:\n  epochs: 1\n", ["6:@train: given twice (line 4)"]),
        ("\"name\": other\n", ["6:@name: given twice (line 1)"]),
        ("  batch_size: 8\n  epochs: 3\n  epochs: 4\n", [
            "7:@train.epochs: given twice (line 5)", "8:@train.epochs: given twice (line 5)",
        ]),
        ("gates:\n  accuracy: {min: 0.9, min: 0.1}\nname: a\n", [
            "7:@gates.accuracy.min: given twice (line 7)", "8:@name: given twice (line 1)",
        ]),
        ("  optimizer: {factory: 'a:b', args: {x: [{y: 1, y: 2}]}}\n", [
            "6:@train.optimizer.args.x.0.y: given twice (line 6)",
        ]),
    ],
)  # fmt: skip
def test_a_key_that_is_given_twice_is_refused_whichever_would_count(
    tmp_path: Path, more: str, expected: list[str]
) -> None:
    assert refused(tmp_path, GOOD + more).splitlines() == [f"job.yaml:{line.replace('@', ' ')}" for line in expected]


def test_a_key_that_is_given_twice_is_told_with_the_other_mistakes(tmp_path: Path) -> None:
    told = refused(tmp_path, GOOD + "  epochs: many\n  epoch: 3\n")
    assert "job.yaml:6: train.epochs: given twice (line 5)" in told
    assert "train.epochs: expected" in told and "train.epoch: unknown key" in told


def test_what_a_merge_brings_may_be_given_anew(tmp_path: Path) -> None:
    text = """\
name: merged
model: {factory: plain:build_model, args: &small {width: 4, depth: 1}}
data:
  factory: plain:build_dataset
  args: {<<: *small, depth: 2, again: *small}
train: {epochs: 2}
"""
    path = tmp_path / "job.yaml"
    path.write_text(text)
    job, _ = load_job(path)
    assert job.data.args == {"width": 4, "depth": 2, "again": {"width": 4, "depth": 1}}
    # Of the anchor, once.
    assert refused(tmp_path, text.replace("depth: 1}", "depth: 1, depth: 3}")).count("given twice") == 1


def test_an_empty_file_is_not_a_job(tmp_path: Path) -> None:
    assert "expected keys such as name, model, data, train" in refused(tmp_path, "")


def test_an_unknown_key_is_named_with_its_line_and_the_key_that_was_meant(tmp_path: Path) -> None:
    assert refused(tmp_path, GOOD + "  learning_rat: 1\n") == (
        "job.yaml:6: train.learning_rat: unknown key; did you mean learning_rate?"
    )


def test_a_wrong_type_says_what_was_expected_and_what_was_given(tmp_path: Path) -> None:
    text = GOOD.replace("epochs: 2", "epochs: many")
    assert refused(tmp_path, text) == 'job.yaml:5: train.epochs: expected a valid integer, got "many" (str)'


def test_a_missing_key_says_what_it_is_for(tmp_path: Path) -> None:
    message = refused(tmp_path, GOOD.replace("data: {factory: plain:build_dataset}\n", ""))
    assert message.startswith("job.yaml:1: data: missing; expected called with split=")


def test_every_mistake_is_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = GOOD.replace("plain:build_model", "plain").replace("data:", "dta:") + "gates: {acuracy: {min: 1}}\n"
    lines = refused(tmp_path, text).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["data", "model.factory", "dta", "gates.acuracy"]


def test_a_key_of_another_part_is_named_with_its_part_and_kinds_of_values_in_words_of_yaml(tmp_path: Path) -> None:
    assert refused(tmp_path, GOOD + "metrics: [accuracy]\n").endswith("unknown key; did you mean train.metrics?")
    text = GOOD.replace("build_dataset}", "build_dataset, batch_size: 8}")
    assert refused(tmp_path, text) == "job.yaml:3: data.batch_size: unknown key; did you mean train.batch_size?"
    assert "env: expected a list, such as [a, b], got" in refused(tmp_path, GOOD + "env: {A: b}\n")
    assert "export.formats: expected 'auto' or a list, such as [a, b], got \"onnx\"" in refused(
        tmp_path, GOOD + "export: {formats: onnx}\n"
    )
    assert "gates: expected keys with values, such as {key: value}, got" in refused(
        tmp_path, GOOD + "gates: [accuracy]\n"
    )


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("  processes: 3\n  batch_size: 64\n", "64 is not a multiple of 3"),
        ("  optimizer: adamm\n", "'rmsprop' or {factory: module:attribute}, got \"adamm\""),
        ("export: {formats: []}\n", "export.formats"),
        ("export: {formats: [onnx, onnx]}\n", "each format once"),
        ("gates: {accuracy: {}}\n", "at least one of min, max, vs_live"),
        ("gates: {accuracy: {min: 0.9, max: 0.1}}\n", "0.9 > 0.1"),
        ("  strategy: zero\n", "expected 'ddp' or 'fsdp', got"),
        ("  backend: mpi\n", "expected 'gloo' or 'nccl', got"),
        ("  comm_hook: power_sgd\n", "expected 'fp16' or 'bf16', got"),
        ("  strategy: fsdp\n", "at least 2 processes with strategy: fsdp"),
        ("  strategy: fsdp\n  processes: 2\n  comm_hook: fp16\n", "no comm_hook with strategy: fsdp"),
        ("  strategy: fsdp\n  processes: 2\n  precision: fp16\n", "precision: bf16 or float32 with strategy: fsdp"),
        ("  optimizer: rmsprop\n  fused: true\n", "fused: false for this optimizer"),
        ("  device: cpu\n  backend: nccl\n", "backend: gloo with device: cpu"),
        ("  metrics: [{factory: plain:loss, better: lower}]\n", "give loss another `name`"),
        ("  processes: 3\n", "64 is not a multiple of 3"),
        ("gates: {p50_ms: {vs_live: 0}}\n", "gates: expected only max and times_live for p50_ms"),
        ("gates: {memory_mb: {min: 1}}\n", "gates: expected only max and times_live for memory_mb"),
        ("gates: {size_mb: {max: -1}}\n", "gates: expected a max above 0 for size_mb"),
        ("gates: {p99_ms: {times_live: 0}}\n", "gates.p99_ms.times_live: expected greater than 0"),
        ("gates: {accuracy: {times_live: 1.1}}\n", "gates: expected vs_live for accuracy; times_live is for p50_ms"),
        ("gates: {p95_ms: {max: 1}}\n", "gates.p95_ms: expected something that is measured: accuracy"),
        ("gates: {p50_ms: {}}\n", "at least one of min, max, vs_live, times_live"),
        ("export: {serve: fastest}\n", "export.serve: expected"),
        ("export: {serve: aoti}\n", "one of what is made (torchscript, onnx, pt2), not aoti"),
        (
            "export: {formats: [executorch], dynamic: {length: {axes: {x: 1}}}}\n",
            "expected export.max_batch and export.dynamic.length.max, the largest size that users will send, with",
        ),
        ("export: {batch: 64, max_batch: 8}\n", "expected export.batch, 64 samples at which the model is captured, no"),
        ("export: {max_batch: 1}\n", "export.max_batch: expected greater than or equal to 2"),
        ("export: {quantize: int4}\n", "export.quantize: expected"),
        ("export: {quantize: {formats: [onnx-int4]}}\n", "export.quantize.formats"),
        ("export: {quantize: {sqnr: 30}}\n", "export.quantize.sqnr: unknown key; did you mean sqnr_db?"),
        ("export: {quantize: {agreement: 2}}\n", "export.quantize.agreement: expected less than or equal to 1"),
        ("export: {formats: [pt2], quantize: auto}\n", "onnx in export.formats, of which onnx-int8-dynamic is made"),
        ("export: {serve: onnx-int8-static}\n", "one of what is made (torchscript, onnx, pt2), not onnx-int8-static"),
        ("export: {threads: 0}\n", "export.threads: expected"),
        ("export: {serve: none}\ngates: {load_ms: {times_live: 1.1}}\n", "export.serve: auto or a format, of which"),
        ("project: nowhere\n", "project: expected a folder"),
        ("release: {channel: ../prod}\n", "lower-case letters"),
        ("release: {channel: latest}\n", "a channel that MLflow can have as an alias"),
        ("release: {channel: eu.west}\n", "no dots, such as eu-west"),
        ("  learning_rate: 1e-3\n", "YAML reads 1e-3 as text; write it with a point, such as 1.0e-3"),
        ("retrain: {cron: every night}", "five fields as crontab has them"),
        ("retrain: {cron: 0 2 * * *, timezone: Europe/Bonn}", "the name of a time zone, such as Europe/Berlin"),
    ],
)
def test_values_that_cannot_work_are_refused(tmp_path: Path, keys: str, expected: str) -> None:
    assert expected in refused(tmp_path, GOOD + keys)


def test_a_gate_adds_its_metric(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(GOOD + "gates: {mean_absolute_error: {max: 1}, p50_ms: {max: 5}}\n")
    assert load_job(path)[0].metrics == ("accuracy", "mean_absolute_error")


def test_the_published_schema_is_current_and_accepts_the_example() -> None:
    published = json.loads((REPOSITORY / "docs" / "job.schema.json").read_text())
    assert published == job_schema(), "run: ship schema > docs/job.schema.json"
    jsonschema.validate(yaml.safe_load(DIGITS.read_text()), published)


def test_the_job_and_the_worker_agree_on_names() -> None:
    schema = json.dumps(Job.model_json_schema())
    for name in (*contract.LOSSES, *contract.OPTIMIZERS, *contract.FORMAT_FILES, *contract.INT8_FILES):
        assert f'"{name}"' in schema


def test_the_page_about_the_job_file_is_current() -> None:
    page = (REPOSITORY / "docs" / "job-file.md").read_text()
    assert page == job_reference(), "run: ship schema --markdown > docs/job-file.md"


def test_the_split_is_ours_to_give(tmp_path: Path) -> None:
    text = GOOD.replace("data: {factory: plain:build_dataset}", "data: {factory: 'plain:build', args: {split: train}}")
    assert "data.args without split" in refused(tmp_path, text)


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"name: \xe9\n")
    with pytest.raises(JobError, match="expected UTF-8 text"):
        load_job(path)


def test_a_gate_or_a_format_that_changes_needs_no_new_training(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    digests = []
    for extra in ("", "gates: {accuracy: {min: 0.5}}\n", "export: {formats: [onnx]}\n", "  seed: 3\n"):
        path.write_text(GOOD + extra)
        digests.append(load_job(path)[0].training_digest())
    assert digests[0] == digests[1] == digests[2] != digests[3]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("  launcher: slurmm\n", "job.yaml:6: train.launcher: expected"),
        ("  launcher: {slurm: {node: 2}}\n", "train.launcher.slurm.node: unknown key; did you mean nodes?"),
        ("  launcher: {slurn: {nodes: 2}}\n", "train.launcher.slurn: unknown key; did you mean slurm?"),
        ("  launcher: torchrun\n", "train.launcher.torchrun.hosts: missing; expected names or addresses"),
        ("  launcher: {slurm: {nodes: 2}}\n", "processes 1 is not a multiple of 2 machines"),
    ],
)
def test_a_launcher_that_cannot_work_is_refused_with_its_key(tmp_path: Path, keys: str, expected: str) -> None:
    assert expected in refused(tmp_path, GOOD + keys)


@pytest.mark.parametrize(
    ("dynamic", "expected"),
    [
        ("{batch: {axes: {x: 1}}}", "another name than batch"),
        ("{length: {axes: {x: 0}}}", "export.dynamic.length.axes.x: expected"),
        ("{length: {axes: {x: 1}, maxx: 3}}", "export.dynamic.length.maxx: unknown key; did you mean max?"),
        ("{length: {axes: {x: 1}, min: 4, max: 4}}", "expected min < max, and 4 >= 4"),
        ("{height: {axes: {x: [2, 1]}}, width: {axes: {x: 2}}}", "axis 2 of x, which is both height and width"),
        ("{length: {min: 1}}", "export.dynamic.length.axes: missing; expected input name: axis"),
    ],
)
def test_a_dynamic_dimension_that_cannot_be_is_refused_with_its_key(
    tmp_path: Path, dynamic: str, expected: str
) -> None:
    assert expected in refused(tmp_path, GOOD + f"export: {{dynamic: {dynamic}}}\n")


def test_executorch_is_made_when_it_is_named_and_not_by_auto(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD + "export: {formats: auto}\n").export.wanted == ("torchscript", "onnx", "pt2", "aoti")
    named = load(tmp_path, GOOD + "export: {formats: [executorch], batch: 8, max_batch: 8, serve: executorch}\n").export
    assert named.wanted == ("executorch",) and named.max_batch == 8


def test_a_format_whose_library_is_not_installed_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = load(tmp_path, GOOD + "export: {formats: [executorch], max_batch: 64}\n")
    monkeypatch.setattr(Interpreter, "has", lambda self, name: name != "executorch")
    with pytest.raises(JobError, match=r"executorch needs the library .* pip install 'executorch==1\.5\.1'"):
        require_extras(job, our_interpreter())
    require_extras(load(tmp_path, GOOD), our_interpreter())
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(JobError, match=r"aoti needs a C\+\+ compiler .* install g\+\+"):
        require_extras(load(tmp_path, GOOD + "export: {formats: [onnx, aoti]}\n"), our_interpreter())
    require_extras(load(tmp_path, GOOD + "export: {formats: auto}\n"), our_interpreter())


CUSTOM = GOOD.replace("epochs: 2", "entrypoint: plain:main")


def load(tmp_path: Path, text: str) -> Job:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return load_job(path)[0]


def test_a_custom_loop_needs_no_epochs_and_its_loss_suggests_no_metric(tmp_path: Path) -> None:
    job = load(tmp_path, CUSTOM + "  args: {epochs: 3}\n  processes: 3\n")
    assert (job.train.entrypoint, job.train.args, job.metrics) == ("plain:main", {"epochs": 3}, ())
    assert load(tmp_path, CUSTOM + "  metrics: [accuracy]\n").metrics == ("accuracy",)


def test_a_dumped_job_holds_only_the_keys_that_its_loop_reads(tmp_path: Path) -> None:
    custom = load(tmp_path, CUSTOM).model_dump(mode="json")["train"]
    built_in = load(tmp_path, GOOD).model_dump(mode="json")["train"]
    assert "entrypoint" in custom and not {"optimizer", "loss", "epochs", "strategy", "precision"} & custom.keys()
    assert "optimizer" in built_in and not {"entrypoint", "args"} & built_in.keys()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CUSTOM + "  epochs: 3\n", "no epochs with entrypoint: only the built-in loop reads it; give your loop what"),
        (CUSTOM + "  optimizer: adam\n  schedule: cosine\n", "no optimizer or schedule with entrypoint"),
        (CUSTOM + "  strategy: fsdp\n  processes: 2\n", "no strategy with entrypoint"),
        (CUSTOM.replace("plain:main", "main"), "train.entrypoint: expected a reference module:attribute"),
        (GOOD + "  args: {a: 1}\n", "expected args only with entrypoint"),
        (GOOD.replace("epochs: 2", "seed: 0"), "expected epochs, the passes over the training data, or entrypoint"),
    ],
)
def test_keys_that_the_chosen_loop_would_not_read_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refused(tmp_path, text)


def test_a_proof_in_cpp_is_required_only_of_formats_that_run_there(tmp_path: Path) -> None:
    path = write_project(tmp_path)
    text = path.read_text()
    path.write_text(text + "export: {formats: [onnx]}\nparity: {cpp: required}\n")
    with pytest.raises(JobError, match=r"torchscript or aoti in export\.formats with parity\.cpp: required"):
        load_job(path)
    path.write_text(text + "export: {formats: [onnx, torchscript]}\nparity: {cpp: required}\n")
    assert load_job(path)[0].parity.cpp == "required"


@pytest.mark.parametrize("wrong", ["seconds: 0", "seconds: -1", "seconds: .inf", "seconds: .nan", "seconds: '60'",
                                   "min_samples: 0", "min_samples: 2.5"])  # fmt: skip
def test_time_and_samples_of_a_proof_that_are_no_amounts_are_refused_by_their_key(tmp_path: Path, wrong: str) -> None:
    path = write_project(tmp_path)
    path.write_text(path.read_text() + f"parity: {{{wrong}}}\n")
    with pytest.raises(JobError, match=rf"parity\.{wrong.partition(':')[0]}"):
        load_job(path)


def test_a_bare_off_which_yaml_reads_as_false_is_the_word(tmp_path: Path) -> None:
    path = write_project(tmp_path)
    path.write_text(path.read_text() + "parity: {cpp: off, refusals: off, not_finite: off}\n")
    parity = load_job(path)[0].parity
    assert (parity.cpp, parity.refusals, parity.not_finite) == ("off", "off", "off")


def test_what_a_command_says_otherwise_counts_and_its_mistakes_are_told_as_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(GOOD)
    changes = ["train.epochs=1", "release.channel=staging", "train.metrics=[accuracy]", "model.args.width=4"]
    job, folder = load_job(path, changes)
    assert (job.train.epochs, job.release.channel, job.metrics) == (1, "staging", ("accuracy",))
    assert (job.model.args, folder) == ({"width": 4}, tmp_path)
    assert load_job(path)[0].train.epochs == 2
    for change, said in {
        "train.epochs": "--set train.epochs: expected KEY=VALUE, such as train.epochs=1",
        "train..epochs=1": "expected KEY=VALUE",
        "name.first=x": '--set name.first=x: expected keys below name, which is "plain" (str) in the job file',
        "train.epochs={{": "--set train.epochs={{: not valid YAML",
        "train.epochs=many": f"{path}:5: train.epochs: expected",
        "train.epohcs=1": f"{path}:4: train.epohcs: unknown key; did you mean epochs?",
    }.items():
        with pytest.raises(JobError) as caught:
            load_job(path, [change])
        assert said in str(caught.value), str(caught.value)


def test_what_servers_keep_is_named_in_the_job_and_a_job_without_it_is_recorded_as_before(tmp_path: Path) -> None:
    text = DIGITS.read_text()
    assert load(tmp_path, text).observe is None and "observe" not in load(tmp_path, text).model_dump(mode="json")
    job = load(tmp_path, text + "observe: {columns: {inputs: [age]}, sample: 0.1}\n")
    assert job.model_dump(mode="json")["observe"] == {
        "columns": {"inputs": ["age"], "outputs": []}, "sample": 0.1, "keep_days": 30,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("{columns: [age]}", "observe.columns: expected keys with values"),
        ("{columns: {inputs: [age, age]}}", "each of inputs once, and age is there twice"),
        ("{columns: {outputs: ['']}}", "observe.columns.outputs"),
        ("{sample: 0}", "observe.sample"),
        ("{sample: 10%}", "observe.sample"),
        ("{keep_days: 0}", "observe.keep_days"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_its_key(tmp_path: Path, said: str, expected: str) -> None:
    assert expected in refused(tmp_path, DIGITS.read_text() + f"observe: {said}\n")
