"""The survey's families and tables, in the survey's order and wording.

"Inference Optimizations for Large Language Models: Effects, Challenges, and Practical Considerations",
Donisch, Schacht, Lanquillon (2024), https://arxiv.org/abs/2408.03130. Tables I to III are the survey's; it prints
none for the architectural optimizations of Section III-D, which are table 4 here.

A system's name is what a user types after `method=`. Baselines that the survey does not list stand first in their
group and are marked as ours (`in_survey=False`), so that nobody takes them for the survey's choice.
"""

from __future__ import annotations

from dataclasses import dataclass

SURVEY = "Donisch, Schacht, Lanquillon, arXiv 2408.03130"


@dataclass(frozen=True)
class System:
    """One row of a table.

    name: what a user types after `method=`.
    title: the name in print, as in the survey where the survey has one.
    in_survey: False for a baseline that we add.
    row: the survey's row, where it is worded differently from the title or names several systems at once.
    """

    name: str
    title: str
    in_survey: bool = True
    row: str = ""


@dataclass(frozen=True)
class Group:
    """Systems that the survey sets side by side.

    key: `family/group`, the same words as `card.taxonomy` of every method in it.
    source: where the survey has it.
    """

    key: str
    title: str
    source: str
    systems: tuple[System, ...]


@dataclass(frozen=True)
class Table:
    """One table: groups of systems in print order."""

    name: str
    number: str
    title: str
    groups: tuple[Group, ...]

    @property
    def family(self) -> str:
        """First half of the taxonomy of everything in it: "quantization", "pruning", …"""
        return self.groups[0].key.partition("/")[0]

    @property
    def systems(self) -> tuple[System, ...]:
        """Every system in print order."""
        return tuple(system for group in self.groups for system in group.systems)


DENSE = System("dense", "Dense", in_survey=False)  # the reference row of every table

TABLES = (
    Table(
        "table_1",
        "I",
        "Quantization",
        (
            Group(
                "quantization/weight_only",
                "Weight only",
                "Table I",
                (
                    System("rtn", "RTN", in_survey=False),
                    System("llm_int8", "LLM.int8()"),
                    System("gptq", "GPTQ"),
                    System("awq", "AWQ"),
                    System("owq", "OWQ"),
                    System("spqr", "SpQR"),
                ),
            ),
            Group(
                "quantization/weight_and_activation",
                "Weight and activation",
                "Table I",
                (
                    System("zeroquant", "ZeroQuant"),
                    System("zeroquant_v2", "ZeroQuant-V2"),
                    System("smoothquant", "SmoothQuant"),
                    System("omniquant", "OmniQuant"),
                    System("zeroquant_fp", "ZeroQuant-FP"),
                    System("fp8", "FP8"),
                ),
            ),
            Group(
                "quantization/data_types",
                "Data types and scaling",
                "Section III-A, text",
                (
                    System("kbit_int", "k-bit integer", row="k-bit inference scaling laws"),
                    System("kbit_float", "k-bit float", row="k-bit inference scaling laws"),
                    System("kbit_quantile", "k-bit quantile", row="k-bit inference scaling laws"),
                    System("kbit_dynamic", "k-bit dynamic exponent", row="k-bit inference scaling laws"),
                    System("nf4", "NF4"),
                    System("fp4", "FP4"),
                ),
            ),
            Group(
                "quantization/trained",
                "Trained",
                "Section III-A, text",
                (
                    System("q8bert", "Q8BERT"),
                    System("qbert", "Q-BERT"),
                    System("peqa", "PEQA"),
                    System("qlora", "QLoRA"),
                ),
            ),
        ),
    ),
    Table(
        "table_2",
        "II",
        "Pruning",
        (
            Group(
                "pruning/structured",
                "Structured",
                "Table II",
                (
                    System("llm_pruner", "LLM-Pruner"),
                    System("loraprune", "LoRAPrune"),
                    System("gum", "GUM", row="What Matters in Structured Pruning"),
                ),
            ),
            Group(
                "pruning/unstructured",
                "Unstructured",
                "Table II",
                (
                    System("magnitude", "Magnitude", in_survey=False),
                    System("sparsegpt", "SparseGPT"),
                    System("wanda", "Wanda"),
                    System("prune_and_tune", "Prune and Tune"),
                ),
            ),
        ),
    ),
    Table(
        "table_3",
        "III",
        "Knowledge distillation",
        (
            Group(
                "distillation/white_box",
                "White-box",
                "Table III",
                (
                    System("word_kd", "Word-level KD", in_survey=False),
                    System("sequence_kd", "Sequence-level KD", in_survey=False),
                    System("minillm", "MiniLLM"),
                    System("gkd", "GKD", row="On-policy Distillation"),
                    System(
                        "compressed_llm", "Compressed LLM", row="How To Train Your (Compressed) Large Language Model"
                    ),
                ),
            ),
            Group(
                "distillation/black_box",
                "Black-box",
                "Table III",
                (
                    System("meta_ict", "Meta-ICT", row="In-context Learning Distillation"),
                    System("multitask_ict", "Multitask-ICT", row="In-context Learning Distillation"),
                    # The survey's one row cites Magister et al. under the title of Li et al.; both stand here.
                    System("mt_cot", "MT-CoT", row="Explanations from LLMs Make Small Models Better"),
                    System("teach_small", "Teaching small LMs", row="Explanations from LLMs Make Small Models Better"),
                    System("fine_tune_cot", "Fine-tune-CoT", row="Large Language Models Are Reasoning Teachers"),
                    System("specializing", "Specializing", row="Specializing Smaller Language Models"),
                    System("step_by_step", "Step-by-step", row="Distilling Step-by-Step"),
                    System("socratic_cot", "Socratic CoT", row="Distilling Reasoning Capabilities"),
                    System("scott", "SCOTT"),
                    System("pad", "PaD"),
                    System("teacher_intervention", "Intervention", row="Can Language Models Teach Weaker Agents?"),
                    System("lion", "Lion"),
                    System("lamini", "LaMini-LM"),
                ),
            ),
        ),
    ),
    Table(
        "table_4",
        "4",
        "Architectural optimizations",
        (
            Group(
                "architecture/attention",
                "Architecture",
                "Section III-D",
                (
                    System("paged_attention", "PagedAttention"),
                    System("windowed_attention", "Windowed attention"),
                    System("attention_sinks", "Attention sinks"),
                    System("flash_attention", "FlashAttention"),
                    System("speculative_decoding", "Speculative decoding"),
                ),
            ),
        ),
    ),
)

SYSTEMS: dict[str, System] = {system.name: system for table in TABLES for system in table.systems} | {"dense": DENSE}
GROUPS: dict[str, Group] = {group.key: group for table in TABLES for group in table.groups}
GROUP_OF: dict[str, Group] = {system.name: group for group in GROUPS.values() for system in group.systems}


def table_named(name: str) -> Table:
    """The table with this name. Raises KeyError for another name."""
    for table in TABLES:
        if table.name == name:
            return table
    raise KeyError(name)


def placement(name: str, taxonomy: str) -> Group | None:
    """The group a method belongs to: its own in the survey, else the one that its card names, else None.

    name: `card.name`; taxonomy: `card.taxonomy`, e.g. "quantization/weight_only".
    """
    return GROUP_OF.get(name) or GROUPS.get(taxonomy)


def table_of_group(group: Group) -> Table:
    """The table that has this group. Raises KeyError for a group of none."""
    for table in TABLES:
        if group in table.groups:
            return table
    raise KeyError(group.key)
