"""Every system of the survey, its table, what to type and what departs from the paper, from the cards of conf/method.

python -m harness.survey_index            prints the page
python -m harness.survey_index FILE       writes it, docs/survey-index.md in a checkout
"""

from __future__ import annotations

from typing import Any

from harness.options import print_or_write
from harness.taxonomy import SURVEY, TABLES, System

HEAD = f"""# Survey index

Every system of the tables ({SURVEY}), in the survey's order: what to type,
which paper, and in what the method here departs from it. Written by
`python -m harness.survey_index docs/survey-index.md` from the cards in `conf/method/`: change those. "ours" marks
baselines that the survey does not list.
"""


def page() -> str:
    """The whole page, in Markdown."""
    sections = [HEAD]
    for table in TABLES:
        sections.append(f"## Table {table.number}: {table.title}\n")
        for group in table.groups:
            sections.append(f"### {group.title}\n\nIn the survey: {group.source}.\n")
            sections += [_entry(system) for system in group.systems]
    return "\n".join(sections)


def card_of(name: str) -> dict[str, Any]:
    """The card of one method, as its file has it: references to other values are left as they are written."""
    from omegaconf import OmegaConf

    from harness.run import CONF

    return OmegaConf.to_container(OmegaConf.load(CONF / "method" / f"{name}.yaml").card, resolve=False)


def _entry(system: System) -> str:
    card = card_of(system.name)
    ours = "" if system.in_survey else " (ours)"
    paper = f" · [paper]({card['paper']})" if card.get("paper") else ""
    row = f" · row “{system.row}” of the survey" if system.row else ""
    lines = [f"- **{system.title}**{ours} · `method={system.name}`{paper}{row}"]
    lines += [f"  - {departure}" for departure in card.get("departures") or []]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print_or_write(page, __doc__)
