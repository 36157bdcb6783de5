"""What /predict answers: the fused form's probabilities, whichever way images come, by one consistent set of clones."""

import base64
import io
import threading

import httpx
import pytest
import torch

import pnc
import small_pair
from pnc.data.image_files import decode
from pnc.data.image_set import images_as_float
from pnc.data.normalization import Normalization
from pnc.serving.deployment import Deployment, Target
from running_server import clone_file, deployment, image_bytes, running, served_target

IMAGES = image_bytes(7)


@pytest.fixture(scope="module")
def server():
    with running(deployment(None, "dog", "elk")) as found:
        yield found


def tensors(files=IMAGES):
    return images_as_float(decode(files, ["x"] * len(files), 1, (8, 8)))


def composite(*names):
    return pnc.attach(small_pair.target(), *(small_pair.clone(name).renamed(name) for name in names))


def form(files):
    return {"files": [("images", (f"{n}.png", one, "image/png")) for n, one in enumerate(files)]}


@pytest.mark.parametrize("n_images", [1, 3, 7])
def test_answers_are_those_of_the_fused_form_at_the_same_batch(server, n_images):
    found = httpx.post(f"{server.url}/predict", **form(IMAGES[:n_images])).json()
    assert found["batch"] == n_images and found["clones"] == ["dog", "elk"]
    net = composite("dog", "elk")
    with torch.inference_mode():
        expected = net.fused()(tensors(IMAGES[:n_images])).softmax(1)
    for number, (one, row) in enumerate(zip(found["predictions"], expected, strict=True)):
        scores = {entry["class"]: entry["probability"] for entry in one["classes"]}
        assert one["image"] == f"{number}.png"
        assert scores == dict(zip(net.classes, row.tolist(), strict=True)), "the same bits"
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
        owners = {entry["class"]: entry["clone"] for entry in one["classes"]}
        assert owners == {**dict.fromkeys(small_pair.BASE), "dog": "dog", "elk": "elk"}
        assert one["clone"] == one["classes"][0]["clone"]


def test_every_way_to_send_an_image_gives_the_same_answer(server):
    one = IMAGES[0]
    raw = server.post(one).json()["predictions"]
    encoded = base64.b64encode(one).decode()
    ways = [
        server.post(one, headers={"Content-Type": "image/png"}),
        httpx.post(f"{server.url}/predict", json={"image": encoded}),
        httpx.post(f"{server.url}/predict", json={"images": [f"data:image/png;base64,{encoded}"]}),
        httpx.post(f"{server.url}/predict", files={"anything": one}),
    ]
    for way in ways:
        (found,) = way.json()["predictions"]
        assert found["classes"] == raw[0]["classes"], way.request.headers["content-type"]


def test_top_and_clones_choose_what_is_answered(server):
    both = server.post(IMAGES[0], "?top=2").json()["predictions"][0]["classes"]
    assert len(both) == 2
    base = composite("dog")
    with torch.inference_mode():
        logits = base.fused()(tensors(IMAGES[:1]))
        alone = small_pair.target()(tensors(IMAGES[:1]))
    for query, classes, expected in (
        ("?clones=", small_pair.BASE, alone),
        ("?clones=dog", base.classes, logits),
        ("?clones=dog&clones=dog", base.classes, logits),
    ):
        found = server.post(IMAGES[0], query).json()["predictions"][0]["classes"]
        scores = {entry["class"]: entry["probability"] for entry in found}
        assert scores == pytest.approx(dict(zip(classes, expected.softmax(1)[0].tolist(), strict=True)), abs=1e-5)


def test_a_normalization_is_applied():
    shifted = Normalization(0.5, 0.25)
    target = served_target()
    found = Deployment(Target(target.module, target.classes, target.input_shape, shifted))
    with running(found) as server:
        answer = server.post(IMAGES[0]).json()["predictions"][0]["classes"]
    with torch.inference_mode():
        expected = target.module(shifted.apply(tensors(IMAGES[:1]))).softmax(1)[0]
    assert answer[0]["probability"] == pytest.approx(float(expected.max()), abs=1e-6)


def test_the_client_answers_like_the_library(server, tmp_path):
    from PIL import Image

    path = tmp_path / "large.png"
    Image.open(io.BytesIO(image_bytes(1, size=40)[0])).save(path)
    expected = pnc.predict(composite("dog", "elk"), path)[0]
    with server.client() as client:
        found = client.predict(path)[0]
        assert client.clones() == {"dog": ("dog",), "elk": ("elk",)} and client.is_ready()
        assert client.predict([path, IMAGES[0]], clones=[], top=1)[1].clone is None
    assert (found.image, found.label, found.clone) == (expected.image, expected.label, expected.clone)
    assert dict(found.probabilities) == pytest.approx(dict(expected.probabilities), abs=1e-5)
    assert found.owners == expected.owners


def test_images_of_many_clients_are_computed_together_and_answered_apart(server):
    apart = [server.post(one).json()["predictions"][0] for one in IMAGES]
    found, batches = [None] * 28, [0] * 28

    def ask(number):
        facts = server.post(IMAGES[number % 7]).json()
        found[number], batches[number] = facts["predictions"][0], facts["batch"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(28)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    for number, one in enumerate(found):
        for entry, expected in zip(one["classes"], apart[number % 7]["classes"], strict=True):
            assert entry["class"] == expected["class"]
            assert entry["probability"] == pytest.approx(expected["probability"], abs=1e-5)
    assert max(batches) > 1


def test_while_clones_come_and_go_every_answer_is_of_one_set():
    files = {name: clone_file(name) for name in ("dog", "elk")}
    with running(deployment(None, "dog")) as server:
        stop, wrong, seen = threading.Event(), [], set()

        def ask():
            with httpx.Client() as client:
                while not stop.is_set():
                    answer = client.post(f"{server.url}/predict?top=9", content=IMAGES[0])
                    facts = answer.json()
                    classes = {one["class"] for one in facts["predictions"][0]["classes"]}
                    if answer.status_code != 200 or classes != {*small_pair.BASE, *facts["clones"]}:
                        wrong.append(facts)
                    seen.add(tuple(facts["clones"]))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for one in threads:
            one.start()
        for _ in range(5):
            server.server.deployment.attach("elk", files["elk"])
            server.server.deployment.detach("elk")
        stop.set()
        for one in threads:
            one.join()
    assert not wrong
    assert seen <= {("dog",), ("dog", "elk")} and ("dog",) in seen


def test_a_composite_without_clones_is_the_target():
    with running(deployment()) as server:
        answer = server.post(IMAGES[0]).json()
    assert answer["clones"] == [] and answer["predictions"][0]["clone"] is None
