"""The door: JSON, layers, keys, types and ranges; combinations are in test_recipe_rules.py."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import recipe
from trainer.errors import RecipeError
from trainer.recipe.json_reader import JSONSyntaxError, Reader
from trainer.recipe.resolve import MAX_LINES

SMALLEST: dict[str, Any] = {"model": {"family": "gpt2"}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, so that messages hold short names."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, value: Any) -> Path:
    path = Path(name)
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=1))
    return path


def refusals(*overrides: str, **sections: Any) -> list[str]:
    """The lines for a recipe that differs from the smallest one by `sections`."""
    with pytest.raises(RecipeError) as refused:
        recipe.load(write("r.json", SMALLEST | sections), overrides)
    assert refused.value.exit_code == 78
    return refused.value.lines


def messages(*overrides: str, **sections: Any) -> list[str]:
    return [line.split(": ", 1)[1] for line in refusals(*overrides, **sections)]


# JSON


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"train": {"steps": 1, "steps": 2}, "model": {"family": "gpt2"}}', "r.json:1:24: key train.steps is given twice"),
        ('{"optimizer": {"lr": NaN}}', "r.json:1:22: NaN is not a JSON number"),
        ('{"optimizer": {"lr": -Infinity}}', "r.json:1:22: -Infinity is not a JSON number"),
        ('{"optimizer": {"lr": 1e999}}', "r.json:1:22: number too large"),
        ('{\n "run": {},\n}', "r.json:2:11: trailing comma"),
        ('{"data": {"sources": [1,]}}', "r.json:1:24: trailing comma"),
        ('// why\n{"run": {}}', "r.json:1:1: JSON has no comments"),
        ('{"run": {} # why\n}', "r.json:1:12: JSON has no comments"),
        ("[1]", "r.json:1:1: a recipe is one JSON object, not a list"),
        ("", "r.json:1:1: the file ends where a value is expected"),
        ('{"run": {', "r.json:1:10: a key in double quotes is expected"),
        ('{"run": {"name": "a"', "',' or '}' is expected here: the file ends too early"),
        ("{'run': {}}", "r.json:1:2: a key in double quotes"),
        ('{"run": True}', "r.json:1:9: True is Python; JSON writes true"),
        ('{"run": {}} x', "r.json:1:13: more text after the end"),
        ('{"run": {"name": "a\n"}}', "r.json:1:20: invalid control character"),
        ('{"description": "\\ud800"}', "r.json:1:17: half of a surrogate pair"),
        ('{"run": 01}', "',' or '}' is expected"),
        ('{"train": {"steps": 1\u0663}}', "r.json:1:22: ',' or '}' is expected"),  # an Arabic 3, which int() would read
        ('{"train": {"steps": \u0663}}', "r.json:1:21: a value is expected here"),
        ('{"optimizer": {"lr": 1.\u0663}}', "r.json:1:23: ',' or '}' is expected"),
        ("[" * 100_000, "nested deeper than 32"),
        ('{"a":' * 100_000, "nested deeper than 32"),
        ('{"train": {"steps": ' + "9" * 5000 + "}}", "number too large"),
    ],
)
def test_text_that_is_not_strict_json(folder: Path, text: str, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        recipe.load(write("r.json", text))
    assert any(said in line for line in refused.value.lines), refused.value.lines


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ("{}".encode("utf-16"), "byte order mark"),
        (b'{\n "run": "\xff"}', "r.json:2:10: not UTF-8"),
        (b" " * (1 << 20) + b"{}", "larger than 1 MiB"),
    ],
)
def test_bytes_that_are_not_text(folder: Path, data: bytes, said: str) -> None:
    Path("r.json").write_bytes(data)
    with pytest.raises(RecipeError, match=said):
        recipe.load("r.json")


@pytest.mark.parametrize(
    ("name", "said"), [("none.json", "no such file"), (".", "not a file"), ("a\0b", "not a possible file name")]
)
def test_files_that_are_not_there(folder: Path, name: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe.load(name)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(JSON_VALUES, st.sampled_from([None, 1]), st.booleans())
def test_the_reader_agrees_with_json_on_valid_text(value: Any, indent: int | None, ascii_only: bool) -> None:
    assert Reader(json.dumps(value, indent=indent, ensure_ascii=ascii_only)).document() == value


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='{}[]":,\\ \n-.0123eEtruefalsn/#u', max_size=40) | st.text(max_size=20))
def test_any_text_is_read_or_refused(text: str) -> None:
    value, position = None, None
    try:
        value = Reader(text).document()
    except JSONSyntaxError as error:
        position = error.position
    if position is None:
        assert json.loads(text) == value
    else:
        assert 0 <= position <= len(text)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([name for name in recipe.known_keys() if "." not in name]), JSON_VALUES, max_size=5))
def test_any_object_is_loaded_or_refused_in_lines(tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("any") / "r.json"
    path.write_text(json.dumps(value))
    lines = None
    try:
        recipe.load(path)
    except RecipeError as error:
        lines = error.lines
    assert lines is None or (lines and all(line.isprintable() for line in lines))


def test_a_hostile_file_is_refused_in_time(folder: Path) -> None:
    with pytest.raises(RecipeError, match="more than 20000 values: not a recipe"):
        recipe.load(write("many.json", {f"key{i}": i for i in range(40_000)}))
    lines = refusals(**{f"key{i}": i for i in range(300)}, **{"k" * 500_000: 1})
    assert len(lines) == MAX_LINES + 1
    assert lines[-1] == "and 201 more"


# Layers


def test_every_value_has_its_origin(folder: Path) -> None:
    write("base.json", SMALLEST | {"train": {"steps": 7, "clip_norm": 2.0}})
    path = write("top.json", {"extends": "base.json", "train": {"steps": 8}})
    resolved = recipe.load(path, ["train.log_every=3"])
    assert resolved.recipe.train.steps == 8
    assert resolved.recipe.train.clip_norm == 2.0
    assert resolved.origins["train.steps"] == "file top.json"
    assert resolved.origins["train.clip_norm"] == "file base.json"
    assert resolved.origins["train.log_every"] == "--set"
    assert resolved.origins["train.eval_every"] == "default"
    assert resolved.origins["data.cache_dir"] == "derived"
    assert resolved.given == {"model": {"family": "gpt2"}, "train": {"steps": 8, "clip_norm": 2.0, "log_every": 3}}
    assert [source.name for source in resolved.sources] == ["base.json", "top.json"]


def test_extends_is_relative_to_its_file_and_replaces_lists(folder: Path) -> None:
    Path("deep").mkdir()
    write("base.json", SMALLEST | {"optimizer": {"betas": [0.5, 0.6], "lr": 1}, "data": {"sources": [{"path": "stdlib"}] * 3}})
    write("deep/mid.json", {"extends": "../base.json", "optimizer": {"betas": [0.7, 0.8]}})
    path = write("top.json", {"extends": "deep/mid.json", "data": {"sources": [{"path": "stdlib", "weight": 2}]}})
    resolved = recipe.load(path)
    assert resolved.recipe.optimizer.betas == [0.7, 0.8]
    assert resolved.recipe.optimizer.lr == 1
    assert [source.weight for source in resolved.recipe.data.sources] == [2]
    assert resolved.origins["data.sources[0].weight"] == "file top.json"
    assert resolved.origins["data.sources[0].field"] == "default"


def test_faults_name_the_file_that_holds_them(folder: Path) -> None:
    write("base.json", SMALLEST | {"train": {"stepz": 7}})
    with pytest.raises(RecipeError, match=r"base.json:6:3: unknown key train.stepz; did you mean train.steps\?"):
        recipe.load(write("top.json", {"extends": "base.json"}))


def test_extends_that_cannot_be_followed(folder: Path) -> None:
    write("a.json", {"extends": "b.json"})
    write("b.json", {"extends": "./a.json"})
    with pytest.raises(RecipeError, match=r"extends forms a circle: a\.json → b\.json → a\.json"):
        recipe.load("a.json")
    with pytest.raises(RecipeError, match=r"c.json: extends none.json: no such file"):
        recipe.load(write("c.json", {"extends": "none.json"}))
    with pytest.raises(RecipeError, match=r"d.json:2:2: extends = 3: must be the name of one recipe file"):
        recipe.load(write("d.json", {"extends": 3}))


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.steps=12", "train.steps", 12),
        ("run.name=night-1", "run.name", "night-1"),
        ('run.name="12"', "run.name", "12"),
        ("optimizer.betas=[0.1, 0.2]", "optimizer.betas", [0.1, 0.2]),
        ("data.sources[0].weight=2.5", "data.sources[0].weight", 2.5),
        ("data.sources.0.weight=2.5", "data.sources[0].weight", 2.5),
        ('data.sources[1]={"path": "stdlib"}', "data.sources[1].path", "stdlib"),
        ("train.sample_prompt=a=b", "train.sample_prompt", "a=b"),
        ("model.config.n_layer=3", "model.config.n_layer", 3),
        ("zero.offload_optimizer=null", None, None),
    ],
)
def test_set(folder: Path, override: str, key: str | None, value: Any) -> None:
    if key is None:
        assert messages(override) == [
            "zero.offload_optimizer = null: must be an object, not null; remove the key to get the default"
        ]
        return
    resolved = recipe.load(write("r.json", SMALLEST), [override])
    assert resolved.as_resolved_json()["values"][key] == {"value": value, "origin": "--set"}


def test_the_last_set_wins(folder: Path) -> None:
    assert recipe.load(write("r.json", SMALLEST), ["train.steps=1", "train.steps=2"]).recipe.train.steps == 2


def test_set_goes_through_the_same_door(folder: Path) -> None:
    lines = refusals(
        "train.stpes=1", "tracking=", "nonsense", "data.sources[4].path=x", "run.name=1", "optimizer.lr=NaN", ".a=1"
    )
    assert lines == [
        "--set train.stpes: unknown key train.stpes; did you mean train.steps?",
        '--set tracking: tracking = "": must be an object, not a string',
        "--set nonsense: write --set section.key=value, or --set data.sources[0].path=value",
        "--set data.sources[4].path: data.sources is a list of 1; it has no 4",
        '--set run.name: run.name = 1: must be a string that matches ^[A-Za-z0-9][A-Za-z0-9._-]*$, not a number; write "1"',
        '--set optimizer.lr: optimizer.lr = "NaN": must be a number > 0, not a string',
        "--set .a: write --set section.key=value, or --set data.sources[0].path=value",
    ]
    assert refusals("data.sources[\u0660].path=x")[0].endswith("or --set data.sources[0].path=value")


# Types and ranges


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("train", "steps", "8", 'train.steps = "8": must be a whole number ≥ 1 and ≤ 4294967296, not a string; write 8 '
         'without quotes'),
        ("train", "steps", 8.0, "train.steps = 8.0: must be a whole number ≥ 1 and ≤ 4294967296, not a number; write 8"),
        ("train", "steps", True, "train.steps = true: must be a whole number ≥ 1 and ≤ 4294967296, not a boolean"),
        ("train", "log_every", None, "train.log_every = null: must be a whole number ≥ 1 and ≤ 9007199254740992, not null; "
         "remove the key to get the default"),
        ("train", "steps", 0, "train.steps = 0: must be a whole number ≥ 1"),
        ("optimizer", "lr", True, "optimizer.lr = true: must be a number > 0, not a boolean"),
        ("optimizer", "lr", -1, "optimizer.lr = -1: must be a number > 0"),
        ("optimizer", "betas", [0.9, 1.0], "optimizer.betas[1] = 1.0: must be a number ≥ 0 and < 1"),
        ("optimizer", "betas", 0.9, "optimizer.betas = 0.9: must be a list of 2, not a number"),
        ("optimizer", "betas", [0.9], "optimizer.betas = [0.9]: must be a list of 2"),
        ("optimizer", "name", "adamW", 'optimizer.name = "adamW": must be one of "adamw", "adam", "sgd", "lion", "adafactor"; '
         'did you mean "adamw"?'),
        ("data", "eval_fraction", 0.7, "data.eval_fraction = 0.7: must be a number ≥ 0 and ≤ 0.5"),
        ("data", "sources", [], "data.sources = []: must be a list of at least 1"),
        ("data", "sources", [{}], "data.sources[0].path is missing: A file"),
        ("data", "isolate_documents", "True", "data.isolate_documents = \"True\": must be true or false, not a string; "
         "write true without quotes"),
        ("data", "seq_len", 10**9, "data.seq_len = 1000000000: must be a whole number ≥ 1 and ≤ 16777216"),
        ("batch", "micro_sequences", 2**31, "batch.micro_sequences = 2147483648: must be a whole number ≥ 1 and ≤ 1073741824"),
        ("zero", "allgather_bucket_size", 3,
         "zero.allgather_bucket_size = 3: must be a whole number ≥ 2 and ≤ 9007199254740992 and a multiple of 2"),
        ("zero", "reduce_bucket_size", 2**60, "zero.reduce_bucket_size = 1152921504606846976: must be a whole number ≥ 1 and "
         "≤ 9007199254740992"),
        ("zero", "offload_optimizer", {"buffer_count": 3},
         "zero.offload_optimizer.buffer_count = 3: must be a whole number ≥ 4"),
        ("deepspeed", "aio", {"block_size": 1}, "deepspeed.aio.block_size = 1: must be a whole number ≥ 4096 and ≤ 1073741824 "
         "and a multiple of 512"),
        ("guard", "timeout_s", 10**10, "guard.timeout_s = 10000000000: must be a whole number ≥ 1 and ≤ 1000000"),
        ("parallel", "balance", [1] * 5000, "parallel.balance = [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,...: "
         "must be a list of 1 to 4096"),
        ("train", "length_penalty", 1e30, "train.length_penalty = 1e+30: must be a number ≥ -30 and ≤ 30"),
        ("parallel", "tensor", 2**40, "parallel.tensor = 1099511627776: must be a whole number ≥ 1 and ≤ 1048576"),
        ("zero", "stage", 4, "zero.stage = 4: must be a whole number ≥ 0 and ≤ 3"),
        ("zero", "stage", True, "zero.stage = true: must be a whole number ≥ 0 and ≤ 3, not a boolean"),
        ("run", "name", "../x", 'run.name = "../x": must be a string that matches'),
        ("tracking", "wandb", [], "tracking.wandb = []: must be an object, not a list"),
        ("precision", "dtype", "auto", 'precision.dtype = "auto": must be one of "fp32", "bf16", "fp16"'),
        ("batch", "global_sequences", "auto", 'batch.global_sequences = "auto": must be a whole number'),
    ],
)  # fmt: skip
def test_wrong_types_and_ranges(folder: Path, section: str, key: str, value: Any, said: str) -> None:
    (line,) = messages(**{section: {key: value}})
    assert line.startswith(said)


def test_every_whole_number_has_a_smallest_and_a_largest() -> None:
    """What a run does with 10¹⁸ of something nobody has tried: each key says how many it can bear."""
    nodes = [recipe.json_schema()]
    endless = []
    while nodes:
        node = nodes.pop()
        nodes += [inner for inner in node.values() if isinstance(inner, dict)]
        nodes += [inner for inner in node.get("anyOf", ()) if isinstance(inner, dict)]
        if node.get("type") == "integer" and not {"minimum", "maximum"} <= node.keys():
            endless.append(node)
    assert endless == []


def test_control_characters_do_not_reach_the_terminal(folder: Path) -> None:
    lines = refusals(**{"run": {"name": "\x1b[31m"}, "\x1b[2J": 1})
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)


def test_all_errors_at_once_in_the_order_of_the_file(folder: Path) -> None:
    lines = refusals(
        train={"steps": 0, "lr": 1},
        optimizer={"name": "sgd", "betas": [0.9, 0.9], "epz": 1},
        zero={"stage": 1, "offload_param": {"device": "cpu"}},
        nonsense=1,
    )
    assert len(lines) == 6
    places = [tuple(map(int, line.split(":")[1:3])) for line in lines]
    assert places == sorted(places)


def test_a_rule_about_a_faulty_key_is_not_judged(folder: Path) -> None:
    """With a misspelt stage the default would be judged instead, and the advice would mislead."""
    assert messages(zero={"stagge": 3, "offload_param": {"device": "cpu"}}) == [
        "unknown key zero.stagge; did you mean zero.stage?"
    ]
    assert messages(zero={"stage": 5, "offload_param": {"device": "cpu"}}) == [
        "zero.stage = 5: must be a whole number ≥ 0 and ≤ 3"
    ]


# Unknown keys


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"train": {"lr": 1}}, 'unknown key train.lr: "lr" belongs in "optimizer": write optimizer.lr'),
        ({"learning_rate": 1}, "unknown key learning_rate; did you mean optimizer.lr?"),
        ({"train": {"max_grad_norm": 1}}, "did you mean train.clip_norm?"),
        ({"optimizer": {"betsa": 1}}, "did you mean optimizer.betas, a list of 2?"),
        ({"optimizer": {"betsa": [0.9, 0.9]}}, "did you mean optimizer.betas?"),
        ({"data": {"sources": [{"path": "stdlib", "wieght": 1}]}}, "did you mean data.sources[0].weight?"),
        ({"deepspeed": {"gradient_clipping": 1}}, "clipping has one owner: write train.clip_norm"),
        ({"deepspeed": {"fp16": {}}}, 'write precision.dtype "fp16"'),
        ({"zero": {"train_batch_size": 1}}, "write batch.global_sequences and batch.micro_sequences"),
        ({"train_batch_size": 1}, "write batch.global_sequences"),
        ({"zero_optimization": {}}, "write the section zero"),
        ({"zero": {"cpu_offload": True}}, 'deprecated; write zero.offload_optimizer {"device": "cpu"}'),
        ({"deepspeed": {"gradient_clippng": 1}}, "did you mean DeepSpeed's gradient_clipping? It does not belong here"),
        ({"zero": {"offload_optimizer": {"ratio": 0.5}}}, "all of the optimizer's state is offloaded"),
        ({"run": {"zzzzzzzzzzzz": 1}}, "unknown key run.zzzzzzzzzzzz; legal here: name, dir, seed, deterministic"),
        ({"model": {"family": "gpt2", "config": {"n_hed": 4}}}, 'unknown key "n_hed" for family gpt2; did you mean n_head?'),
    ],
)
def test_unknown_keys_say_where_they_belong(folder: Path, sections: dict[str, Any], said: str) -> None:
    (line,) = messages(**sections)
    assert said in line


# Resolved


def test_derived_values_replace_what_was_left_open(folder: Path) -> None:
    resolved = recipe.load(write("r.json", SMALLEST), ["schedule.name=wsd", "train.steps=50", "run.dir=out"])
    values = resolved.as_resolved_json({"train_batch_size": 8})
    assert values["values"]["schedule.decay_steps"] == {"value": 10, "origin": "derived"}
    assert values["values"]["data.cache_dir"] == {"value": "out/data", "origin": "derived"}
    assert values["deepspeed_config"] == {"train_batch_size": 8}
    assert '"auto"' not in json.dumps(values)
    assert json.loads(json.dumps(values)) == values


def test_what_was_given_gives_the_same_recipe(folder: Path) -> None:
    first = recipe.load(write("r.json", SMALLEST), ["optimizer.lr=0.1", "schedule.name=wsd"])
    again = recipe.load(write("again.json", first.given))
    assert again.recipe == first.recipe


def test_the_network_takes_its_vocabulary_from_the_tokenizer(folder: Path) -> None:
    resolved = recipe.load(write("r.json", SMALLEST))
    assert resolved.network(vocab_size=300).vocab_size == 300
    padded = recipe.load(write("r.json", SMALLEST), ["model.config.vocab_size=320"])
    assert padded.network(vocab_size=300).vocab_size == 320
    with pytest.raises(RecipeError, match="vocab_size = 320 is less than the tokenizer's 321 symbols; legal: 321 or more"):
        padded.network(vocab_size=321)


def test_schema_describes_every_key(folder: Path) -> None:
    schema = recipe.json_schema()
    assert "extends" in schema["properties"]
    for name, section in {"Recipe": schema, **schema["$defs"]}.items():
        for key, node in section["properties"].items():
            target = schema["$defs"].get(node.get("$ref", "").rpartition("/")[2], {})
            assert node.get("description") or target.get("description"), f"{name}.{key}"


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_hidden_layers": 10**9}, "the model's num_hidden_layers = 1000000000: legal are up to 4096"),
        ({"n_layer": 4097}, "the model's n_layer = 4097"),
        ({"text_config": {"num_experts": 10**6}}, "the model's text_config.num_experts = 1000000"),
        ({"num_labels": 10**9}, "the model's num_labels = 1000000000"),
    ],
)
def test_a_model_that_would_be_built_for_days_is_refused(config: dict[str, Any], says: str, folder: Path) -> None:
    given = {"model": {"family": "auto", "config": {"model_type": "gpt_neox", **config}}}
    (folder / "r.json").write_text(json.dumps(given))
    with pytest.raises(RecipeError, match=says):
        recipe.load(folder / "r.json")


def test_a_long_chain_of_recipes_is_refused(folder: Path) -> None:
    for n in range(3000):
        (folder / f"{n}.json").write_text(json.dumps({"extends": f"{n + 1}.json"}))
    with pytest.raises(RecipeError, match=r"0.json: more than 32 files that extend one another"):
        recipe.load(folder / "0.json")


@pytest.mark.parametrize("name", ["a\0b", "s3://bucket/r.json", "a" * 300])
def test_a_parent_that_is_no_path_is_refused(name: str, folder: Path) -> None:
    (folder / "r.json").write_text(json.dumps({"extends": name}))
    with pytest.raises(RecipeError, match=r"^r.json:1:\d+: extends = "):
        recipe.load(Path("r.json"))
