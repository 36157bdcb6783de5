"""The page of a server, used in headless Chromium: on a phone and a desk, light and dark."""

import base64
import json
import time

import pytest

from browser import CHROMIUM, browser
from pnc.serving.page import page
from running_server import TOKEN, clone_file, deployment, image_bytes, running

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
GIVE = """((id, name, data) => {
  const bytes = Uint8Array.from(atob(data), one => one.charCodeAt(0)), held = new DataTransfer();
  held.items.add(new File([bytes], name));
  const into = document.getElementById(id);
  if (id === 'drop') into.dispatchEvent(new DragEvent('drop', {dataTransfer: held, cancelable: true, bubbles: true}));
  else { into.files = held.files; into.dispatchEvent(new Event('change')); }
})(%s)"""


def test_the_page_is_one_small_file_that_runs_its_own_script_only():
    content, headers = page()
    text = content.decode()
    assert len(content) < 20_000 and "http" not in text and "innerHTML" not in text
    assert text.count("<script>") == text.count("<style>") == 1 and " style=" not in text and " onclick" not in text
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy


def give(chromium, where, name, content):
    data = base64.b64encode(content).decode()
    chromium.run(GIVE % ", ".join(map(json.dumps, (where, name, data))))


def text_of(chromium, where):
    return chromium.run(f"document.getElementById('{where}').textContent")


def wait_for(chromium, where, text):
    end = time.monotonic() + 10
    while text not in text_of(chromium, where):
        assert time.monotonic() < end, f"{where}: {text_of(chromium, where)!r}"
        time.sleep(0.02)


@needs_chromium
def test_images_are_classified_and_clones_switched_added_and_removed(tmp_path):
    with running(deployment(None, "dog")) as server, browser() as chromium:
        assert not chromium.look(server.url, 390, False)
        wait_for(chromium, "about", "The target knows ant, bee, cat.")
        give(chromium, "drop", "picture.png", image_bytes(1)[0])
        wait_for(chromium, "said", "Answered by")
        wait_for(chromium, "answer", "dog")
        assert chromium.run("document.querySelectorAll('#answer li').length") == 4
        shown = chromium.run(
            "[...document.querySelectorAll('#answer .number')].map(one => parseFloat(one.textContent))"
        )
        assert sum(shown) == pytest.approx(100, abs=0.3)
        chromium.run("document.querySelector('#clones input').click()")
        wait_for(chromium, "said", "Answered by the target itself.")
        assert "dog" not in text_of(chromium, "answer"), "a clone that is off answers nothing"
        chromium.run("document.querySelector('#clones input').click()")
        wait_for(chromium, "answer", "dog")

        give(chromium, "file", "<i>elk.safetensors", clone_file("elk"))
        assert chromium.run("document.getElementById('name').value") == "<i>elk"
        submit = "document.getElementById('add').requestSubmit()"
        chromium.run(submit)
        wait_for(chromium, "changed", "needs the server's token")
        assert chromium.complaints and all("401" in one for one in chromium.complaints), "the console's own line"
        chromium.complaints.clear()
        chromium.run(f"document.getElementById('token').value = '{TOKEN}'")
        chromium.run(submit)
        wait_for(chromium, "changed", "<i>elk is attached.")
        wait_for(chromium, "clones", "<i>elk")
        wait_for(chromium, "answer", "elk")
        for width in (390, 1200):
            chromium.picture(tmp_path / f"{width}.png", width)
        assert not chromium.faults()
        chromium.run("[...document.querySelectorAll('#clones button')].at(-1).click()")
        wait_for(chromium, "changed", "<i>elk is removed.")
        assert "elk" not in text_of(chromium, "clones")
        give(chromium, "image", "broken.png", b"no image")
        wait_for(chromium, "said", "not an image of a known format")


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1200, False)])
def test_the_page_fits(width, dark):
    names = "a clone with a long name and averyveryverylongwordthatcannotbebrokenanywhereatall"
    found = deployment()
    found.attach(names, clone_file("dog"))
    with running(found) as server, browser() as chromium:
        assert not chromium.look(server.url, width, dark)
        give(chromium, "drop", "picture.png", image_bytes(1, size=8)[0])
        wait_for(chromium, "said", "Answered by")
        chromium.run("document.querySelector('details').open = true")
        assert not chromium.faults()
