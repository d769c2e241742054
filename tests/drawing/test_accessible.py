"""The page for everybody: axe-core finds nothing, texts of the drawing have contrast, and labels tell where and what."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from browser import needs_chromium
from page_states import STATES, opened

pytestmark = needs_chromium
needs_axe = pytest.mark.skipif(find_spec("axe_selenium_python") is None, reason="pip install axe-selenium-python (of the extra test)")

# The contrast of each text of the drawing with what is behind it, which axe-core does not measure in SVG.
CONTRAST = """
const scale = (text, i) => (text.startsWith("color(") && i < 3 ? 255 : 1);
const channels = (text) => text.match(/[\\d.]+/g).map((one, i) => Number(one) * scale(text, i));
const over = (front, alpha, back) => front.slice(0, 3).map((one, i) => one * alpha + back[i] * (1 - alpha));
const linear = (c) => (c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
const light = (rgb) => rgb.map((one) => linear(one / 255)).reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
const contrast = (a, b) => (Math.max(light(a), light(b)) + .05) / (Math.min(light(a), light(b)) + .05);
const page = channels(getComputedStyle(document.body).backgroundColor);
const painted = (rect, back) => {
  const style = getComputedStyle(rect), fill = channels(style.fill);
  return over(fill, (fill[3] ?? 1) * Number(style.fillOpacity), back);
};
return [...document.querySelectorAll("#graph text")].map((text) => {
  let back = page;
  for (let at = text.parentElement, around = []; at; at = at.parentElement) {
    if (at.id === "scene") { for (const rect of around.reverse()) back = painted(rect, back); break; }
    const rects = [...at.children].filter((child) => child.tagName === "rect" && !child.hasAttribute("aria-hidden"));
    around.push(...rects.reverse());
  }
  return [text.textContent, contrast(channels(getComputedStyle(text).fill), back)];
});
"""


@needs_axe
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("state", list(STATES))
def test_nothing_is_found(state: str, theme: str, folder: Path) -> None:
    from axe_selenium_python import Axe  # type: ignore[import-not-found]  # noqa: PLC0415 (the extra has it)

    page = opened(folder, state, theme)
    axe = Axe(page.driver)
    axe.inject()
    found = [(rule["id"], node["html"], node["failureSummary"]) for rule in axe.run()["violations"] for node in rule["nodes"]]
    assert found == []
    poor = [(text, round(ratio, 2)) for text, ratio in page.run(CONTRAST) if ratio < 4.5]
    assert poor == [] and len(page.run(CONTRAST)) > 5


def test_labels_tell_where_and_what(folder: Path) -> None:
    page = opened(folder, "unfolded", "light")
    told = "return [...document.querySelectorAll('[data-key]')].map((one) => [one.dataset.key, one.getAttribute('aria-label')])"
    labels = dict(page.run(told))
    assert labels["h.3.ln1"] == "h.3.ln1, LayerNorm, 2x7x16, hidden_dropout 0.1"
    assert labels["h.3.qkv"] == "h.3.qkv, Linear, 2x7x48, weight: weight_l2 0.0001"
    assert labels["h.3/"].startswith("h.3, Block, 20 nodes, unfolded, hidden_dropout at 4, weight_l2 at 4")
    chosen = "h.3.ln1, LayerNorm, 2x7x16, hidden_dropout 0.1"
    assert page.run("return document.getElementById('graph').getAttribute('aria-label')") == f"graph, chosen: {chosen}"
    assert page.text("said") == chosen and page.run("return document.getElementById('chosen').dataset.key") == "h.3.ln1"
    page.press("\ue00c")
    assert page.text("said") == ""
