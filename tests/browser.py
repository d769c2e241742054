"""Debian's Chromium, headless, for the page: one session for all tests of a process."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no Chromium here (Debian: chromium and chromium-driver)")


@functools.cache
def chromium() -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1300,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.binary_location = str(BROWSER)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


def quit_chromium() -> None:
    """A worker of pytest-xdist runs nothing of ``atexit``: what is not ended with the tests goes on."""
    if chromium.cache_info().currsize:
        chromium().quit()


VISIBLE = """
const {scene, data} = graphreg, open = (key) => key in data.boxes && scene.opened.has(key);
const fits = {
  "": () => true, ".open": open, ".thing": (key) => !open(key),
  ".lit": (key) => key in scene.shown, ".chosen": (key) => key === scene.chosen,
};
return Object.keys(scene.places).filter((key) => key !== "/" && fits[arguments[0]](key));
"""


class Page:
    """A page that is open. Each call fails where the page has told of an error."""

    def __init__(self, path: Path) -> None:
        self.driver = chromium()
        self.driver.get_log("browser")
        self.driver.get(path.as_uri())

    def run(self, script: str, *values: Any) -> Any:
        """What a JavaScript function's body returns."""
        found = self.driver.execute_script(script, *values)
        assert self.driver.get_log("browser") == []
        return found

    def text(self, name: str) -> str:
        return str(self.run("return document.getElementById(arguments[0]).textContent", name))

    def type(self, name: str, text: str) -> None:
        """Type into a field, key by key, in the place of what stands there."""
        field = self.driver.find_element("id", name)
        field.clear()
        field.send_keys(text)

    def press(self, *keys: str) -> None:
        self.run("document.getElementById('graph').focus()")
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def things(self, more: str = "") -> list[str]:
        """The keys of what is visible, in view or not, ``more`` narrowing it down: ``.open``, ``.thing``, ``.lit`` or ``.chosen``."""
        return list(self.run(VISIBLE, more))
