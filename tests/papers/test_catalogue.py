"""The catalogue agrees with itself, the roadmap and the code it points to; search and the command line work."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from landmark.cli.main import COMMANDS, main
from landmark.cli.papers import app
from landmark.models.registry import sizes
from landmark.papers.catalogue import GraphFormat, Lang, Paper, load
from landmark.papers.experiment import experiments

ROOT = Path(__file__).parents[2]
ROADMAP = [
    f"{letter}{number}"
    for letter, last in {"F": 7, "S": 9, "E": 17, "A": 14, "P": 10, "R": 9, "M": 10, "I": 5}.items()
    for number in range(1, last + 1)
]
ESSENTIALS = [
    "Attention Is All You Need", "BERT", "Language Models are Unsupervised Multitask Learners", "Few-Shot Learners",
    "Scaling Laws for Neural Language Models", "Learning Transferable Visual Models", "Trained on Code", "RoFormer",
    "GLaM", "Compute-Optimal", "PaLM", "instructions with human feedback", "Chain-of-Thought", "Emergent Abilities",
    "FlashAttention:", "Constitutional AI", "LLaMA: Open and Efficient", "GPT-4 Technical Report", "Llama 2",
    "Direct Preference Optimization", "Mistral 7B", "Mamba", "Mixtral", "Sleeper Agents", "1.58 Bits",
    "The Llama 3 Herd", "Transformers are SSMs", "Tulu 3", "DeepSeek-V3", "DeepSeek-R1", "Titans",
]  # fmt: skip
KANA, HANGUL, HAN = re.compile("[ぁ-ヿ]"), re.compile("[가-힣]"), re.compile("[一-鿿]")

catalogue = load()
papers = pytest.mark.parametrize("paper", catalogue.papers, ids=lambda paper: paper.id)


def run(*args: str) -> str:
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == 0, result.output
    return result.output


def ids(*args: str) -> list[str]:
    return [row["id"] for row in json.loads(run(*args, "--json"))]


# What the file says


def test_ids_and_titles_are_unique() -> None:
    for values in ([p.id for p in catalogue.papers], [p.title for p in catalogue.papers]):
        assert len(set(values)) == len(values)
    assert len(catalogue.papers) > 100


def test_every_roadmap_row_is_covered() -> None:
    covered = {row for paper in catalogue.papers for row in paper.rows}
    assert covered == set(ROADMAP)


@papers
def test_a_paper_is_well_formed(paper: Paper) -> None:
    assert re.fullmatch(r"[a-z0-9]+([-.][a-z0-9]+)*", paper.id)
    assert paper.theme in {theme.id for theme in catalogue.themes}
    assert 2017 <= paper.year <= 2026 and 1 <= paper.month <= 12
    assert paper.authors and "et al." not in paper.authors[:-1] and len(set(paper.authors)) == len(paper.authors)
    assert paper.url.startswith("https://")
    if "arxiv.org" in paper.url:
        assert paper.arxiv, f"{paper.url} is not https://arxiv.org/abs/NUMBER"
        assert abs(2000 + int(paper.arxiv[:2]) - paper.year) <= 1
        assert 1 <= int(paper.arxiv[2:4]) <= 12


@papers
def test_it_builds_on_older_papers(paper: Paper) -> None:
    for parent in paper.builds_on:
        assert parent in catalogue.by_id
        assert catalogue.by_id[parent].date <= paper.date
    assert paper not in catalogue.ancestors(paper.id)
    assert len(set(paper.builds_on)) == len(paper.builds_on)


@papers
def test_contributions_are_in_three_languages(paper: Paper) -> None:
    text = paper.contribution
    assert 250 <= len(text.en) <= 500 and text.en.endswith(".") and not re.search("[ぁ-ヿ가-힣一-鿿]", text.en)
    assert 100 <= len(text.ja) <= 250 and text.ja.endswith("。") and KANA.search(text.ja)
    assert 120 <= len(text.ko) <= 300 and text.ko.endswith(".") and HANGUL.search(text.ko)
    assert not HANGUL.search(text.ja) and not KANA.search(text.ko) and not HAN.search(text.ko)
    assert not re.search("です。|ます。", text.ja), "plain form throughout"
    assert not re.search("(?<!아)니다[. ]", text.ko), "plain form throughout"


def test_no_contribution_is_used_twice() -> None:
    texts = [paper.contribution[lang] for paper in catalogue.papers for lang in Lang]
    assert len(set(texts)) == len(texts)


def test_the_essentials_are_in_order() -> None:
    assert len(catalogue.essentials) == len(ESSENTIALS) == 31
    for name, title in zip(catalogue.essentials, ESSENTIALS, strict=True):
        assert title in catalogue.by_id[name].title
    assert len(set(catalogue.newcomers)) == 12 and set(catalogue.newcomers) <= set(catalogue.by_id)


def test_reading_groups_and_model_facts() -> None:
    assert {group.region for group in catalogue.groups} == {"korea", "japan", "elsewhere"}
    for group in catalogue.groups:
        assert group.url.startswith("https://")
        assert KANA.search(group.about.ja) and HANGUL.search(group.about.ko)
    facts = {model.name: model for model in catalogue.models}
    assert {model.paper for model in facts.values() if model.paper} <= set(catalogue.by_id)
    assert facts["GPT-3"].cell("total") == "175B"
    assert facts["GPT-4"].cell("total") == "~1.8T (estimate)" and facts["GPT-4"].cell("positions") == "undisclosed"
    assert facts["DeepSeek-V3"].cell("active") == "37B"
    for name in ("GPT-5.2", "Claude Opus 4.6", "Gemini 3", "Claude 3.7 Sonnet"):
        assert facts[name].cell("total") == facts[name].cell("active") == "undisclosed"


# What the code has


@papers
def test_modules_and_evidence_exist(paper: Paper) -> None:
    for module in paper.module:
        assert find_spec(module), f"{module} does not exist"
    for evidence in paper.evidence:
        if evidence.startswith("landmark "):
            _, command, *arguments = evidence.split()
            assert command in COMMANDS
            assert command != "inspect" or set(arguments) <= set(sizes())
            assert command != "reproduce" or set(arguments) <= set(experiments())
        else:
            assert (ROOT / evidence).is_file(), f"{evidence} does not exist"
    assert paper.module or not paper.evidence


def test_status_follows_from_module_and_evidence() -> None:
    llama = catalogue.by_id["llama"]
    assert llama.status == "implemented"
    assert replace(llama, module=()).status == replace(llama, evidence=()).status == "planned"


def test_every_family_and_mechanism_is_in_the_catalogue() -> None:
    """A model file that no paper points to is a gap in the catalogue."""
    named = {module for paper in catalogue.papers for module in paper.module}
    shared = {"backbone", "base", "decoder", "encoder", "encoder_decoder", "registry", "rope_keys", "heads", "__init__"}
    files = {path.stem for path in (ROOT / "landmark/models").glob("*.py")} - shared
    registering = {name for name in files if "register(" in (ROOT / f"landmark/models/{name}.py").read_text()}
    assert {f"landmark.models.{name}" for name in registering} <= named


# Search and lineage


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("mamba", "mamba"),
        ("MAMBA 2", "mamba2"),
        ("llama-2", "llama2"),
        ("mistral 7b", "mistral-7b"),
        ("attention is all you need", "transformer"),
        ("2312.00752", "mamba"),
        ("state space", "mamba"),
        ("Lukasz", "transformer"),
        ("Ré attention", "flash-attention"),
        ("landmark.nn.rope", "rope"),
        ("回転", "rope"),
        ("상태공간", "mamba"),
        ("ＬｏＲＡ", "lora"),
    ],
)
def test_search_finds_the_paper_first(query: str, first: str) -> None:
    assert catalogue.search(query)[0].id == first


def test_search_ranks_titles_over_authors_over_texts() -> None:
    found = [paper.id for paper in catalogue.search("constitutional")]
    assert found[0] == "constitutional-ai"
    by_title = [p.id for p in catalogue.search("mamba") if "mamba" in p.title.lower()]
    assert [paper.id for paper in catalogue.search("mamba")][: len(by_title)] == by_title
    shazeer = catalogue.search("shazeer")
    assert {paper.id for paper in shazeer} == {"transformer", "mqa", "glu-variants", "sparse-moe"}


def test_search_knows_rows_themes_and_years() -> None:
    assert {paper.id for paper in catalogue.search("F5")} == {"deberta", "deberta-v3"}
    assert {paper.id for paper in catalogue.search("E1")} == {"flash-attention"}
    assert {p.theme for p in catalogue.search("安全性と解釈可能性")} == {"safety"}
    assert {p.year for p in catalogue.search("", year=2019)} == {2019}
    assert {p.theme for p in catalogue.search("", theme="safety")} == {"safety"}
    assert catalogue.search("") == list(catalogue.papers)
    assert catalogue.search("nonexistentword") == catalogue.search("?!") == []
    assert set(catalogue.search("attention 2023")) < set(catalogue.search("attention"))


def test_a_wrong_theme_is_named() -> None:
    with pytest.raises(ValueError, match=r"no theme 'scalng'; the themes are foundations, scaling"):
        catalogue.search("", theme="scalng")


def test_lineage() -> None:
    ancestors = [paper.id for paper in catalogue.ancestors("deepseek-r1")]
    assert {"transformer", "deepseek-v3", "deepseek-moe", "sparse-moe", "ppo"} <= set(ancestors)
    assert ancestors == [paper.id for paper in sorted(catalogue.ancestors("deepseek-r1"), key=lambda p: (p.date, p.id))]
    for paper in catalogue.papers:
        for child in catalogue.descendants(paper.id):
            assert paper in catalogue.ancestors(child.id)
    assert {p.id for p in catalogue.children("bert")} == {p.id for p in catalogue.papers if "bert" in p.builds_on}
    assert set(catalogue.lineage("mamba", theme="llama")) < set(catalogue.lineage("mamba"))


@pytest.mark.parametrize("format", GraphFormat)
def test_graphs_have_every_node_and_edge(format: GraphFormat) -> None:
    graph = catalogue.graph(format)
    edges = sum(len(paper.builds_on) for paper in catalogue.papers)
    count = {GraphFormat.mermaid: graph.count(" --> "), GraphFormat.dot: graph.count(" -> ")}
    count[GraphFormat.text] = sum(len(line.split(" <- ")[1].split(", ")) for line in graph.splitlines() if "<-" in line)
    assert count[format] == edges
    for paper in catalogue.papers:
        assert re.search(rf"(?<![\w.-]){re.escape(paper.id)}(?![\w.-])", graph)


# The command line


def test_listing_and_searching() -> None:
    assert set(ids()) == set(catalogue.by_id)
    assert ids("state", "space") == ids("state space") == ids("search", "state space") == ["mamba", "mamba2"]
    assert ids("--theme", "safety", "--year", "2023") == ["monosemanticity"]
    listed = run()
    assert all(paper.id in listed for paper in catalogue.papers)
    assert "no paper matches" in run("nonexistentword")


def test_show() -> None:
    mamba = catalogue.by_id["mamba"]
    out = run("show", "mamba")
    assert "Albert Gu, Tri Dao" in out and mamba.url in out and "22 of 31" in out and mamba.status in out
    assert run("show", "2312.00752") == run("show", "MAMBA") == out
    for lang in Lang:
        shown = run("show", "mamba", "--lang", lang)
        assert re.sub(r"\s", "", mamba.contribution[lang]) in re.sub(r"\s", "", shown)
        assert shown == run("--lang", lang, "show", "mamba")
    record = json.loads(run("show", "mamba", "--json"))
    assert record["contribution"]["ko"] == mamba.contribution.ko and record["essential"] == 22
    assert set(record["builds_on"]) == set(mamba.builds_on) and record["status"] == mamba.status


@pytest.mark.parametrize("lang", Lang)
def test_no_line_is_wider_than_the_terminal(lang: Lang) -> None:
    from rich.cells import cell_len

    for paper in catalogue.papers:
        for line in run("show", paper.id, "--lang", lang).splitlines():
            assert cell_len(line.rstrip()) <= 80 or "http" in line


def test_the_other_commands() -> None:
    assert ids("essentials") == list(catalogue.essentials)
    assert ids("essentials", "--newcomers") == list(catalogue.newcomers)
    assert catalogue.by_id["titans"].title in run("essentials") and "GPT-4" not in run("essentials", "--newcomers")
    assert "~1.8T" in run("models") and "undisclosed" in run("models")
    assert len(json.loads(run("models", "--json"))) == len(catalogue.models)
    for group in catalogue.groups:
        assert group.name in run("groups") and group.url in run("groups", "--lang", "ko")
    assert len(json.loads(run("groups", "--json"))) == len(catalogue.groups)
    assert run("graph").rstrip() == catalogue.graph()
    assert run("graph", "dpo", "--format", "dot").rstrip() == catalogue.graph("dot", "dpo")
    graph = json.loads(run("graph", "dpo", "--json"))
    assert set(graph["papers"]) == {paper.id for paper in catalogue.lineage("dpo")} and ["dpo", "ipo"] in graph["edges"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["show", "manba"], "no paper 'manba' in the catalogue; did you mean mamba or"),
        (["show", "zzzzzzz"], "no paper 'zzzzzzz' in the catalogue; `landmark papers` lists them all"),
        (["graph", "berd"], "no paper 'berd' in the catalogue; did you mean bert"),
        (["--theme", "scalng"], "no theme 'scalng'; the themes are foundations, scaling"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    args: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["landmark", "papers", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.err.startswith(f"landmark: {message}") and printed.err.count("\n") == 1 and not printed.out


def test_it_needs_no_torch() -> None:
    code = "import sys; sys.argv = ['landmark', 'papers', 'show', 'mamba']; from landmark.cli.main import main\n"
    code += "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
