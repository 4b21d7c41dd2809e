"""The configuration: what wins, and how a mistake is explained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.loading import convert, hub
from router.settings import config_load
from router.settings.config import Config
from router.settings.config_load import FILE_MAX_BYTES, ConfigError, load


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "headway.toml"
    path.write_text(text)
    return path


def problems(path: Path | None, env: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, env or {}, {})
    return [str(problem) for problem in caught.value.problems]


def test_nothing_configured_is_the_defaults() -> None:
    assert load(None, {"PATH": "/bin"}, {}) == Config()


def test_a_flag_wins_over_a_variable_and_a_variable_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "[server]\nport = 1\nadmin_port = 2\n[workers]\ncount = 3\n")

    config = load(path, {"HEADWAY_SERVER_PORT": "10", "HEADWAY_WORKERS_COUNT": "5"}, {"server.port": ("--port", 20)})

    assert (config.server.port, config.server.admin_port, config.workers.count) == (20, 2, 5)


def test_classes_are_named_as_people_name_them(tmp_path: Path) -> None:
    path = written(tmp_path, '[classes."chatbot+"]\ntpot_s = 0.06\n[classes.background-agent]\npatience_s = inf\n')

    classes = load(path, {"HEADWAY_CLASSES_DATA_PROCESSOR_DEADLINE_S": "60"}, {}).classes

    assert classes.chatbot.tpot_s == 0.06
    assert classes.background_agent.patience_s == float("inf")
    assert classes.data_processor.deadline_s == 60.0


def test_every_mistake_is_named_with_its_line_and_the_nearest_key(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        '[server]\nprt = 9\nport = "x"\n\n[worker]\ncount = 3\n[workers]\ncount = 0\n[classes."chatbot+"]\nttft = 1\n',
    )

    assert problems(path, {"HEADWAY_SERVER_PROT": "1", "HEADWAY_WORKERS_THREADS": "two"}) == [
        f"{path}:2: server.prt: no such key; did you mean server.port?",
        f"{path}:5: worker: no such key; did you mean workers?",
        f'{path}:10: classes.chatbot+.ttft: no such key; did you mean classes."chatbot+".ttft_s?',
        "HEADWAY_SERVER_PROT: no key has this name; did you mean HEADWAY_SERVER_PORT?",
        f"{path}:3: server.port: expected a whole number, got 'x'",
        f"{path}:8: workers.count: expected a whole number >= 1, got 0",
        "HEADWAY_WORKERS_THREADS: workers.threads: expected a whole number, got 'two'",
    ]


def test_a_key_near_nothing_is_answered_with_what_there_is(tmp_path: Path) -> None:
    (problem,) = problems(written(tmp_path, "[telemetry]\nzzz = 1\n"))

    assert problem.endswith("telemetry.zzz: no such key; there are telemetry.otlp_endpoint, telemetry.service_name")


def test_a_file_says_which_version_of_the_keys_it_means(tmp_path: Path) -> None:
    text = "# ours\nversion = 2\n[servers]\nport = 1\n"

    assert load(written(tmp_path, "version = 1\n[server]\nport = 1\n"), {}, {}).server.port == 1
    path = written(tmp_path, text)
    assert problems(path) == [f"{path}:2: version: this Headway reads version 1, got 2"]  # and nothing of what it holds


def test_a_key_that_was_renamed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_load, "RENAMED", {'classes."chatbot+".first_s': 'classes."chatbot+".ttft_s'})

    path = written(tmp_path, '[classes."chatbot+"]\nfirst_s = 1\n')

    assert problems(path) == [f'{path}:2: classes.chatbot+.first_s: is classes."chatbot+".ttft_s now']


def test_a_section_that_is_a_value_is_told_so(tmp_path: Path) -> None:
    (problem,) = problems(written(tmp_path, "server = 8080\n"))

    assert problem.endswith(":1: server: is a section, not a value")


def test_broken_toml_says_where(tmp_path: Path) -> None:
    path = written(tmp_path, "[server]\nport = = 1\n")

    assert problems(path) == [f"{path}: cannot be read: Invalid value (at line 2, column 8)"]


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"

    assert problems(path) == [f"{path}: cannot be read: No such file or directory"]


def test_a_file_that_is_no_configuration_is_not_read(tmp_path: Path) -> None:
    path = written(tmp_path, "# " + "x" * FILE_MAX_BYTES)

    assert problems(path) == [f"{path}: cannot be read: {FILE_MAX_BYTES + 2} bytes, more than any configuration needs"]


def test_a_configuration_survives_its_way_to_another_process() -> None:
    config = load(None, {"HEADWAY_CLASSES_CHATBOT_TTFT_S": "2"}, {})

    assert Config.from_json(config.to_json()) == config
    assert config.digest != Config().digest


def test_what_several_keys_forbid_is_said_where_one_of_them_stands(tmp_path: Path) -> None:
    path = written(tmp_path, "[server]\nport = 8081\n")

    assert problems(path) == [f"{path}:2: server.admin_port: must differ from server.port"]


def test_made_up_tokens_have_no_model_to_spread(tmp_path: Path) -> None:
    path = written(tmp_path, '[workers]\ndevice = "fake"\ntensor_parallel = 2\n')

    assert problems(path) == [f"{path}:2: workers.device: must not be fake with workers.tensor_parallel above 1"]


def test_weights_of_8_bits_are_for_cards(tmp_path: Path) -> None:
    path = written(tmp_path, '[workers]\ndevice = "cpu"\nweights = "fp8"\n')

    assert problems(path) == [f"{path}:3: workers.weights: must not be fp8 with workers.device cpu"]
    assert load(written(tmp_path, '[workers]\nweights = "fp8"\n'), {}, {}).workers.weights == "fp8"


def test_fp8_kv_is_for_cards(tmp_path: Path) -> None:
    cpu = written(tmp_path, '[workers]\ndevice = "cpu"\n[kv]\ndtype = "fp8"\n')
    assert problems(cpu) == [f"{cpu}:4: kv.dtype: must not be fp8 with workers.device cpu"]

    other = written(tmp_path, '[kv]\ndtype = "int4"\n')
    assert problems(other) == [f"{other}:2: kv.dtype: must be one of bf16, fp8"]


def test_a_near_name_is_written_as_toml_wants_it(tmp_path: Path) -> None:
    (problem,) = problems(written(tmp_path, "[classes.chatbot]\ntpot_s = 1\n"))

    assert problem.endswith(':1: classes.chatbot: no such key; did you mean classes."chatbot+"?')


def test_what_is_not_there_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = '[model]\nname = "./none.gguf"\n[record]\npath = "/none/run.jsonl"\n[receipts]\npath = "receipts.jsonl"\n'

    path = written(tmp_path, text)

    assert problems(path) == [
        f"{path}:2: model.name: ./none.gguf is not there",
        f"{path}:4: record.path: no file can be made at /none/run.jsonl",
    ]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("smolm2", "'smolm2' is no model; name smollm2, a .gguf file, a folder, or org/name on the Hugging Face hub"),
        ("", "'' is no model; name smollm2"),
        ("a/b/c", "'a/b/c' is no model; name smollm2"),
        ("model.gguf", "model.gguf is not there"),
        ("./here", "./here is a folder without config.json"),
        ("notes.txt", "notes.txt is neither a .gguf file nor a folder"),
    ],
)
def test_a_name_that_no_model_can_have_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "notes.txt").touch()

    (problem,) = problems(None, {"HEADWAY_MODEL_NAME": model})

    assert problem.startswith(f"HEADWAY_MODEL_NAME: model.name: {why}")


@pytest.mark.parametrize("model", ["Qwen/Qwen3-8B", "org/name@main", "org/na me", "org", "/org/name", "a/b/c", "-a/.b"])
def test_a_name_on_the_hub_is_one_for_the_check_and_for_the_engine(model: str) -> None:
    assert (config_load.HUB_NAME.fullmatch(model) is not None) == hub.is_name(model)
    assert convert.EMBEDDED_NAME == config_load.EMBEDDED_MODEL == Config().model.name


def test_what_stands_in_front_of_upstreams_needs_no_model() -> None:
    env = {"HEADWAY_MODEL_NAME": "none", "HEADWAY_UPSTREAMS": '[{"url": "http://gpu1:8000"}]'}

    assert load(None, env, {}).model.name == "none"


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "grpc://collector:4317", "http://", "http://c:99999/v1/traces"])
def test_an_endpoint_for_traces_is_a_url(tmp_path: Path, endpoint: str) -> None:
    path = written(tmp_path, f'[telemetry]\notlp_endpoint = "{endpoint}"\n')

    assert problems(path) == [
        f"{path}:2: telemetry.otlp_endpoint: {endpoint!r} must be http://HOST:PORT/PATH or https://..."
    ]


@pytest.mark.parametrize(
    ("upstreams", "why"),
    [
        ('[{"url": "gpu1:8000"}]', "must be http://HOST:PORT"),
        ('[{"url": "http://user:pass@gpu1"}]', "must be http://HOST:PORT"),
        ('[{"url": "http://[gpu]1"}]', "must be http://HOST:PORT"),
        ('[{"url": "http://gpu1:99999"}]', "must be http://HOST:PORT"),
        ('[{"url": "http://gpu1/a b"}]', "must be http://HOST:PORT"),
        ('[{"url": "http://gpu1", "priority": "best"}]', "priority must be one of"),
        ('[{"url": "http://gpu1", "routes": ["/admin"]}]', "routes: '/admin' is none of"),
        ('[{"url": "http://gpu1", "key": "secret"}]', "unknown field `key`"),
        (json.dumps([{"url": f"http://gpu{n}"} for n in range(65)]), "must be 64 at most"),
        ('[{"url": "http://gpu1"}, {"url": "http://gpu1/v1"}]', "two are called gpu1; set `name`, or remove one"),
        ('[{"url": "http://gpu1", "key_env": "GPU1_KEY"}]', "gpu1: key_env names GPU1_KEY, which is not set"),
    ],
)
def test_upstreams_that_cannot_be_used_are_named(upstreams: str, why: str) -> None:
    (problem,) = problems(None, {"HEADWAY_UPSTREAMS": upstreams})

    assert problem.startswith("HEADWAY_UPSTREAMS: upstreams: ")
    assert why in problem


def test_one_server_may_be_two_upstreams_of_two_names_and_keys() -> None:
    both = [{"url": "http://gpu1", "name": name, "key_env": name.upper()} for name in ("a", "b")]
    env = {"HEADWAY_UPSTREAMS": json.dumps(both), "A": "sk-a", "B": "sk-b"}

    assert [upstream.shown_name for upstream in load(None, env, {}).upstreams] == ["a", "b"]


@pytest.mark.parametrize(
    "key", ["model.calls", "model.thoughts", "model.on_media", "workers.device", "workers.weights"]
)
def test_a_word_that_is_none_of_those_there_are_is_told_them(key: str) -> None:
    variable = f"HEADWAY_{key.replace('.', '_').upper()}"

    (problem,) = problems(None, {variable: "nothing-known"})

    assert problem.startswith(f"{variable}: {key}: must be one of ")


def test_upstreams_are_tables_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, '[[upstreams]]\nurl = "http://a"\nmodels = { x = "y" }\n[[upstreams]]\nurl = "http://b"\n')

    first, second = load(path, {}, {}).upstreams

    assert (first.url, first.models, second.url) == ("http://a", {"x": "y"}, "http://b")
