"""Opens MLflow's pages in Chromium and prints how long each took, as JSON: what -> seconds. See compare_runs.py.

python benchmarks/compare_runs_browser.py URL EXPERIMENT RUN...
"""

import json
import os
import sys
import time
from urllib.parse import quote

from playwright.sync_api import sync_playwright

REPEATS = 3
PATIENCE_MS = 120_000
SELECTED = 200
"""Runs on the page that compares."""
PAGE = 100
"""Runs that the table loads at once."""


def main() -> None:
    url, experiment, *runs = sys.argv[1:]
    chosen = runs[:SELECTED]
    compare = f"runs={quote(json.dumps(chosen))}&experiments={quote(json.dumps([experiment]))}"
    pages = {
        "page: table of runs": (f"experiments/{experiment}/runs", f"{min(len(runs), PAGE)} matching runs"),
        f"page: comparing {len(chosen)} runs": (f"compare-runs?{compare}", f"Comparing {len(chosen)} Runs"),
        "page: curves of a run": (f"experiments/{experiment}/runs/{runs[0]}/model-metrics", "by_"),
        "page: versions of the model": ("models/lightship-demo", f"Version {len(runs)}"),
    }
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ.get("CHROMIUM"), args=["--no-sandbox"])
        waits: dict[str, list[float]] = {}
        for what, (path, text) in pages.items():
            for _ in range(REPEATS):
                page = browser.new_page(viewport={"width": 1600, "height": 1200})
                start = time.monotonic()
                page.goto(f"{url}/#/{path}")
                page.get_by_text(text, exact=False).first.wait_for(timeout=PATIENCE_MS)
                waits.setdefault(what, []).append(time.monotonic() - start)
                page.close()
        browser.close()
    print(json.dumps(waits))


if __name__ == "__main__":
    main()
