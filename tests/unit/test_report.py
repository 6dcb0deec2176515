"""Reports: what stands on the page, and what a browser, a screen reader and a stranger may rely on."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser

import pytest
from architectures import build
from report_cases import HOSTILE, about_last, certificate, hostile, kept, statement, with_loss

from weightproof import Certificate, GuardSession, InputError, report
from weightproof.cli import main
from weightproof.reporting.heat import heat_map
from weightproof.reporting.words import number
from weightproof.signing import generate_key

VOID = {"meta", "br", "hr", "img", "input", "link", "base", "col", "wbr"}
SHAPES = {"line", "rect", "path", "circle"}
LANDMARKS = ("header", "nav", "main", "footer")


class Page(HTMLParser):
    """A page read strictly: every element is closed, in order; nothing is closed twice."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str], tuple[str, ...]]] = []
        self.words: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        self.elements.append((tag, {name: value or "" for name, value in attrs}, tuple(self._open)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in SHAPES, f"<{tag}/> is not self-closing in HTML"
        self.elements.append((tag, {name: value or "" for name, value in attrs}, tuple(self._open)))

    def handle_endtag(self, tag):
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1] == tag, f"</{tag}> closes <{self._open[-1]}>"
        self._open.pop()

    def handle_data(self, data):
        self.words.append((self._open[-1] if self._open else "", data))

    def all(self, *tags):
        return [(attrs, path) for tag, attrs, path in self.elements if tag in tags]

    @property
    def text(self) -> str:
        """What is read out, without the places where a name may break."""
        return " ".join(" ".join(data for tag, data in self.words if tag not in ("style", "title", "desc")).split())


def without_steps():
    found = statement()
    found["predicate"].update(steps=[], decision=None, assurance="none")
    return found


def changed_last(**changes):
    found = statement()
    found["predicate"]["steps"][-1].update(changes)
    return about_last(found)


CASES = {
    "rejected": lambda: with_loss("rejected"),
    "kept": lambda: with_loss("kept", kept()),
    "undecided": lambda: with_loss("undecided"),
    "outputs only": statement,
    "hostile": hostile,
    "nothing judged": without_steps,
    "halted": lambda: changed_last(action="HALT", applied="not restored"),
}


@pytest.fixture(scope="module", params=CASES)
def page(request) -> Page:
    return Page(report.html(certificate(CASES[request.param]())))


# -- any page --------------------------------------------------------------------------------------


def test_page_needs_nothing_from_outside(page):
    """No address in any attribute but places on the page itself; no script, frame, form or style sheet."""
    forbidden = {"script", "iframe", "object", "embed", "link", "base", "form", "img", "video", "audio", "image", "use"}
    assert not forbidden & {tag for tag, _, _ in page.elements}
    for tag, attrs, _ in page.elements:
        for name, value in attrs.items():
            assert not name.startswith("on"), f"<{tag}> has an event handler: {name}"
            if name in ("href", "src", "action", "xlink:href", "style", "srcset", "data"):
                assert name == "href", (tag, name)
                assert re.fullmatch(r"#[a-z-]+", value), (tag, name, value)
    (style,) = [data for tag, data in page.words if tag == "style"]
    assert not re.search(r"url\(|@import|@font-face|expression\(", style)
    policy = [attrs["content"] for attrs, _ in page.all("meta") if "http-equiv" in attrs]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"], "the browser is told to fetch nothing, too"


def test_links_lead_to_sections_and_ids_are_unique(page):
    ids = [attrs["id"] for _, attrs, _ in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    wanted = {attrs["href"].removeprefix("#") for attrs, _ in page.all("a")}
    wanted |= {attrs["aria-labelledby"] for _, attrs, _ in page.elements if "aria-labelledby" in attrs}
    assert wanted <= set(ids)


def test_landmarks_language_and_headings(page):
    assert [attrs.get("lang") for attrs, _ in page.all("html")] == ["en"]
    assert len(page.all("title")) >= 1
    for tag in LANDMARKS:
        assert [path[-1] for _, path in page.all(tag)] == ["body"], f"one <{tag}>, directly in the body"
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), levels


def test_pictures_are_told_or_hidden(page):
    for tag, attrs, path in page.elements:
        if tag != "svg" or "svg" in path:
            continue
        if attrs.get("aria-hidden") == "true":
            continue
        assert attrs.get("role") == "img"
        assert len(attrs.get("aria-label", "")) > 10, attrs


def test_tables_have_captions_and_scoped_headers(page):
    tables = len(page.all("table"))
    assert len(page.all("caption")) == tables
    assert all("scope" in attrs for attrs, _ in page.all("th"))
    for _, path in page.all("table"):
        assert path[-1] == "div", "a table scrolls inside of its own box"
    for attrs, _ in page.all("div"):
        if attrs.get("class") == "scroll":
            assert attrs["tabindex"] == "0"
            assert attrs["role"] == "region"
            assert attrs["aria-label"]


def test_status_is_in_words_not_by_colour_alone(page):
    words = "pass|warning|fail|not measured|KEEP|KEEP, with a warning|ROLLBACK|UNDECIDED|HALT"
    marked = sum(1 for _, attrs, _ in page.elements if "outcome" in attrs.get("class", "").split())
    spoken = sum(1 for tag, data in page.words if tag == "span" and (re.fullmatch(words, data) or "7*7" in data))
    assert spoken >= marked


# -- contrast --------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def schemes() -> dict[str, dict[str, str]]:
    style = report.html(certificate()).partition("<style>")[2].partition("</style>")[0]
    first, second = re.findall(r":root \{(.*?)\}", style, re.S)
    light = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", first))
    return {"light": light, "dark": {**light, **dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", second))}}


STATUS = ("keep", "warned", "rollback", "undecided")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(scheme):
    colours = schemes()[scheme]
    pairs = [("ink", "paper"), ("muted", "paper"), ("link", "paper"), ("ink", "panel"), ("muted", "panel")]
    pairs += [(f"heat-ink-{level}", f"heat-{level}") for level in range(7)]
    for status in STATUS:
        pairs += [(status, "paper"), (status, f"{status}-tint"), ("ink", f"{status}-tint")]
    pairs += [("muted", f"{status}-tint") for status in ("keep", "rollback")]
    low = {pair: round(contrast(*(colours[name] for name in pair)), 2) for pair in pairs}
    assert {pair: value for pair, value in low.items() if value < 4.5} == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_stand_out_in_both_schemes(scheme):
    colours = schemes()[scheme]
    assert contrast(colours["spikes"], colours["paper"]) >= 3
    assert all(contrast(colours[name], colours["rule"]) >= 3 for name in STATUS), "a bar on its track"
    assert contrast(colours["ink"], colours["bulk"]) >= 3, "the fitted curve over the bars"


# -- what it says ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "word", "told"),
    [
        ("rejected", "ROLLBACK", "was rejected: the loss rejects the change. It was taken back, bit for bit"),
        ("kept", "KEEP", "“rtn-int8-channel” is kept: no guard found harm in it."),
        ("undecided", "UNDECIDED", "cannot tell whether the change “rtn-int2-channel” does harm"),
        ("halted", "HALT", "could not be vouched for, and the guard stopped. Do not use this model."),
        ("nothing judged", "NOTHING JUDGED", "no change of its weights has been judged yet"),
    ],
)
def test_decision_comes_first_and_in_words(case, word, told):
    found = certificate(CASES[case]())
    text = Page(report.html(found)).text
    assert told in text
    assert text.index(f" {word} ") < text.index("What was not tested")
    assert f"**{word}.**" in report.markdown(found)
    assert report.summary(found)["decision"] == word


def test_kept_change_stays_in_the_subject_of_a_rollback():
    assert "Kept before: rtn-int8-channel." in Page(report.html(certificate())).text


def test_two_folders_are_named_by_both():
    found = kept()
    found["subject"][0]["name"] = found["predicate"]["steps"][0]["name"] = "model-int8"
    found["predicate"]["baseline"]["name"] = "model"
    found["predicate"]["cost"] = {"seconds": 40.8}
    text = Page(report.html(certificate(about_last(found)))).text
    assert "model-int8, changed from model" in text
    assert "The change from \u201cmodel\u201d to \u201cmodel-int8\u201d is kept" in text
    assert "Guarding took 40.8 s Processes 1" in text, "what was not measured of the cost is not told"


def test_partial_revert_names_what_was_taken_back():
    found = kept()
    found["predicate"]["steps"][0]["record"]["reverted"] = [f"layers.{i}.w" for i in range(6)]
    text = Page(report.html(certificate(about_last(found)))).text
    assert "6 tensors had to be taken back: layers.0.w, layers.1.w, layers.2.w, layers.3.w and 2 more." in text


def test_monitor_mode_says_that_the_change_is_still_there():
    found = changed_last(monitor=True, applied="kept")
    assert "the change is still in the model" in Page(report.html(certificate(found))).text


def test_every_guard_not_tested_and_digest_is_shown():
    found = with_loss("rejected")
    found["predicate"]["parent"] = {"sha256": "c0" * 32}
    built = certificate(found)
    text = Page(report.html(built)).text
    step = found["predicate"]["steps"][-1]
    wanted = [verdict["guard"] for verdict in step["verdicts"]] + found["predicate"]["not_tested"]
    wanted += [built.digest, built.model_digest, step["decision_digest"], step["evidence_digest"], "c0" * 32]
    wanted += [found["predicate"]["policy"]["digest"], "Not signed: anyone could have written this certificate."]
    wanted += [window["digest"] for window in found["predicate"]["windows"]]
    assert [item for item in wanted if item not in text] == []


def test_signed_certificate_names_its_key(tmp_path):
    signed = Certificate.load(certificate().save(tmp_path / "c.json", key=generate_key()))
    assert len(signed.signatures) == 1
    text = Page(report.html(signed)).text
    assert f"Signed with key {signed.signatures[0]}" in text
    assert "Not signed" not in text


def test_overridden_policy_is_listed():
    found = statement()
    resolved = found["predicate"]["policy"]["resolved"]
    resolved["sources"]["limits.divergence.kl"] = "user"
    resolved["limits"]["divergence"]["kl"] = 0.5
    text = Page(report.html(certificate(found))).text
    assert "with 1 value replaced by the user" in text
    assert "limits.divergence.kl 0.5" in text
    assert "No value of it was replaced" in Page(report.html(certificate())).text


def test_loss_is_drawn_against_its_limit():
    page = Page(report.html(certificate(with_loss("rejected"))))
    (told,) = [attrs["aria-label"] for attrs, _ in page.all("svg") if "loss" in attrs.get("class", "")]
    assert told == (
        "Change of the perplexity on the retain data. +8.89\u202f%, interval from +7.39\u202f% to +10.5\u202f%; "
        "the limit is +5\u202f%."
    )
    x = {attrs["class"]: float(attrs["x1"].rstrip("%")) for attrs, _ in page.all("line") if "class" in attrs}
    assert x["zero"] < x["limit"] < x["whisker fail"], "beyond the limit is to its right"


def test_metric_of_which_more_is_better_has_its_limit_below():
    changes = {"metric": "accuracy", "before": 0.9, "after": 0.85, "difference": -0.05, "lower": -0.08, "upper": -0.03}
    found = with_loss("rejected", None, **changes, sums={"higher_is_better": 1.0})
    page = Page(report.html(certificate(found)))
    x = {attrs["class"]: float(attrs["x1"].rstrip("%")) for attrs, _ in page.all("line") if "class" in attrs}
    assert x["whisker fail"] < x["limit"] < x["zero"]
    assert "accuracy" in page.text


def test_unmeasured_loss_gives_its_reason_and_no_picture():
    nothing = dict.fromkeys(("before", "after", "difference", "lower", "upper", "confidence", "effective_size"))
    found = with_loss("kept", kept(), **nothing, reason="12 windows of at least 50")
    page = Page(report.html(certificate(found)))
    assert "Not measured: 12 windows of at least 50." in page.text
    assert not [1 for attrs, _ in page.all("svg") if "loss" in attrs.get("class", "")]


def test_spectra_are_drawn_with_bulk_and_edges_before_and_after():
    found = statement()
    sketches = found["predicate"]["steps"][-1]["spectra"]
    page = Page(report.html(certificate(found)))
    drawn = [attrs["aria-label"] for attrs, _ in page.all("svg") if "spectrum" in attrs.get("class", "")]
    assert len(drawn) == len(sketches) == 3
    for item, told in zip(sketches, drawn, strict=True):
        assert item["matrix"] in told
        assert f"before: {item['before']['num_spikes']} singular value" in told
        assert sum(item["before"]["counts"]) == sum(item["after"]["counts"]) == min(item["shape"])
    assert len([1 for attrs, _ in page.all("line") if attrs.get("class") == "edge"]) == 6


def test_heat_map_is_a_table_of_layers_and_roles():
    found = statement()
    deltas = found["predicate"]["steps"][-1]["record"]["relative_delta"]
    page = Page(report.html(certificate(found)))
    text = page.text
    assert "layer q_proj k_proj v_proj o_proj gate_proj up_proj down_proj" in text
    shades = [attrs["class"] for attrs, path in page.all("td") if re.fullmatch(r"h\d", attrs.get("class", ""))]
    assert len(shades) == len(deltas), "a cell for every changed matrix"
    assert "h5" in shades


def test_heat_map_of_other_models():
    found = heat_map(
        {
            "transformer.h.0.attn.c_attn.weight": 0.3,
            "transformer.h.1.attn.c_attn.weight": None,
            "model.layers.2.mlp.experts.gate_up_proj[0]": 0.1,
            "model.layers.2.mlp.experts.gate_up_proj[7]": 2.0,
            "lm_head.weight": 0.0,
        },
        unchanged=["transformer.h.0.mlp.c_fc.weight"],
    )
    by_title = {stack.title: stack for stack in found.stacks}
    gpt2, moe = by_title["transformer.h"], by_title["model.layers"]
    assert gpt2.roles == ("c_attn", "c_fc")
    assert [[cell and cell.text for cell in row] for _, row in gpt2.rows] == [["30", "0"], ["new", None]]
    (cell,) = moe.rows[0][1]
    assert cell is not None
    assert (cell.text, cell.level, cell.count) == ("200", 6, 2), "the largest of the experts"
    assert [(name, cell.text) for name, cell in found.outside] == [("lm_head", "0")]


def test_training_windows_stand_together():
    found = kept()
    quiet = {**found["predicate"]["steps"][0], "name": "train", "kind": "train", "losses": [], "spectra": []}
    quiet["record"] = {**quiet["record"], "kind": "train"}
    steps = [{**quiet, "step": number} for number in (50, 100, 150)]
    found["predicate"]["steps"] = [*steps, *found["predicate"]["steps"]]
    text = Page(report.html(certificate(about_last(found)))).text
    assert "50\u2013150 train \u00d73" in text


# -- hostile and broken certificates ---------------------------------------------------------------


def test_no_text_of_a_certificate_becomes_markup():
    found = certificate(hostile())
    page = report.html(found)
    assert "<script" not in page
    assert "<img" not in page
    assert HOSTILE.split("\u202e")[0] in Page(page).text, "it is shown, as text"
    assert "\u202e" not in page, "what turns the direction of the text is not"
    assert "{{ 7*7 }}" in page, "nor a template"
    text = report.markdown(found)
    assert "<script" not in text.replace("\\<", "")
    assert "\u202e" not in text
    assert not [line for line in text.splitlines() if line.startswith("## head")]
    rows = [re.sub(r"\\.", "", line) for line in text.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} <= {5, 6}, "no cell breaks out of its column"


@pytest.mark.parametrize("path", ["steps", "readings", "policy", "cost", "windows"])
def test_misshapen_certificate_is_refused_in_a_sentence(path):
    found = statement()
    broken = {"steps": [{"name": "x"}], "readings": {"step-0-before": 3}, "policy": {"resolved": 4}}
    broken |= {"cost": {"checks": [1]}, "windows": [7]}
    found["predicate"][path] = broken[path]
    if path == "readings":
        found["predicate"]["steps"][-1]["judged_on"]["before"] = "step-0-before"
    try:
        page = report.html(certificate(found))
    except InputError as error:
        assert "cannot report on this certificate" in str(error)  # noqa: PT017 - either way nothing else escapes
    else:
        Page(page)


def test_numbers_are_typeset():
    assert [number(x) for x in (6.96e-06, -0.296, 198, None, "NaN", "Infinity", 1234567, 0.0)] == [
        "6.96\u00d710\u207b\u2076", "\u22120.296", "198", "\u2013", "NaN", "∞", "1\u202f234\u202f567", "0",
    ]  # fmt: skip


def test_session_leaves_its_report_beside_the_certificate(tmp_path):
    session = GuardSession(build("llama"), output_dir=tmp_path)
    with session.edit("nothing"):
        pass
    session.close()
    assert (tmp_path / "report.html").read_text() == report.html(Certificate.load(tmp_path / "certificate.json"))


def test_report_that_cannot_be_written_ends_no_session(tmp_path, caplog):
    session = GuardSession(build("llama"), output_dir=tmp_path)
    with session.edit("nothing") as step:
        pass
    (tmp_path / "report.html").mkdir()
    session.close()
    assert step.applied is not None
    assert "the report could not be written" in caplog.text
    assert (tmp_path / "certificate.json").is_file()


# -- command line ----------------------------------------------------------------------------------


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as left:
        main(["report", *map(str, arguments)])
    return left.value.code or 0


@pytest.fixture
def saved(tmp_path):
    return certificate().save(tmp_path / "certificate.json")


def test_verb_writes_beside_the_certificate_and_replaces_its_own(saved, capsys):
    assert run(saved) == 0
    page = saved.with_name("report.html")
    assert capsys.readouterr().out == f"ROLLBACK: wrote {page}\n"
    Page(page.read_text())
    assert run(saved, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["report"], told["status"], told["assurance"]) == (str(page), "rollback", "outputs-only")
    assert sorted(path.name for path in saved.parent.iterdir()) == ["certificate.json", "report.html"]
    assert run(saved, "--markdown", "-o", saved.with_name("deep") / "r.md") == 0
    assert run(saved, "--markdown", "-o", saved.with_name("deep") / "r.md") == 0
    assert "**ROLLBACK.**" in (saved.with_name("deep") / "r.md").read_text()


def test_verb_replaces_nothing_that_is_no_report(saved, capsys):
    before = saved.read_bytes()
    assert run(saved, "-o", saved) not in (0, 1)
    assert "is no report of weightproof" in capsys.readouterr().err
    assert saved.read_bytes() == before
    assert run(saved, "-o", saved.parent) not in (0, 1)
    assert run(saved, "--html", "--markdown") not in (0, 1)
    assert run(saved.with_name("none.json")) not in (0, 1)
    assert "none.json" in capsys.readouterr().err
    saved.with_name("other.txt").write_text("mine")
    assert run(saved, "-o", saved.with_name("other.txt"), "--force") == 0
