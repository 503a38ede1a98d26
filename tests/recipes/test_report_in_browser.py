"""The report of a run in headless Chromium: nothing is fetched, nothing overflows, every part opens and closes."""

import fcntl
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffdfkd.engine.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SETTLED = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done({}))))"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")


class Browser:
    """One tab of a headless Chromium, driven by its DevTools protocol over a pair of pipes."""

    def __init__(self, profile: Path) -> None:
        # Far from 3 and 4, which are to be Chromium's ends.
        pairs = [tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in os.pipe()) for _ in range(2)]
        (theirs_in, self._to), (self._from, theirs_out) = pairs

        def ends() -> None:
            os.dup2(theirs_in, 3)
            os.dup2(theirs_out, 4)

        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        assert CHROMIUM is not None
        self._process = subprocess.Popen(
            [CHROMIUM, *flags, "about:blank"], preexec_fn=ends, pass_fds=(3, 4), stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._unread, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            assert select.select([self._from], [], [], 30)[0], "Chromium does not answer"
            block = os.read(self._from, 2**20)
            assert block, "Chromium has ended"
            self._unread += block
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def open(self, page: Path, width: int, scheme: str) -> None:
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def ask(self, expression: str) -> Any:
        """Value of an expression in the page, awaited where it is a promise."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def click(self, element: str) -> None:
        """A mouse click into the middle of the element that the expression names, scrolled into view."""
        self.ask(f"{element}.scrollIntoView({{block: 'center', inline: 'center'}})")
        where = self.ask(f"(box => [box.x + box.width / 2, box.y + box.height / 2])({element}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], button="left", clickCount=1)
        self.ask(SETTLED)

    def fetched(self) -> list[str]:
        """Addresses that were asked for, but for what the page holds itself."""
        events = (event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [url for event in events if not (url := event["request"]["url"]).startswith("data:")]

    def complaints(self) -> list[Any]:
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event["params"] for event in self.events if event["method"] in kinds]

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.ask("document.documentElement.scrollWidth - innerWidth")

    def close(self) -> None:
        self._session = ""
        self.call("Browser.close")
        self._process.wait(timeout=20)
        os.close(self._to)
        os.close(self._from)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, finished_run: tuple[Path, dict[str, Any]]) -> Path:
    """Of a finished run, one of whose classes has a name that no line can hold."""
    folder = Path(shutil.copytree(finished_run[0], tmp_path_factory.mktemp("report") / "run"))
    for name in ("recipe.yaml", "result.json", "preview/preview.json"):
        path = folder / name
        path.write_text(path.read_text().replace("Coat", "Coat" + 90 * "m"))
    return write_report(folder)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_report_in_a_browser(browser: Browser, report: Path, width: int, scheme: str) -> None:
    browser.open(report, width, scheme)
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == (
        "rgb(251, 250, 248)" if scheme == "light" else "rgb(22, 23, 26)"
    )
    assert browser.overflow() <= 0
    folds = browser.ask("[...document.querySelectorAll('details')].map(fold => fold.open)")
    assert folds.count(True) >= 9 and folds.count(False) >= 3
    # All closed, the inner ones first, and then all opened, the outer ones first.
    for wanted, order in ((False, range(len(folds) - 1, -1, -1)), (True, range(len(folds)))):
        for index in order:
            fold = f"document.querySelectorAll('details')[{index}]"
            if browser.ask(f"{fold}.open") != wanted:
                browser.click(f"{fold}.querySelector('summary')")
            assert browser.ask(f"{fold}.open") is wanted
        assert browser.overflow() <= 0

    links = browser.ask("[...document.querySelectorAll('nav a')].map(link => link.getAttribute('href'))")
    assert len(links) == browser.ask("document.querySelectorAll('.part').length") >= 9
    for index, link in enumerate(links):
        browser.ask("scrollTo(0, 0)")
        browser.click(f"document.querySelectorAll('nav a')[{index}]")
        assert browser.ask("location.hash") == link
        title = f"document.querySelector('{link} > summary').getBoundingClientRect()"
        # In view, and not under the bar of contents.
        assert browser.ask(f"document.querySelector('nav').getBoundingClientRect().bottom <= {title}.top + 1")
        assert browser.ask(f"{title}.bottom <= innerHeight")
        assert browser.ask("document.querySelector('nav').getBoundingClientRect().top >= 0")
    assert browser.fetched() == [report.as_uri()]
    assert browser.complaints() == []


def test_what_is_wrong_with_a_page_is_noticed(browser: Browser, report: Path, tmp_path: Path) -> None:
    page = tmp_path / "wrong.html"
    wrong = '<img src="none.png"><p style="width:400px">wide</p><script>console.error("odd")</script></main>'
    page.write_text(report.read_text().replace("</main>", wrong))
    browser.open(page, 360, "light")
    assert browser.fetched() == [page.as_uri(), (tmp_path / "none.png").as_uri()]
    assert browser.overflow() > 0
    assert any("odd" in json.dumps(complaint) for complaint in browser.complaints())
