"""Every part of a model must divide at a degree of tensor parallelism, not its routed experts alone."""

from typing import Any

from lightship.architecture import architecture_of
from lightship.quant.degrees import degrees_of
from lightship.records import Degree
from tests.tiny import FAMILIES

GLM_45: dict[str, Any] = FAMILIES["glm4_moe"] | {
    "model_type": "glm4_moe",
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
}
GLM_45_AIR = GLM_45 | {"hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408}


def degrees(config: dict[str, Any]) -> dict[int, Degree]:
    return {degree.tp: degree for degree in degrees_of(architecture_of(config).weights(config).values())}


def in_the_way(degree: Degree) -> set[str]:
    return {part for part, obstacles in degree.obstacles.items() if obstacles}


def test_shared_experts_are_judged_like_routed_ones() -> None:
    of = degrees(GLM_45)
    assert [tp for tp, degree in of.items() if degree.possible] == [1, 2, 4]
    assert in_the_way(of[8]) == {"routed experts", "shared experts"}
    assert of[8].obstacles["shared experts"][0].endswith("gate_proj.weight: 1536 / 8 = 192 is no multiple of 128")


def test_a_dense_mlp_of_half_a_block_divides_at_no_degree() -> None:
    of = degrees(GLM_45_AIR)
    assert in_the_way(of[1]) == {"dense MLP"}
    assert of[1].obstacles["dense MLP"][0] == "model.layers.0.mlp.gate_proj.weight: 10944 is no multiple of 128"
    assert not any(degree.possible for degree in of.values())


def test_on_one_rank_only_what_sglang_stacks_must_be_whole_blocks() -> None:
    latent = FAMILIES["deepseek_v3"] | {"model_type": "deepseek_v3", "num_attention_heads": 1}
    assert degrees(latent)[1].possible, "q_b_proj has 192 rows, and stands alone"
    grouped = GLM_45 | {"num_key_value_heads": 1, "head_dim": 64}
    assert in_the_way(degrees(grouped)[1]) == {"attention"}, "k_proj has 64 rows, and q and v beside it"


def test_key_and_value_heads_are_repeated_but_never_cut() -> None:
    of = degrees(GLM_45)
    assert in_the_way(of[32]) == {"routed experts", "shared experts"}, "eight heads of 128, four ranks each"
    assert "k_proj.weight: 512 / 8 = 64 is no multiple of 128" in "".join(
        degrees(GLM_45 | {"head_dim": 64})[32].obstacles["attention"]
    )
