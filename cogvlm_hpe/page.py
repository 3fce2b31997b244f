"""`cogvlm-hpe predict --gradio`: a page of this machine's own on which one boxes a head and sees its pose."""

import argparse
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.request import getproxies

from cogvlm_hpe import pictures, predict
from launcher.errors import UsageError, UserError

if TYPE_CHECKING:
    import gradio
    import numpy as np

    from cogvlm_hpe.headpose import HeadPose

_HOST = "127.0.0.1"
_COLUMNS = ("yaw", "pitch", "roll", "confidence", "answer", "reason", "box")


def run(args: argparse.Namespace) -> int:
    """Show the page until Ctrl-C. Raises UsageError without gradio or a free port, UserError for model and images."""
    from cogvlm_hpe.headpose import HeadPose

    def load() -> HeadPose:
        return HeadPose.from_pretrained(
            args.model, args.adapter, device=args.device, dtype=args.dtype, tokenizer=args.tokenizer, decode=args.decode
        )

    to_pick = [path for path in pictures.find(args.image) if path.suffix.lower() not in pictures.VIDEOS]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uploads are deleted then too
    with suppress(KeyboardInterrupt), serving(load, args.port, to_pick) as url:
        print(f"{url} shows the page, on this machine only; Ctrl-C ends it", flush=True)
        signal.pause()
    return 0


@contextmanager
def serving(load: "Callable[[], HeadPose]", port: int = 0, to_pick: Sequence[Path] = ()) -> Iterator[str]:
    """The page's address, while it is served on this machine alone. Port 0: any that is free.

    load: gives the model; called once gradio and the port are there. to_pick: images offered besides uploads.
    Raises UsageError without gradio or where `port` is taken.
    """
    _prepare()
    port = _free_port(port)
    model = load()
    # Not gradio's own folder in the temporary one, which all users of a machine would share and which is never emptied.
    with TemporaryDirectory(prefix="cogvlm-hpe-page-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page = build(model, to_pick)
        try:
            # Said though some are gradio's defaults: its environment variables would win over those.
            _, url, _ = page.launch(
                server_name=_HOST, server_port=port, share=False, ssr_mode=False, mcp_server=False, run_history=False,
                enable_monitoring=False, footer_links=[], prevent_thread_lock=True, quiet=True,
            )  # fmt: skip
            yield url
        finally:
            page.close(verbose=False)
            del os.environ["GRADIO_TEMP_DIR"]


def build(model: "HeadPose", to_pick: Sequence[Path] = ()) -> "gradio.Blocks":
    """The page, not yet served; programs ask it by `/read` (picture, box) and `/find` (picture, expression)."""
    import gradio as gr

    read, find, click = _handlers(model)
    with gr.Blocks(title="cogvlm-hpe", analytics_enabled=False) as page:
        with gr.Row():
            with gr.Column():
                gr.Markdown("**Picture**: click on two opposite corners of a head's box")
                picture = gr.Image(type="filepath", sources=["upload", "clipboard"], buttons=[], show_label=False)
            with gr.Column():
                gr.Markdown("**Pose**: blue points out of the face")
                drawn = gr.Image(format="jpeg", interactive=False, buttons=["download", "fullscreen"], show_label=False)
        # Gradio would open the file itself, and meet one that is no image with a traceback.
        picture.preprocess = lambda payload: payload and payload.path
        with gr.Row(equal_height=True):
            box = gr.Textbox(label="Box: x0,y0,x1,y1 in pixels")
            reading = gr.Button("Read this head", variant="primary")
            expression = gr.Textbox("head", label="What to find")
            finding = gr.Button("Find the heads")
        table = gr.Dataframe(headers=list(_COLUMNS), interactive=False, buttons=[], show_label=False)
        if to_pick:
            gr.Examples([[str(path)] for path in to_pick], picture, label="Pictures to pick", cache_examples=False)
        # One question at a time: all are of one model.
        one: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
        reading.click(read, [picture, box], [drawn, table], api_name="read", **one)
        finding.click(find, [picture, expression], [drawn, table], api_name="find", **one)
        picture.select(click, [picture, box], [box, drawn, table], api_visibility="private", **one)
        picture.change(lambda: ("", None, None), None, [box, drawn, table], api_visibility="private")
    return page


def _handlers(model: "HeadPose") -> tuple[Callable, Callable, Callable]:
    """What happens on reading a box, on finding heads, and on a click into the picture."""
    import gradio as gr

    def read(path: str | None, box: str) -> tuple[Any, ...]:
        with _as_message():
            return _answer(model, path, box, None)

    def find(path: str | None, expression: str) -> tuple[Any, ...]:
        with _as_message():
            drawn, rows = _answer(model, path, None, expression)
        if not rows:
            gr.Warning(f"no {expression} found")
        return drawn, rows

    def click(path: str | None, box: str, event: gr.SelectData) -> tuple[Any, ...]:
        box = add_corner(box, *event.index)
        whole = box.count(",") == 3
        return (box, *(read(path, box) if whole else (gr.skip(), gr.skip())))

    return read, find, click


def add_corner(box: str, x: float, y: float) -> str:
    """`x,y` of a first click; after it, of a second one, the box `x0,y0,x1,y1` between both."""
    with suppress(ValueError):
        first_x, first_y = (float(part) for part in box.split(","))
        sides = (min(first_x, x), min(first_y, y), max(first_x, x), max(first_y, y))
        return ",".join(f"{side:g}" for side in sides)
    return f"{x:g},{y:g}"


def _answer(
    model: "HeadPose", path: str | None, box: str | None, expression: str | None
) -> "tuple[np.ndarray, list[list[Any]]]":
    if path is None:
        raise UserError("no picture yet: upload one")
    picture = next(pictures.read(Path(path)))
    boxes = None if box is None else [predict.parse_box(box)]
    height, width = picture.pixels.shape[:2]
    for one in boxes or ():
        predict.check_inside(one, width, height)
    rows = predict.judge(model, picture, boxes, expression)
    said = [row | {"box": ",".join(f"{side:.1f}" for side in row["box"])} for row in rows]
    return predict.draw(picture.pixels, rows), [[row.get(name) for name in _COLUMNS] for row in said]


@contextmanager
def _as_message() -> Iterator[None]:
    import gradio as gr

    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from None


def _prepare() -> None:
    """Gradio can be imported, and calls nobody. Raises UsageError."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # At its start it asks its own page, which a proxy for all else would not find.
    os.environ["no_proxy"] = ",".join(filter(None, (getproxies().get("no"), _HOST)))
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise UsageError('--gradio: needs gradio; .venv/bin/pip install -c constraints.txt -e ".[gradio]"') from None


def _free_port(port: int) -> int:
    try:
        with socket.create_server((_HOST, port)) as server:
            return server.getsockname()[1]
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"--port {port}: cannot be used ({error}); name another one, or 0 for any that is free"
        ) from None
