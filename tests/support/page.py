"""A page as a test reads it, and as a browser shows it."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

VOID = {"meta", "br"}


class Checker(HTMLParser):
    """Collects elements and notices those that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.found.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.found.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def words(self):
        return " ".join(" ".join(self.text).split())


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """
<!doctype html><body><script>
addEventListener('load', function () {
  var found = [].map.call(document.querySelectorAll('iframe'), function (frame) {
    var root = frame.contentDocument.documentElement, style = frame.contentWindow.getComputedStyle;
    var shown = [].filter.call(root.querySelectorAll('svg.chart'), function (svg) { return svg.clientWidth > 0; });
    var text = root.querySelector('svg.chart.wide text, svg.chart text');
    return {width: root.clientWidth, needs: root.scrollWidth, charts: shown.map(function (s) { return s.clientWidth; }),
            page: style(root.querySelector('body')).backgroundColor, buttons: root.querySelectorAll('button').length};
  });
  document.body.dataset.found = JSON.stringify(found);
});
</script>FRAMES</body>"""


def looked_at(page, folder, dark):
    """What headless Chromium shows of a page on a phone and on a wide screen, without complaints or overflow."""
    sizes = (390, 1200)
    frames = "".join(f'<iframe src="{page}" width="{w}" height="800"></iframe>' for w in sizes)
    (folder / "probe.html").write_text(PROBE.replace("FRAMES", frames))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    command += ["--enable-logging=stderr", f"--blink-settings=preferredColorScheme={int(not dark)}"]
    command += [f"--user-data-dir={folder / 'profile'}", f"file://{folder / 'probe.html'}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in result.stderr, result.stderr
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', result.stdout)[1]))
    for size, frame in zip(sizes, found, strict=True):
        assert frame["width"] <= size and frame["needs"] <= frame["width"], frame
        assert frame["page"] == ("rgb(20, 23, 26)" if dark else "rgb(251, 251, 250)"), frame
        frame["size"] = size
    return found
