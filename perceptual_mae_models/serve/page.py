"""The layout of the try-it page, in gradio: which control calls what of `bench.Workbench`."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from torch import Tensor

from perceptual_mae_models.images import ImageError
from perceptual_mae_models.serve.assets import CSS, PAINT, PICK
from perceptual_mae_models.serve.bench import Workbench, mask_text
from perceptual_mae_models.serve.hosts import OwnPagesOnly, bracketed, own_names
from perceptual_mae_models.serve.markup import message, note, painter, sample_buttons
from perceptual_mae_models.serve.uploads import MAX_BYTES, MAX_PIXELS, keepable, open_upload

# Before gradio is imported, which reads it then: a page on somebody's machine reports to nobody.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

RANDOM, PAINTED = "At random", "By painting"
MEAN = "Mean of heads"
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # gradio's own would come from Google
NO_IMAGE = "Choose an image first."
IDLE_SECONDS = 3600
"""After this a visitor's image and uploads are forgotten."""
SESSIONS = 100
"""Visitors whose image is kept, up to 13 MB each; the oldest go first."""


@dataclass(frozen=True)
class Session:
    """What the server keeps of a visitor.

    Attributes:
        picture: The image, RGB, at most `uploads.KEPT_SIDE` on its shorter side.
        painted: A digit a patch, 1 hidden.
    """

    picture: Image.Image
    painted: str


class Page:
    """The page's answers to its controls; gradio calls these methods.

    Args:
        bench: Computes.
        samples: Images to pick, by name, RGB.
    """

    def __init__(self, bench: Workbench, samples: Mapping[str, Image.Image]) -> None:
        self.bench = bench
        self.samples = list(samples.items())

    def show(self, image: Image.Image, text: str, mode: str, percent: float, seed: float, head: str) -> list[Any]:
        """Fill the page with an image: session, message, painter, reconstruction, maps, neighbours."""
        rows, columns = self.bench.grid
        session = Session(keepable(image), "0" * (rows * columns))
        return [
            session,
            message(text),
            self.paint_html(session),
            self.rebuild(session, mode, percent, seed),
            self.maps(session, head),
            self.bench.neighbours(image),
        ]

    def pick(self, mode: str, percent: float, seed: float, head: str, event: gr.EventData) -> list[Any]:
        """A sample was picked."""
        name, image = self.samples[int(event.index) % len(self.samples)]
        return self.show(image, f"Sample: {name}", mode, percent, seed, head)

    def upload(self, file: str | None, mode: str, percent: float, seed: float, head: str) -> list[Any]:
        """A file was uploaded; what was shown stays if it is no image."""
        if file is None:
            return [gr.skip()] * 7
        try:
            image = open_upload(file)
        except ImageError as error:
            return [gr.skip(), message(f"This file was refused. {error}", error=True), *[gr.skip()] * 4, None]
        name = os.path.basename(file)  # noqa: PTH119  a name of somebody else's system
        text = f"{name}: {image.width} x {image.height} pixels"
        return [*self.show(image, text, mode, percent, seed, head), None]  # None: the place is free for the next file

    def rebuild(self, session: Session | None, mode: str, percent: float, seed: float | None) -> str:
        """The reconstruction under the mask that the controls describe."""
        if session is None:
            return message(NO_IMAGE, error=True)
        try:
            painted = mode == PAINTED
            hidden = self.bench.painted_mask(session.painted) if painted else self._random_mask(percent, seed)
        except ValueError as error:
            return message(str(error), error=True)
        return self.bench.reconstruction(session.picture, hidden)

    def painted(self, session: Session | None, event: gr.EventData) -> tuple[Session | None, str]:
        """A stroke on the painter ended."""
        if session is None:
            return None, message(NO_IMAGE, error=True)
        try:
            cells = str(event.cells)
            hidden = self.bench.painted_mask(cells)
        except (AttributeError, ValueError) as error:
            return session, message(str(error), error=True)
        return replace(session, painted=cells), self.bench.reconstruction(session.picture, hidden)

    def start_painting(
        self, session: Session | None, percent: float, seed: float | None, keep: bool
    ) -> tuple[Session | None, str, str]:
        """The painter with nothing hidden, or with what the random mask hides."""
        if session is None:
            return None, "", message(NO_IMAGE, error=True)
        try:
            hidden = self._random_mask(percent if keep else 0, seed)
        except ValueError as error:
            return session, self.paint_html(session), message(str(error), error=True)
        session = replace(session, painted=mask_text(hidden))
        return session, self.paint_html(session), self.bench.reconstruction(session.picture, hidden)

    def _random_mask(self, percent: float, seed: float | None) -> Tensor:
        return self.bench.random_mask(percent / 100, int(seed or 0))

    def paint_html(self, session: Session) -> str:
        """The painter with the session's mask."""
        hidden = [cell == "1" for cell in session.painted]
        return painter(self.bench.picture(session.picture), self.bench.grid, hidden)

    def maps(self, session: Session | None, head: str) -> str:
        """The maps for a choice of head."""
        if session is None:
            return message(NO_IMAGE, error=True)
        try:
            return self.bench.maps(session.picture, None if head == MEAN else int(head.rpartition(" ")[2]) - 1)
        except ValueError as error:
            return message(str(error), error=True)


def build(bench: Workbench, samples: Mapping[str, Image.Image]) -> gr.Blocks:
    """Lay out the page.

    Args:
        bench: Computes.
        samples: Images to pick, by name, RGB; the first is shown at the start.
    """
    page = Page(bench, samples)
    # Uploads lie in a temporary folder of gradio's until then.
    with gr.Blocks(title="Perceptual MAE", analytics_enabled=False, delete_cache=(600, IDLE_SECONDS)) as blocks:
        gr.HTML(
            "<h1>Perceptual MAE</h1><p>Hide patches of an image, see them rebuilt, and see what the encoder makes of"
            " it. Everything is computed on the machine that serves this page.</p>",
            elem_classes="pmae-head",
        )
        session = gr.State(None, time_to_live=IDLE_SECONDS)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                picked, file, told = _choose_image(page)
                mode, percent, seed, strokes, clear, copy, button = _choose_mask(page)
            # One beneath another and not in tabs, of which a telephone hides all but the first.
            with gr.Column(scale=5, min_width=320):
                _heading("Rebuilt")
                rebuilt = gr.HTML(elem_id="pmae-rebuilt")
                _heading("Attention and features")
                heads = [MEAN, *(f"Head {number}" for number in range(1, bench.heads + 1))]
                head = gr.Radio(heads, value=MEAN, label="Attention of", elem_id="pmae-head")
                maps = gr.HTML(elem_id="pmae-maps")
                _heading("Nearest neighbours")
                neighbours = gr.HTML(elem_id="pmae-neighbours")
        controls = [mode, percent, seed, head]
        filled = [session, told, strokes, rebuilt, maps, neighbours]
        picked.select(page.pick, controls, filled, api_visibility="private")
        file.upload(page.upload, [file, *controls], [*filled, file], api_visibility="private")
        button.click(page.rebuild, [session, mode, percent, seed], rebuilt, api_visibility="private")
        head.change(page.maps, [session, head], maps, api_visibility="private")
        strokes.input(page.painted, session, [session, rebuilt], api_visibility="private")
        for pressed, keep in ((clear, False), (copy, True)):
            kept = gr.State(keep)
            pressed.click(
                page.start_painting,
                [session, percent, seed, kept],
                [session, strokes, rebuilt],
                api_visibility="private",
            )
        if page.samples:
            name, first = page.samples[0]

            def begin(mode: str, percent: float, seed: float, head: str) -> list[Any]:
                return page.show(first, f"Sample: {name}", mode, percent, seed, head)

            blocks.load(begin, controls, filled, api_visibility="private")
    return blocks


def _choose_image(page: Page) -> tuple[gr.HTML, gr.File, gr.HTML]:
    picked = gr.HTML(sample_buttons(dict(page.samples)), js_on_load=PICK, visible=bool(page.samples))
    limits = f"{MAX_BYTES // 2**20} MB, {MAX_PIXELS / 1e6:.0f} million pixels at most"
    file = gr.File(label=f"Your image ({limits})", file_types=["image"], height=170, elem_id="pmae-upload")
    return picked, file, gr.HTML(elem_id="pmae-message")


def _choose_mask(page: Page) -> tuple[Any, ...]:
    ratio = round(100 * page.bench.methods[0].network.mask_ratio)
    mode = gr.Radio([RANDOM, PAINTED], value=RANDOM, label="Hide patches")
    with gr.Group() as at_random:
        percent = gr.Slider(0, 100, value=ratio, step=1, label="Hidden, %", info=f"pretraining hid {ratio} %")
        seed = gr.Number(0, label="Seed", info="the same seed hides the same patches", precision=0, minimum=0)
    with gr.Column(visible=False) as by_painting:
        gr.HTML(note("Drag over patches to hide them. A stroke that starts on a hidden patch shows patches again."))
        strokes = gr.HTML(js_on_load=PAINT, elem_id="pmae-painter")
        with gr.Row():
            clear = gr.Button("Clear", size="sm", min_width=80)
            copy = gr.Button("Random mask", size="sm", min_width=80)
    button = gr.Button("Rebuild", variant="primary")

    def switch(chosen: str) -> tuple[Any, Any]:
        return gr.update(visible=chosen == RANDOM), gr.update(visible=chosen == PAINTED)

    mode.change(switch, mode, [at_random, by_painting], api_visibility="private")
    return mode, percent, seed, strokes, clear, copy, button


def _heading(text: str) -> None:
    gr.HTML(f"<h2>{text}</h2>", elem_classes="pmae-head")


def launch(blocks: gr.Blocks, host: str, port: int, block: bool = True, names: Sequence[str] = ()) -> str:
    """Serve the page until interrupted.

    Args:
        blocks: Of `build`.
        host: Address to bind to.
        port: 0 lets gradio choose a free one.
        block: False returns at once; the page is served by a thread then.
        names: Further names that it answers to, see `own_names`.

    Returns:
        The address of the page.

    Raises:
        OSError: If the port is taken, or the address not this machine's.
    """
    own = own_names(host, names)
    guards = [Middleware(OwnPagesOnly)]
    if own:
        guards.append(Middleware(TrustedHostMiddleware, allowed_hosts=own))
    theme = gr.themes.Default(font=FONT, font_mono=("ui-monospace", "monospace"), primary_hue="blue")
    try:
        _, address, _ = blocks.launch(
            server_name=bracketed(host),
            server_port=port or None,
            share=False,
            max_file_size=MAX_BYTES,
            enable_monitoring=False,
            state_session_capacity=SESSIONS,
            footer_links=[],
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            theme=theme,
            css=CSS,
            app_kwargs={"middleware": guards},
        )
    except OSError as error:  # gradio's own message speaks of its settings, not of ours
        raise OSError(
            f"cannot listen at {host}, port {port} ({error}): choose another with --port, or with --host an address of"
            " this machine"
        ) from error
    if block:
        print(f"{address} (stop with Ctrl-C)", flush=True)
        try:
            blocks.block_thread()
        finally:  # also on SIGTERM: uploads go with it
            blocks.close()
    return str(address)
