"""The attention viewer of a ViT-B/16 at 224 in a headless browser: size, opening time, frame time under the pointer.

python benchmarks/viewer.py
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import timm
import torch
from prisma_view import attention_page
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

import prisma_core as prisma

FOLLOW = """
const done = arguments[0], canvas = document.querySelector('#out .pad');
(async () => {
  const box = canvas.getBoundingClientRect(), times = [];
  for (let i = 0; i < 240; i++) {
    const start = performance.now();
    canvas.dispatchEvent(new PointerEvent('pointermove', { pointerType: 'mouse', bubbles: true,
      clientX: box.left + box.width * ((37 * i) % 240) / 240,
      clientY: box.top + box.height * ((11 * i) % 240) / 240 }));
    await new Promise(requestAnimationFrame);
    await new Promise((then) => setTimeout(then));
    times.push(performance.now() - start);
  }
  times.sort((a, b) => a - b);
  done([times[120], times[228], times[239]]);
})()
"""


def main() -> None:
    torch.manual_seed(0)
    upstream = timm.create_model("vit_base_patch16_224", pretrained=False).eval()
    for block in upstream.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.08)  # peaked patterns, as trained models have
    page = attention_page(prisma.adapt(upstream), torch.rand(1, 3, 224, 224), title="ViT-B/16", trained=False)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = page.save(Path(folder) / "page.html")
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for argument in ("headless=new", "no-sandbox", "disable-gpu", f"user-data-dir={folder}/profile"):
            options.add_argument(f"--{argument}")
        chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(shutil.which("chromedriver"))))
        try:
            opening = []
            for _ in range(5):
                chrome.get(path.as_uri())
                wait = WebDriverWait(chrome, 60, poll_frequency=0.02)
                wait.until(lambda c: c.execute_script("return document.documentElement.dataset.ready"))
                opening.append(chrome.execute_script("return performance.now()"))
            wait.until(lambda c: c.execute_script("return document.documentElement.dataset.unpacked"))
            median, late, worst = chrome.execute_async_script(FOLLOW)
        finally:
            chrome.quit()
    sys.stdout.write(
        f"{len(page.html) / 1e6:.1f} MB; shares within {page.pattern_error:.1e}, scores within {page.score_error:.1e}\n"
        f"open after {min(opening):.0f} to {max(opening):.0f} ms\n"
        f"a frame under the pointer: median {median:.0f} ms, 95 % {late:.0f} ms, largest {worst:.0f} ms\n"
    )


if __name__ == "__main__":
    main()
