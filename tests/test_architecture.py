"""Each family's declaration is what transformers builds, saves and loads."""

import json
from pathlib import Path

import pytest
import torch

from lightship.architecture import ARCHITECTURES, architecture_of
from lightship.causal_lm import load_causal_lm
from lightship.census import census
from lightship.checkpoint import Checkpoint
from lightship.errors import CheckpointError
from tests.tiny import FAMILIES, write_checkpoint, write_config


@pytest.fixture(scope="module", params=[(f, fp8) for f in FAMILIES for fp8 in (False, True)], ids=str)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint of each family, BF16 and FP8, as transformers saves it."""
    name, fp8 = request.param
    return Checkpoint.open(write_checkpoint(name, tmp_path_factory.mktemp(name) / "tiny", fp8=fp8))


def test_a_declaration_expects_what_transformers_saves(family: Checkpoint) -> None:
    taken = census(family)
    assert (taken.missing, taken.unexpected, taken.misshapen) == ([], [], {})
    assert set(FAMILIES) == {t for a in ARCHITECTURES for t in a.model_types}


def test_sizes_have_one_name_whatever_the_family_calls_them(family: Checkpoint) -> None:
    sizes = family.dimensions
    assert (sizes.n_routed_experts, sizes.num_experts_per_tok, sizes.moe_intermediate_size) == (8, 2, 128)
    assert family.expert_layers() == {"model.layers.1.mlp": 8}


def test_transformers_takes_the_configuration(family: Checkpoint) -> None:
    config = family.transformers_config()
    assert config.model_type == family.architecture.transformers_type
    assert getattr(config, "quantization_config", None) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_builds_and_runs_the_family(name: str, tmp_path: Path) -> None:
    path = write_checkpoint(name, tmp_path / "tiny", fp8=True)
    logits = load_causal_lm(path)(torch.arange(2, 18)[None]).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_an_mtp_layer_is_expected_if_it_is_there(name: str, tmp_path: Path) -> None:
    path = write_checkpoint(name, tmp_path / "mtp", fp8=True, mtp=True)
    taken = census(Checkpoint.open(path))
    assert (taken.missing, taken.unexpected, taken.misshapen) == ([], [], {})
    assert (taken.mtp_declared, taken.mtp_found) == (1, 1)


def test_an_mtp_layer_that_a_release_leaves_out_is_not_missing(tmp_path: Path) -> None:
    path = write_checkpoint("deepseek_v3", tmp_path / "tiny", fp8=True)
    write_config(path, json.loads((path / "config.json").read_text()) | {"num_nextn_predict_layers": 1})
    taken = census(Checkpoint.open(path))
    assert taken.complete
    assert (taken.mtp_declared, taken.mtp_found) == (1, 0)


def test_the_census_names_what_is_missing_unexpected_or_misshapen(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint("qwen3_moe", tmp_path / "tiny", fp8=True))
    moved = checkpoint.tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight_scale_inv")
    checkpoint.tensors["model.layers.1.mlp.experts.8.up_proj.weight"] = moved
    checkpoint.tensors["model.norm.weight"] = checkpoint.tensors["lm_head.weight"]
    taken = census(checkpoint)
    assert taken.missing == ["model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"]
    assert taken.unexpected == ["model.layers.1.mlp.experts.8.up_proj.weight"]
    assert taken.misshapen == {"model.norm.weight": ((258, 128), (128,))}
    assert not taken.complete


def test_sparse_steps_decide_which_layers_have_experts() -> None:
    config = FAMILIES["qwen3_moe"] | {"model_type": "qwen3_moe", "num_hidden_layers": 6}
    family = architecture_of(config)
    stepped = config | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert [layer for layer in range(6) if family.is_moe(stepped, layer)] == [1, 5]


def test_deepseek_v3_has_671_billion_parameters_and_caches_576_numbers_a_layer() -> None:
    config = FAMILIES["deepseek_v3"] | {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "n_routed_experts": 256,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
    }
    family = architecture_of(config)
    parameters = sum(torch.Size(w.shape).numel() for w in family.weights(config).values())
    assert 671.0e9 < parameters < 671.1e9
    assert family.attention.cached_values(config, 8) == 576


def test_keys_and_values_are_shared_out_until_each_rank_has_one_head() -> None:
    config = FAMILIES["glm4_moe"] | {"model_type": "glm4_moe", "num_key_value_heads": 4, "head_dim": 128}
    cached = architecture_of(config).attention.cached_values
    assert [cached(config, tp) for tp in (1, 2, 4, 8)] == [1024, 512, 256, 256]


def test_an_unknown_family_says_what_a_declaration_would_need(broken: Path) -> None:
    write_config(broken, json.loads((broken / "config.json").read_text()) | {"model_type": "minimax_m2"})
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(broken).architecture  # noqa: B018
    said = str(error.value)
    assert "model_type 'minimax_m2' is not supported (supported: deepseek_v2, deepseek_v3, glm4_moe, kimi_k2" in said
    assert "n_routed_experts" in said
    assert "model.layers.N.mlp.experts.N.gate_proj.weight" in said


def test_a_lacking_size_is_named(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    del config["kv_lora_rank"]
    write_config(broken, config)
    with pytest.raises(CheckpointError, match=r"broken: config\.json .* no usable kv_lora_rank"):
        census(Checkpoint.open(broken))
