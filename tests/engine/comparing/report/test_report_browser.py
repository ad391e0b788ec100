"""The report as a browser lays it out: no broken image, no sideways scrolling, nothing injected."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cdpo.engine.comparing.report.page import render_report

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
        if (found := shutil.which(name))
    ),
    None,
)
WIDTHS = (1280, 768, 400, 360)

# The page goes into frames of each width, since a window cannot be made narrower than 500 px.
PROBE = """<!doctype html><title>probe</title><body><script>
const page = PAGE;
function look(width) {
  return new Promise(done => {
    const frame = document.createElement("iframe");
    frame.style.cssText = `width: ${width}px; height: 900px; border: 0`;
    frame.onload = () => {  // after all images
      const inner = frame.contentDocument, root = inner.documentElement;
      const images = [...inner.images];
      const wide = [...inner.body.querySelectorAll("*")].filter(element =>
        !element.parentElement.closest(".scroll, svg, .unseen") &&
        !element.matches(".unseen") &&
        element.getBoundingClientRect().right > root.clientWidth + 0.5);
      done({
        width: frame.contentWindow.innerWidth,
        images: images.length,
        broken: images.filter(image => !image.naturalWidth).length,
        wide: wide.slice(0, 5).map(element => element.outerHTML.slice(0, 120)),
        scrolls: root.scrollWidth > root.clientWidth,
        title: inner.title,
        scripts: inner.scripts.length,
      });
    };
    frame.srcdoc = page;
    document.body.append(frame);
  });
}
(async () => {
  const seen = [];
  for (const width of WIDTHS) seen.push(await look(width));
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(seen);
  document.body.replaceChildren(result);
})();
</script></body>"""


def browse(page: str, folder: Path) -> list[dict[str, Any]]:
    """What the probe saw at each width."""
    assert CHROMIUM is not None
    # Without the policy, so that only the escaping stands between a prompt and the page.
    page = re.sub(r"<meta http-equiv=\"Content-Security-Policy\".*?>", "", page)
    # </script> inside a JSON string would end the probe's own script.
    literal = json.dumps(page).replace("</", "<\\/").replace("<!--", "<\\!--")
    probe = folder / "probe.html"
    probe.write_text(PROBE.replace("WIDTHS", str(list(WIDTHS))).replace("PAGE", literal))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=20000",
        "--dump-dom",
        probe.as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'<pre id="result">(.*?)</pre>', dom, re.DOTALL)
    assert found, f"the probe did not finish: {dom[-500:]}"
    seen: list[dict[str, Any]] = json.loads(html.unescape(found[1]))
    return seen


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")


@pytest.mark.long
@needs_chromium
@pytest.mark.parametrize("size", [32, 512])
def test_layout_images_and_injection(tmp_path, report, size):
    seen = browse(render_report(report(size=size)), tmp_path)
    assert [view["width"] for view in seen] == list(WIDTHS)
    for view in seen:
        assert view["images"] > 60
        assert view["broken"] == 0
        assert view["wide"] == [] and not view["scrolls"]
        assert view["title"].startswith("emoji_cdpo") and view["scripts"] == 0


@pytest.mark.long
@needs_chromium
def test_layout_of_several_runs(tmp_path, methods):
    for view in browse(render_report(methods(distance=0.1)), tmp_path):
        assert view["images"] == 2 * 4 * 3 + 2 and view["broken"] == 0
        assert view["wide"] == [] and not view["scrolls"]
        assert view["title"].startswith("methods: base against plain") and view["scripts"] == 0


@pytest.mark.long
@needs_chromium
def test_the_probe_would_notice(tmp_path):
    page = (
        "<html><head><title>ok</title></head><body><div style='width: 900px'>wide</div>"
        "<img src='data:image/png;base64,AAAA'><script>document.title = 'pwned'</script>"
        "</body></html>"
    )
    wide, *_, narrow = browse(page, tmp_path)
    assert narrow["scrolls"] and narrow["wide"] and not wide["wide"]
    assert narrow["broken"] == 1 and narrow["title"] == "pwned"
