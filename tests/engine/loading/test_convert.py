"""GGUF to a Hugging Face folder: exact where it can be, complete or absent, and refused in one sentence otherwise."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.compute.runner import RunnerConfig, TorchRunner
from engine.loading import convert, manifest
from engine.models.config import ModelError, RopeScaling, read
from engine.models.decoder import rope_frequencies
from tests.engine import tiny
from tests.engine.driver import all_logits

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 288}
GGML = {  # Hugging Face's names in a layer, in llama.cpp's
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
Q = gguf.GGMLQuantizationType
HALF_FIELDS = {Q.Q4_K: (0, 4), Q.Q5_K: (0, 4), Q.Q6_K: (208, 210)}  # where a block keeps its float16 scales


def silent(what: str, done: float) -> None:
    """No progress wanted."""


def write_gguf(
    path: Path,
    arch: str = "qwen2",
    kind: Q = Q.Q8_0,
    change: Callable[[gguf.GGUFWriter], None] | None = None,
    cut: str = "qwen2",
) -> None:
    """A tiny random model as llama.cpp's converter would write it."""
    shape = SHAPE | ({"hidden_size": 256, "intermediate_size": 256, "head_dim": 64} if kind in HALF_FIELDS else {})
    model = tiny.model_of(arch, **shape)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(512)
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(2)
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_key_length(shape["head_dim"])
    writer.add_rope_freq_base(10_000.0)
    bytes_as_text = sorted(ByteLevel.alphabet())
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "i n", "1 2", "Ġ Ġ"]
    tokens = [*bytes_as_text, *(merge.replace(" ", "") for merge in merges)]
    tokens += [f"<|special{number}|>" for number in range(288 - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(287)
    writer.add_bos_token_id(286)
    writer.add_chat_template("{{ messages }}")
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        stored = kind if values.ndim == 2 else Q.F32
        writer.add_tensor(ggml_name(name), quantised(values, stored), raw_dtype=stored)
    if change:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantised(values: np.ndarray, kind: Q) -> np.ndarray:
    """gguf's own quantisation; for K-quants, which it can only read, random blocks of the same shape."""
    if kind not in HALF_FIELDS:
        return gguf.quantize(values, kind)
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = values.shape
    blocks = np.random.default_rng(rows).integers(0, 256, (rows * columns // block_values, block_bytes), np.uint8)
    first, end = HALF_FIELDS[kind]
    blocks[:, first:end] = np.full((end - first) // 2, 2e-5, np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def ggml_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    _, _, number, part = stem.split(".", 3)
    return f"blk.{number}.{GGML[part]}.{kind}"


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q4_K, Q.Q5_K, Q.Q6_K])
def test_a_conversion_computes_what_transformers_computes_from_the_same_file(kind: Q, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", kind=kind)
    folder = convert.convert(tmp_path / "m.gguf", tmp_path / "cache", silent)
    runner = TorchRunner.load(folder, RunnerConfig(kv_bytes=2**20))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ids = np.random.default_rng(2).integers(0, 288, 60).tolist()

    assert runner.model.eos_ids == (287,)
    torch.testing.assert_close(all_logits(runner, ids, [60]), tiny.logits(theirs.eval(), ids), atol=1e-4, rtol=0)


def test_a_qwen2_tokenizer_is_rebuilt_as_transformers_does(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    folder = convert.convert(tmp_path / "m.gguf", tmp_path / "cache", silent)
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")

    for text in ("hello  world 1212", "win<|special3|>hello\n\n  12", "I'LL n\u0303 日本 🎉"):
        assert ours.encode(text).ids == theirs(text)["input_ids"], text
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"


def test_a_llama3_tokenizer_cuts_digits_in_threes_and_takes_whole_pieces_as_they_are(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", arch="llama", cut="llama-bpe")
    folder = convert.convert(tmp_path / "m.gguf", tmp_path / "cache", silent)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def cuts(text: str) -> list[str]:
        return [piece.replace("Ġ", " ") for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    assert cuts("I'LL pay 1234567 or  so") == ["I", "'LL", " pay", " ", "123", "456", "7", " or", " ", " so"]
    assert cuts("a\n\n  b!?\n") == ["a", "\u010a\u010a", " ", " b", "!?\u010a"]
    assert tokenizer.encode("hello").tokens == ["hello"]
    assert json.loads(tokenizer.to_str())["model"]["ignore_merges"] is True


def llama3_factors(head_dim: int, factor: float) -> np.ndarray:
    """As transformers slows rope down."""
    rope = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(hidden_size=head_dim, num_attention_heads=1, rope_parameters=rope)
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 10_000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (plain / slowed).float().numpy()


def test_rope_factors_of_a_gguf_file_become_llama3s_scaling(tmp_path: Path) -> None:
    factors = llama3_factors(SHAPE["head_dim"], 32.0)
    assert factors.max() > 31
    assert factors.min() < 2
    write_gguf(tmp_path / "m.gguf", "llama", change=lambda file: file.add_tensor("rope_freqs.weight", factors))
    folder = convert.convert(tmp_path / "m.gguf", tmp_path / "cache", silent)

    config = read(folder)

    assert config.rope_scaling == RopeScaling(pytest.approx(32.0), 1.0, 4.0, 8192)
    plain = 10_000.0 ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    np.testing.assert_allclose(plain / rope_frequencies(config).numpy(), factors, rtol=1e-4)
    assert TorchRunner.load(folder, RunnerConfig(kv_bytes=2**20)).model == config


def test_rope_factors_of_another_kind_are_refused(tmp_path: Path) -> None:
    factors = np.linspace(1, 4, SHAPE["head_dim"] // 2, dtype=np.float32)
    write_gguf(tmp_path / "m.gguf", "llama", change=lambda file: file.add_tensor("rope_freqs.weight", factors))

    with pytest.raises(ModelError, match=r"not Llama 3's; .*--upstream"):
        convert.convert(tmp_path / "m.gguf", tmp_path / "cache", silent)


def test_a_second_conversion_reads_nothing_but_the_source(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    folder = convert.convert(tmp_path / "m.gguf", tmp_path / "cache", silent)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    said: list[str] = []

    assert convert.convert(tmp_path / "m.gguf", tmp_path / "cache", lambda what, _: said.append(what)) == folder

    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert set(said) == {"checking m.gguf"}


def test_another_file_of_the_same_name_gets_another_folder(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    first = convert.convert(tmp_path / "m.gguf", tmp_path / "cache", silent)
    write_gguf(tmp_path / "m.gguf", kind=Q.F16)

    second = convert.convert(tmp_path / "m.gguf", tmp_path / "cache", silent)

    assert first != second
    assert manifest.digest_of(first) != manifest.digest_of(second)


def test_a_conversion_cut_short_leaves_nothing_that_counts(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")

    def interrupt(what: str, done: float) -> None:
        if what.startswith("converting") and done > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.convert(tmp_path / "m.gguf", tmp_path / "cache", interrupt)
    assert not list((tmp_path / "cache").glob("*/headway.json"))

    manifest.verify(convert.convert(tmp_path / "m.gguf", tmp_path / "cache", silent))
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_two_at_once_convert_once(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    started: list[str] = []
    folders: list[Path] = []

    def work() -> None:
        count = lambda what, done: started.append(what) if done == 0 else None  # noqa: E731
        folders.append(convert.convert(tmp_path / "m.gguf", tmp_path / "cache", count))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert len(set(folders)) == 1
    assert len(folders) == 3
    assert started == ["converting m.gguf"]


def test_damaged_weights_are_found_at_load(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    folder = convert.convert(tmp_path / "m.gguf", tmp_path / "cache", silent)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"\xff")

    with pytest.raises(ModelError, match="damaged; delete the folder"):
        TorchRunner.load(folder, RunnerConfig(kv_bytes=2**20))


def test_weights_cut_short_in_the_cache_are_made_anew(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    folder = convert.convert(tmp_path / "m.gguf", tmp_path / "cache", silent)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)

    manifest.verify(convert.convert(tmp_path / "m.gguf", tmp_path / "cache", silent))


def refused(path: Path, tmp_path: Path) -> str:
    with pytest.raises(ModelError) as error:
        convert.convert(path, tmp_path / "cache", silent)
    assert not list((tmp_path / "cache").glob("*/headway.json"))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9])
def test_a_file_cut_short_is_refused(share: float, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[: int(len(whole) * share)])

    assert "cut short" in refused(tmp_path / "m.gguf", tmp_path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" + bytes(5000))

    assert "not a readable GGUF file" in refused(tmp_path / "m.gguf", tmp_path)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    said = refused(tmp_path / "m.gguf", tmp_path)

    assert "mamba" in said
    assert "headway serve --upstream" in said


def test_an_unknown_quantisation_is_named(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.ffn_gate_2.weight", np.zeros((4, 84), np.uint8), raw_dtype=Q.Q2_K)

    write_gguf(tmp_path / "m.gguf", change=add)

    said = refused(tmp_path / "m.gguf", tmp_path)

    assert "Q2_K" in said
    assert "headway serve --upstream" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN), "yarn"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(
    change: Callable[[gguf.GGUFWriter], None], said: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "m.gguf", change=change)

    assert said in refused(tmp_path / "m.gguf", tmp_path)


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "cache").write_text("a file where the folder should be")

    with pytest.raises(ModelError, match="cannot be kept under"):
        convert.convert(tmp_path / "m.gguf", tmp_path / "cache", silent)


@pytest.mark.parametrize("model", ["/nowhere/at-all", "nosuchname", "."])
def test_a_name_that_leads_nowhere_says_what_is_possible(model: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="smollm2") as error:
        convert.locate(str(tmp_path) if model == "." else model)
    assert "headway serve --upstream" in str(error.value)


def test_a_hub_name_is_downloaded_without_pickle_or_code(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tiny_llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)

    assert convert.locate("some-org/Some-Model.v2@refs/pr/3") == tiny_llama
    assert (asked["name"], asked["revision"]) == ("some-org/Some-Model.v2", "refs/pr/3")
    assert not any(fnmatch(name, pattern) for pattern in asked["allow_patterns"] for name in ("a.bin", "modeling.py"))


def test_a_hub_that_cannot_be_reached_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, **_: Any) -> str:
        raise LocalEntryNotFoundError(f"{name} is not cached. To look it up, set 'SOMETHING\nand more lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)

    with pytest.raises(ModelError, match="org/model cannot be downloaded") as error:
        convert.locate("org/model")
    assert "(org/model is not cached); name a folder, or" in str(error.value)
    assert "--upstream" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hugging_face_folder_is_used_as_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    assert convert.locate(str(tiny_llama)) == tiny_llama
    assert convert.convert(tiny_llama, tmp_path, silent) == tiny_llama
