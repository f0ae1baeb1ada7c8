"""The page in a browser: a person clicks, writes nonsense, and meets titles that are programs."""

import importlib.util
import shutil
import time

import pytest


MISSING = [name for name in ("gradio", "selenium") if importlib.util.find_spec(name) is None]
MISSING += [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"THE DEMO'S PAGE IS NOT TESTED: {', '.join(MISSING)} not installed here"
)
PATIENCE = 30


@pytest.fixture(scope="module")
def address(showcase):
    from mmesid.trainer.demo.page import build_page, launch

    page = build_page(showcase, "<i>Tiny</i>", top_k=6)
    launch(page, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield page.local_url
    page.close()


class Browser:
    def __init__(self, address: str):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1400"):
            options.add_argument(flag)
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)
        self.driver.get(address)

    def texts(self, css: str) -> list[str]:
        """What the elements say, read at one moment: the page replaces them at every answer."""
        script = "return [...document.querySelectorAll(arguments[0])].map((one) => one.innerText)"
        return self.driver.execute_script(script, css)

    def wait(self, css: str, count: int, text: str = "") -> list[str]:
        """What so many elements say, once there are so many that hold the text."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            found = [one for one in self.texts(css) if text in one]
            if len(found) == count:
                return found
            time.sleep(0.1)
        raise AssertionError(f"{self.texts(css)} of {css}, not {count} with '{text}'")

    def click(self, css: str, place: int = 0) -> None:
        from selenium.common.exceptions import StaleElementReferenceException

        for _ in range(20):
            try:
                return self.driver.find_elements("css selector", css)[place].click()
            except StaleElementReferenceException:
                time.sleep(0.1)

    def write(self, css: str, text: str) -> None:
        field = self.driver.find_element("css selector", f"{css} textarea, {css} input")
        field.clear()
        field.send_keys(text)


@pytest.fixture(scope="module")
def browser(address):
    browser = Browser(address)
    yield browser
    browser.driver.quit()


def test_clicks_lead_from_items_to_recommendations_and_their_reasons(browser):
    browser.wait("#found button", 18)
    browser.click("#found button")
    browser.wait("#history button", 1)
    browser.wait("#ranking li", 6)
    browser.click("#ranking .mm-item", 2)
    browser.wait("#history button", 2)
    browser.wait("#ranking .mm-legend span", 4)
    before = browser.wait("#ranking li", 6)
    browser.click("#sources input")
    browser.wait("#ranking .mm-legend span", 3)
    assert browser.wait("#ranking li", 6) != before
    browser.click("#ranking .mm-link")
    browser.wait("#kin h3", 2)
    browser.click("#history button")
    browser.wait("#history button", 1)
    browser.click("#clear")
    browser.wait("#history button", 0)
    browser.click("#sources input")


def test_wrong_input_shows_a_sentence(browser):
    browser.write("#words", "zebra")
    browser.wait("#found .mm-sentence", 1, "No item has 'zebra'")
    browser.write("#ids", "i7 <script>\n")
    browser.wait("#said .mm-sentence", 1, "Item id '<script>' is not in this model's catalogue")
    browser.click("#clear")
    browser.wait("#said .mm-sentence", 0)


def test_titles_that_are_programs_do_nothing(browser):
    browser.write("#ids", "i1 i2 i3 i4\n")
    browser.wait("#history button", 4)
    browser.wait("#history button", 1, "<script>window.harm='script'</script>")
    browser.wait("#ranking li", 6)
    browser.click("#ranking .mm-link")
    browser.wait("#kin h3", 2)
    script = """for (const one of document.querySelectorAll('button')) {
        one.dispatchEvent(new Event('mouseover')); one.focus();
    }
    return window.harm ?? 'none'"""
    assert browser.driver.execute_script(script) == "none"
    assert not [entry for entry in browser.driver.get_log("browser") if entry["level"] == "SEVERE"]
