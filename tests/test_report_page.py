"""The report in a real browser: a headless Chromium that the machine has."""

import os
import shutil

import pytest
from small_run import ANSWERS, GAMES, write_run

from spin_trl.report import write_report


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "</script><script>window.hurt = 1</script><img src=x onerror='window.hurt = 2'>"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
    with api.sync_playwright() as playwright:
        # As root, as in a container, Chromium runs without its sandbox or not at all.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_report(browser, tmp_path):
    """A factory of pages that show the report of a small run. What a page complains of is an error at the end."""
    complaints, contexts = [], []

    def open_page(width: int = 1280, scheme: str = "light", **run):
        store = write_run(tmp_path / f"run-{len(contexts)}", **run)
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if "file:" not in request.url else None)
        page.goto(write_report(store.output_dir, pictures=False).as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def many(number: int) -> dict:
    games = [(f"What is {n}?", f"It is the number {n}.") for n in range(number)]
    return {"games": games, "answers": {0: ["No idea."] * number, 1: [truth for _, truth in games]}}


def test_it_shows_prompts_beside_what_every_iteration_answered_and_marks_what_differs_word_by_word(open_report):
    page = open_report()
    cards = page.locator(".prompt")
    assert cards.count() == 2
    first = cards.first
    assert first.locator("h3").inner_text() == "Prompt of row 10" and GAMES[0][0] in first.inner_text()
    titles = [title.split(" (")[0] for title in first.locator("h4").all_inner_texts()]
    assert titles == ["Ground truth", "Iteration 0", "Iteration 1"] and "cut off" in first.inner_text()
    answers = first.locator(".side")
    assert answers.nth(1).locator("ins").all_inner_texts() == ["London."]
    assert answers.nth(1).locator("del").all_inner_texts() == ["Paris."]
    assert answers.nth(2).locator("ins, del").count() == 0
    assert page.locator("#scores svg").count() == 2


@pytest.mark.parametrize("before", ["", "Paris, capital of France: "])
def test_it_marks_characters_where_a_script_writes_no_spaces(open_report, before):
    page = open_report(games=[("法国的首都?", before + "首都是巴黎。")], answers={0: [before + "首都是伦敦。"]})
    side = page.locator(".side").nth(1)
    assert side.locator("ins").all_inner_texts() == ["伦敦"] and side.locator("del").all_inner_texts() == ["巴黎"]


def test_search_filters_and_pages(open_report):
    page = open_report(**many(25))
    assert page.locator(".prompt").count() == 10
    assert page.locator("#page").inner_text() == "Page 1 of 3"
    page.get_by_role("button", name="Next").click()
    assert page.locator(".prompt h3").first.inner_text() == "Prompt of row 20"
    page.get_by_label("Search").fill("IT IS THE NUMBER 17.")
    assert page.locator(".prompt").count() == 1 and page.locator("#count").inner_text() == "1 of 25 prompts"
    assert page.get_by_role("button", name="Next").is_disabled()
    page.get_by_label("Search").fill("nowhere")
    assert page.locator(".prompt").count() == 0
    page.get_by_label("Search").fill("")
    page.get_by_label("1", exact=True).uncheck()
    assert page.locator(".prompt").first.locator("h4").all_inner_texts() == ["Ground truth", "Iteration 0 (cut off)"]
    page.get_by_label("Show").select_option("equal")
    assert page.locator(".prompt").count() == 0
    page.get_by_label("1", exact=True).check()
    assert page.locator("#count").inner_text() == "25 of 25 prompts"


def test_the_values_of_a_chart_are_shown_under_the_pointer_and_by_keys(open_report):
    page = open_report()
    chart = page.locator("#scores .chart").first
    chart.locator("svg").hover(position={"x": 5, "y": 50})
    assert chart.locator(".readout").inner_text() == "after iteration start: nll 1"
    page.mouse.move(0, 0)
    assert chart.locator(".readout").inner_text() == ""
    chart.locator("svg").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert chart.locator(".readout").inner_text() == "after iteration 0: nll 0.5"


@pytest.mark.parametrize("width", [320, 1280])
def test_no_page_is_wider_than_the_screen(open_report, width):
    long_word = "Donaudampfschifffahrtsgesellschaftskapitän" * 4
    answers = {i: [long_word[::-1]] for i in range(6)}
    page = open_report(width, games=[(long_word, long_word)], answers=answers, model=long_word)
    page.evaluate("document.querySelectorAll('details').forEach((details) => details.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_in_both_schemes(open_report, scheme):
    page = open_report(scheme=scheme)
    ratios = page.evaluate(CONTRASTS)
    assert len(ratios) == 8
    assert min(ratios.values()) >= 4.5, ratios  # WCAG 2, level AA


def test_markup_in_data_is_inert(open_report):
    page = open_report(
        games=[(HOSTILE, HOSTILE), ("b", HOSTILE)],
        answers={0: ["ok " + HOSTILE, HOSTILE], 1: [HOSTILE] * 2},
        config={HOSTILE: HOSTILE, "output_dir": HOSTILE},
    )
    assert page.locator(".prompt .text").first.inner_text() == HOSTILE
    assert page.locator("img").count() == 0
    assert page.evaluate("window.hurt === undefined")


def test_not_even_a_script_that_gets_in_would_run(open_report, browser, tmp_path):
    # The last line of defence: the policy allows the page's own script by its hash, and no other.
    path = write_report(write_run(tmp_path / "pierced").output_dir, pictures=False)
    path.write_text(path.read_text().replace("<main>", f"<main>{HOSTILE}"))
    page = browser.new_page()
    page.goto(path.as_uri())
    assert page.evaluate("window.hurt === undefined") and page.locator(".prompt").count() == len(ANSWERS[0])
    page.close()


# Contrast of each colour of text with what it stands on, from the style as the browser computed it.
CONTRASTS = """
() => {
  const light = (colour) => {
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
    const [r, g, b] = parts.map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    const colour = getComputedStyle(node).backgroundColor;
    return colour !== "rgba(0, 0, 0, 0)" ? colour : behind(node.parentElement);
  };
  const found = {};
  for (const name of ["h1", ".quiet", "nav a", ".tiles dt", ".side h4", ".side.truth h4", "ins", "del"]) {
    const node = document.querySelector(name);
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))];
    found[name] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }
  return found;
}
"""
