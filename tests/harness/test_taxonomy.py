"""The taxonomy names every system once, in the survey's order."""

from __future__ import annotations

import re

import pytest

from harness import taxonomy

TYPED_NAMES = """
    dense rtn llm_int8 gptq awq owq spqr
    zeroquant zeroquant_v2 zeroquant_fp smoothquant omniquant fp8
    kbit_int kbit_float kbit_quantile kbit_dynamic nf4 fp4 q8bert qbert peqa qlora
    magnitude wanda sparsegpt prune_and_tune llm_pruner loraprune gum
    word_kd sequence_kd minillm gkd compressed_llm
    meta_ict multitask_ict mt_cot teach_small fine_tune_cot specializing step_by_step socratic_cot scott pad
    teacher_intervention lion lamini
    paged_attention windowed_attention attention_sinks flash_attention speculative_decoding
"""


def test_every_system_is_named_exactly_once():
    names = [taxonomy.DENSE.name, *(system.name for table in taxonomy.TABLES for system in table.systems)]
    assert sorted(names) == sorted(TYPED_NAMES.split())
    assert len(names) == len(set(names)) == len(taxonomy.SYSTEMS)


def test_titles_are_distinct_and_names_can_be_typed():
    titles = [system.title for system in taxonomy.SYSTEMS.values()]
    assert len(set(titles)) == len(titles)
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in taxonomy.SYSTEMS)


@pytest.mark.parametrize("group", taxonomy.GROUPS.values(), ids=lambda group: group.key)
def test_baselines_of_ours_stand_before_the_systems_of_the_survey(group):
    marks = [system.in_survey for system in group.systems]
    assert marks == sorted(marks)
    assert any(marks), "a group without a system of the survey is not a group of the survey"


def test_a_table_holds_one_family_and_says_where_the_survey_has_it():
    for table in taxonomy.TABLES:
        assert {group.key.partition("/")[0] for group in table.groups} == {table.family}
        assert all(re.search(r"Table I+|Section III-", group.source) for group in table.groups)


def test_placement_prefers_the_survey_and_falls_back_to_the_card():
    assert taxonomy.placement("gptq", "nonsense").key == "quantization/weight_only"
    assert taxonomy.placement("peer_torchao_int4", "quantization/weight_only").title == "Weight only"
    assert taxonomy.placement("dense", "baseline") is None


def test_unknown_table_is_a_key_error():
    assert taxonomy.table_named("table_2").title == "Pruning"
    with pytest.raises(KeyError):
        taxonomy.table_named("table_9")
