"""The page as a browser and a program meet it: served, asked, and every mistake as a message."""

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_model import write_tiny_model
from tiny_source import TinySource

from cogvlm_hpe import HeadPose, cli, page
from cogvlm_hpe.headpose import Reading
from launcher.comm import single
from shards.index import open_set
from shards.write import build


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, HeadPose, Path, Path]]:
    """(address of the page, its model, an image, the model's shard set)."""
    pytest.importorskip("gradio", reason="SKIPPED: no gradio here (extra gradio)")
    place = tmp_path_factory.mktemp("page")
    build(TinySource(samples=8), place / "set", single(), 5)
    model = HeadPose.from_pretrained(write_tiny_model(place / "base", place / "set", steps=60))
    image = place / "0.jpg"
    image.write_bytes(open_set(place / "set").read(0).image)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("http_proxy", "http://127.0.0.1:9")  # one that does not answer: the page needs none
        patch.delenv("no_proxy", raising=False)
        with page.serving(lambda: model, to_pick=[image]) as url:
            yield url, model, image, place / "set"


def _shown(reading: Reading) -> list[object]:
    box = ",".join(f"{side:.1f}" for side in reading.box)
    return [reading.yaw, reading.pitch, reading.roll, None, reading.answer, reading.reason, box]


@pytest.mark.slow
def test_the_page_answers_as_the_model_does(served: tuple[str, HeadPose, Path, Path]) -> None:
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    url, model, image, shard_set = served
    assert url.startswith("http://127.0.0.1:")
    client = Client(url, verbose=False, analytics_enabled=False)
    box = tuple(round(side) for side in open_set(shard_set).record(0).heads[0].bbox)
    drawn, table = client.predict(handle_file(str(image)), ",".join(map(str, box)), api_name="/read")
    [reading] = model(image, [box])
    assert table["data"] == [_shown(reading)] and reading.reason is None
    before, after = (np.array(Image.open(path).convert("RGB")).astype(int) for path in (image, drawn))
    assert before.shape == after.shape and abs(before - after).max() > 100
    thing = open_set(shard_set).record(0).objects[0].expression
    _, table = client.predict(handle_file(str(image)), thing, api_name="/find")
    assert table["data"] == [_shown(one) for one in model(image, expression=thing)] != []
    width, height = Image.open(image).size
    for wrong, said in ((f"0,0,{width + 1},5", f"{width} x {height} pixels"), ("1,2", "four numbers")):
        with pytest.raises(AppError, match=said):
            client.predict(handle_file(str(image)), wrong, api_name="/read")
    with pytest.raises(AppError, match="no picture yet"):
        client.predict(None, "head", api_name="/find")
    (image.parent / "text.jpg").write_text("not a picture")
    with pytest.raises(AppError, match=r"text\.jpg: not an image"):
        client.predict(handle_file(str(image.parent / "text.jpg")), "head", api_name="/find")


def test_two_clicks_make_a_box_and_a_third_begins_another() -> None:
    first = page.add_corner("", 30, 40)
    whole = page.add_corner(first, 10, 50)
    assert (first, whole, page.add_corner(whole, 7, 8)) == ("30,40", "10,40,30,50", "7,8")


def test_mistakes_are_told_before_the_model_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["predict", "--gradio", "--model", "none"]
    monkeypatch.setenv("no_proxy", "")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gradio", None)
        assert cli.main(ask) == 2
    assert '.venv/bin/pip install -c constraints.txt -e ".[gradio]"' in capsys.readouterr().err
    assert cli.main([*ask, "--out", "a.png"]) == 2
    assert "--out a.png: the page of --gradio draws for itself" in capsys.readouterr().err
    pytest.importorskip("gradio", reason="SKIPPED: no gradio here (extra gradio)")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert cli.main([*ask, "--port", port]) == 2
    said = capsys.readouterr().err
    assert f"--port {port}: cannot be used" in said and said.count("\n") == 1
    assert cli.main([*ask, "--port", "70000"]) == 2
