"""One decoder, several families: float32 logits equal transformers' on random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.compute.runner import RunnerConfig, TorchRunner
from engine.models.config import ModelError, read
from engine.models.linear import Linear, pack
from tests.engine import tiny
from tests.engine.driver import all_logits

IDS = np.random.default_rng(5).integers(0, 211, 150).tolist()


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_every_family_agrees_with_transformers_at_every_position(family: str, tmp_path: Path) -> None:
    model = tiny.save(family, tmp_path)
    runner = TorchRunner.load(tmp_path, RunnerConfig(block_tokens=4, kv_bytes=2**20))

    ours = all_logits(runner, IDS, chunks=[64, 1, 85])

    torch.testing.assert_close(ours, tiny.logits(model, IDS), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("sparse_step", "plain", "is_normed"), [(2, [], True), (1, [0], False)])
def test_layers_with_and_without_experts_mix(
    sparse_step: int, plain: list[int], is_normed: bool, tmp_path: Path
) -> None:
    changes = {"decoder_sparse_step": sparse_step, "mlp_only_layers": plain, "norm_topk_prob": is_normed}
    model = tiny.save("qwen3-moe", tmp_path, **changes)
    runner = TorchRunner.load(tmp_path, RunnerConfig(block_tokens=4, kv_bytes=2**20))

    torch.testing.assert_close(all_logits(runner, IDS, chunks=[149, 1]), tiny.logits(model, IDS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", ["block", "row", "tensor"])
def test_an_fp8_checkpoint_computes_what_its_rounded_weights_compute(form: str, tmp_path: Path) -> None:
    model = tiny.save("qwen2", tmp_path)
    before = tiny.logits(model, IDS)
    tiny.quantise(tmp_path, model, form)
    after = tiny.logits(model, IDS)
    assert (before - after).abs().max() > 1e-2

    runner = TorchRunner.load(tmp_path, RunnerConfig(block_tokens=4, kv_bytes=2**20))

    torch.testing.assert_close(all_logits(runner, IDS, chunks=[150]), after, atol=1e-4, rtol=0)


def test_eight_bits_without_a_scale_are_refused(tmp_path: Path) -> None:
    tiny.quantise(tmp_path, tiny.save("llama", tmp_path), "row")
    stored = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor for name, tensor in stored.items() if "_scale" not in name}, tmp_path / "model.safetensors")

    with pytest.raises(ModelError, match="has no scale"):
        TorchRunner.load(tmp_path, RunnerConfig(block_tokens=4, kv_bytes=2**20))


def test_the_count_of_parameters_is_the_checkpoints(tmp_path: Path) -> None:
    for family in ("llama", "llama-tied", "qwen3-moe"):
        model = tiny.save(family, tmp_path / family)
        small = sum(each.numel() for name, each in model.named_parameters() if "norm" in name or "mlp.gate.w" in name)

        assert read(tmp_path / family).parameters == model.num_parameters() - small


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="GiB of memory are free; lower --kv-bytes"):
        TorchRunner.load(tiny_llama, RunnerConfig(block_tokens=4, kv_bytes=2**50))


def test_shards_are_read_as_one_checkpoint(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path, shard="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1

    runner = TorchRunner.load(tmp_path, RunnerConfig(block_tokens=4, kv_bytes=2**20))

    torch.testing.assert_close(all_logits(runner, IDS, chunks=[150]), tiny.logits(model, IDS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["qwen3-moe", "llama-tied"])
def test_a_shape_without_weights_is_served_with_made_up_ones_the_same_each_time(family: str, tmp_path: Path) -> None:
    tiny.save(family, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds neither"):
        TorchRunner.load(tmp_path, RunnerConfig(block_tokens=4, kv_bytes=2**20))
    config = json.loads((tmp_path / "config.json").read_text()) | {"random_weights": True}
    (tmp_path / "config.json").write_text(json.dumps(config))

    first, again = (
        all_logits(TorchRunner.load(tmp_path, RunnerConfig(block_tokens=4, kv_bytes=2**20)), IDS, chunks=[150])
        for _ in range(2)
    )

    assert first.isfinite().all()
    assert first.std() > 1e-3
    torch.testing.assert_close(first, again, atol=0, rtol=0)


def test_bfloat16_runs_and_stays_near_float32(tiny_llama: Path) -> None:
    exact = TorchRunner.load(tiny_llama, RunnerConfig(block_tokens=4, kv_bytes=2**20))
    rough = TorchRunner.load(tiny_llama, RunnerConfig(block_tokens=4, kv_bytes=2**20, dtype=torch.bfloat16))

    difference = all_logits(exact, IDS, chunks=[150]) - all_logits(rough, IDS, chunks=[150])

    assert 0 < difference.abs().max() < 0.1


def test_a_packed_product_equals_the_plain_one() -> None:
    weight, bias, x = torch.randn(40, 24), torch.randn(40), torch.randn(7, 24)

    torch.testing.assert_close(pack(weight, bias)(x), Linear(weight, bias)(x), atol=1e-5, rtol=0)


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    tiny.save("mistral", tmp_path, sliding_window=128)

    assert read(tmp_path).context_max == 128


def test_eos_ids_come_from_the_generation_config_first(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')

    assert read(tmp_path).eos_ids == (7, 9)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "factor": 2.0}}, "yarn"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_size": "wide"}, "config.json"),
        ({"num_hidden_layers": 0}, "a size is below 1"),
        ({"num_key_value_heads": 4}, "heads do not divide"),
        ({"max_position_embeddings": 0}, "a size is below 1"),
        ({"num_attention_heads": 0, "head_dim": None}, "config.json"),
        ({"vocab_size": float("inf")}, "config.json"),
        ({"quantization_config": "fp8"}, "config.json"),
    ],
)
def test_what_the_decoder_does_not_cover_is_refused_in_one_sentence(
    tiny_llama: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    config = json.loads((tiny_llama / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(ModelError, match=said) as refused:
        read(tmp_path)

    assert "headway serve --upstream" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(ModelError, match=r"model\.layers\.2\.input_layernorm"):
        TorchRunner.load(tmp_path, RunnerConfig(kv_bytes=2**20))


@pytest.mark.parametrize("placed", ['["model-1.safetensors"]', "{}", "null"])
def test_an_index_that_names_no_file_is_refused(placed: str, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {placed}}}')

    with pytest.raises(ModelError, match="names no weight file"):
        TorchRunner.load(tmp_path, RunnerConfig(kv_bytes=2**20))


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04not safetensors")

    with pytest.raises(ModelError, match="not a readable safetensors file"):
        TorchRunner.load(tmp_path, RunnerConfig(kv_bytes=2**20))
