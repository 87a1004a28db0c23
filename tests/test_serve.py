"""The try-it page: what it computes against independent computations, what it refuses, and the page in a browser."""

import asyncio
import http.client
import shutil
import socket
import struct
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA
from torch import Tensor

from perceptual_mae_models import cli, reconstruction
from perceptual_mae_models.autoencoder import (
    build_autoencoder,
    given_masking,
    hidden_pixels,
    random_masking,
    unpatchify,
)
from perceptual_mae_models.commands.serve import _read_folder
from perceptual_mae_models.features import FeatureBatch, FeatureExtractor
from perceptual_mae_models.gallery import nearest
from perceptual_mae_models.images import ImageError, find_images, open_image
from perceptual_mae_models.reconstruction import middle, open_shipped, rebuild, shipped_autoencoders
from perceptual_mae_models.serve import uploads
from perceptual_mae_models.serve.bench import Workbench, mask_text
from perceptual_mae_models.serve.hosts import OwnPagesOnly, is_loopback, own_names
from perceptual_mae_models.serve.maps import attention_map, feature_maps, pca_map, principal_components
from perceptual_mae_models.serve.markup import Figure, figures, message
from perceptual_mae_models.serve.neighbours import NeighbourIndex
from perceptual_mae_models.serve.samples import samples
from perceptual_mae_models.serve.uploads import keepable, open_upload
from perceptual_mae_models.vision_transformer_pmae import decoder_beside
from perceptual_mae_models.weights import CheckpointError

EMBEDDED = "vit_pico_patch8_pmae.mae_imagenette"


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return samples()["chelsea"]


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench()


@pytest.fixture(scope="module")
def index(photos: Path) -> NeighbourIndex:
    extractor = FeatureExtractor(EMBEDDED, device="cpu")
    return NeighbourIndex(extractor, extractor.stream(find_images([photos]), batch_size=10), photos)


def test_a_given_mask_is_what_the_random_one_is() -> None:
    expected = random_masking(torch.rand(3, 16), 0.6)
    given = given_masking(expected.mask.bool())
    assert torch.equal(given.mask, expected.mask)
    assert torch.equal(given.ids_keep, expected.ids_keep.sort(dim=1).values)
    places = torch.cat([given.ids_keep, given.mask.nonzero()[:, 1].reshape(3, -1)], dim=1)
    assert torch.equal(places.gather(1, given.ids_restore), torch.arange(16).expand(3, 16))
    with pytest.raises(ValueError, match="same number"):
        given_masking(torch.eye(2, 4).cumsum(dim=1))


@pytest.mark.parametrize("multi_scale", [False, True])
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_any_mask_can_be_rebuilt(multi_scale: bool, norm_pix_loss: bool) -> None:
    """From nothing hidden to everything; the order of visible patches changes nothing."""
    encoder = timm.create_model("vit_pico_patch8_pmae", img_size=32, embed_dim=24, depth=3, num_heads=2)
    sizes = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}
    network = build_autoencoder(encoder, **sizes, mask_ratio=0.75, multi_scale=multi_scale).eval()
    images = torch.rand(2, 3, 32, 32)
    for count in (0, 1, 7, 15, 16):
        mask = torch.zeros(2, 16, dtype=torch.bool)
        mask[0, torch.randperm(16)[:count]] = True
        mask[1, :count] = True
        views = rebuild(network, images, given_masking(mask), norm_pix_loss=norm_pix_loss)
        hidden = unpatchify(mask.unsqueeze(-1).expand(-1, -1, 64), 8, (4, 4)).expand_as(images)
        assert torch.equal(hidden_pixels(mask, 8, (4, 4)).expand_as(images), hidden)
        assert torch.equal(views.pasted[~hidden], images[~hidden])
        assert torch.equal(views.pasted[hidden], views.rebuilt[hidden])
        assert torch.isfinite(views.rebuilt).all()
        assert len(views.coarse) == (3 if multi_scale else 0)
    noise = torch.rand(2, 16)
    expected = rebuild(network, images, random_masking(noise, 0.6), norm_pix_loss=norm_pix_loss)
    again = rebuild(network, images, given_masking(random_masking(noise, 0.6).mask), norm_pix_loss=norm_pix_loss)
    torch.testing.assert_close(again.rebuilt, expected.rebuilt, atol=1e-5, rtol=0)


def test_standardised_patches_take_mean_and_deviation_from_the_original(photograph: Image.Image) -> None:
    network, recipe = open_shipped(EMBEDDED)
    assert recipe["norm_pix_loss"]
    image = middle(photograph, network.image_size).unsqueeze(0)
    mask = torch.rand(1, 64, generator=torch.Generator().manual_seed(0)) < 0.7
    views = rebuild(network, image, given_masking(mask), norm_pix_loss=True)
    with torch.no_grad():
        latent, skips = network.encode(image, given_masking(mask).ids_keep)
        pred = network.decode(latent, skips, given_masking(mask).ids_restore)[0][0].numpy()
    original = ((image - network.mean) / network.std)[0].numpy()
    for number in range(64):
        top, left = 8 * (number // 8), 8 * (number % 8)
        patch = original[:, top : top + 8, left : left + 8]
        made = pred[number].reshape(8, 8, 3).transpose(2, 0, 1) * patch.std(ddof=1) + patch.mean()
        made = made * network.std[0].numpy() + network.mean[0].numpy()
        shown = views.rebuilt[0, :, top : top + 8, left : left + 8].numpy()
        np.testing.assert_allclose(shown, made.clip(0, 1), atol=1e-4)


def test_shipped_autoencoders_are_discovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert EMBEDDED in shipped_autoencoders()
    assert open_shipped("vit_pico_patch8_pmae")[0].patch_size == 8
    with pytest.raises(FileNotFoundError, match="no decoder"):
        open_shipped("vit_tiny_patch16_pmae")

    file = Path(timm.models.get_pretrained_cfg(EMBEDDED).file)
    assert decoder_beside(file).is_file()
    monkeypatch.setattr(reconstruction, "decoder_beside", lambda _: tmp_path / "none")
    assert shipped_autoencoders() == []
    with pytest.raises(ValueError, match="nothing can be rebuilt"):
        Workbench()


def test_broken_decoder_files_are_refused(tmp_path: Path) -> None:
    encoder = timm.create_model(EMBEDDED)
    whole = decoder_beside(Path(timm.models.get_pretrained_cfg(EMBEDDED).file))
    tensors, recipe = (
        load_file(whole),
        '{"decoder_dim": 128, "decoder_depth": 2, "decoder_heads": 4, "mask_ratio": 0.5}',
    )
    file = tmp_path / "decoder.safetensors"
    for metadata, message_part in (({}, "recipe"), ({"recipe": "{"}, "recipe"), ({"recipe": "{}"}, "decoder_dim")):
        save_file(tensors, file, metadata)
        with pytest.raises(CheckpointError, match=message_part):
            reconstruction.load_autoencoder(encoder, file)
    save_file({name: tensor for name, tensor in tensors.items() if name != "mask_token"}, file, {"recipe": recipe})
    with pytest.raises(CheckpointError, match="mask_token"):
        reconstruction.load_autoencoder(encoder, file)
    file.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no weight file"):
        reconstruction.load_autoencoder(encoder, file)


def test_masks_of_the_page(bench: Workbench) -> None:
    for ratio, count in ((0, 0), (0.75, 48), (1, 64)):
        mask = bench.random_mask(ratio, 3)
        assert mask.shape == (8, 8)
        assert int(mask.sum()) == count
    assert torch.equal(bench.random_mask(0.5, 7), bench.random_mask(0.5, 7))
    assert not torch.equal(bench.random_mask(0.5, 7), bench.random_mask(0.5, 8))
    painted = bench.painted_mask("01" + "0" * 62)
    assert painted.nonzero().tolist() == [[0, 1]]
    assert torch.equal(bench.painted_mask(mask_text(bench.random_mask(0.3, 1))), bench.random_mask(0.3, 1))
    for wrong in ("", "0" * 63, "0" * 63 + "2"):
        with pytest.raises(ValueError, match="64 digits"):
            bench.painted_mask(wrong)
    for ratio, seed in ((-0.1, 0), (1.1, 0), (0.5, -1), (0.5, 2**63)):
        with pytest.raises(ValueError, match="lies"):
            bench.random_mask(ratio, seed)


def test_painted_patches_are_hidden_and_no_others(bench: Workbench, photograph: Image.Image) -> None:
    painted = bench.painted_mask("0" * 10 + "11" + "0" * 52)  # row 1, columns 2 and 3
    shown = bench.reconstruct(photograph, painted)
    original, masked, rebuilt = (figure.image for figure in shown[:3])
    assert isinstance(original, Tensor)
    hidden = torch.zeros(64, 64, dtype=torch.bool)
    hidden[8:16, 16:32] = True
    for image in (masked, rebuilt):
        assert torch.equal(image[:, ~hidden], original[:, ~hidden])
        assert (image[:, hidden] != original[:, hidden]).float().mean() > 0.9
    assert len(shown) == 2 + len(shipped_autoencoders())
    assert "2 of 64" in shown[1].note
    assert "norm_pix_loss" in bench.reconstruction(photograph, painted)
    assert "Everything is hidden" in bench.reconstruction(photograph, torch.ones(8, 8, dtype=torch.bool))
    assert "Nothing is hidden" in bench.reconstruction(photograph, torch.zeros(8, 8, dtype=torch.bool))


def test_attention_equals_what_the_block_computes(bench: Workbench, photograph: Image.Image) -> None:
    network = bench.methods[0].network
    pixels = network.standardise(middle(photograph, network.image_size).unsqueeze(0))
    found = feature_maps(network.encoder, pixels)
    assert found.attention.shape == (1, 3, 65)
    torch.testing.assert_close(found.attention.sum(dim=-1), torch.ones(1, 3))

    other = timm.create_model(EMBEDDED, pretrained=True).eval()
    attn, seen = other.blocks[-1].attn, []
    attn.fused_attn = False  # timm's own softmax then passes through attn_drop
    attn.attn_drop.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        tokens = other.forward_features(pixels)
    torch.testing.assert_close(found.attention, seen[0][:, :, 0])
    torch.testing.assert_close(found.tokens, tokens[:, 1:], atol=1e-4, rtol=1e-4)

    patches = seen[0][0, 1, 0, 1:].reshape(8, 8)
    heat = attention_map(found.attention[0], (8, 8), head=1)
    assert heat.shape == (3, 8, 8)
    # Brighter is more attention, everywhere on the scale.
    order = patches.flatten().argsort()
    brightness = (heat * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=0).flatten()[order]
    assert (brightness.diff() >= -1e-6).all()
    mean = found.attention.mean(dim=1)
    torch.testing.assert_close(attention_map(found.attention[0], (8, 8)), attention_map(mean, (8, 8), head=0))
    with pytest.raises(ValueError, match="heads 1 to 3"):
        attention_map(found.attention[0], (8, 8), head=3)


def test_pca_equals_scikit_learn(bench: Workbench, photograph: Image.Image) -> None:
    network = bench.methods[0].network
    tokens = feature_maps(network.encoder, network.standardise(middle(photograph, (64, 64)).unsqueeze(0))).tokens[0]
    scores, explained = principal_components(tokens)
    oracle = PCA(n_components=3, svd_solver="full").fit(tokens.double().numpy())
    expected = oracle.transform(tokens.double().numpy())
    signs = np.sign((scores.numpy() * expected).sum(axis=0))
    np.testing.assert_allclose(scores.numpy() * signs, expected, atol=1e-3)
    np.testing.assert_allclose(explained.numpy(), oracle.explained_variance_ratio_, atol=1e-5)
    colours, _ = pca_map(tokens, (8, 8))
    assert colours.shape == (3, 8, 8)
    torch.testing.assert_close(colours.amin(dim=(1, 2)), torch.zeros(3))
    torch.testing.assert_close(colours.amax(dim=(1, 2)), torch.ones(3))
    torch.testing.assert_close(
        colours.flatten(1).T[5], (scores[5] - scores.amin(0)) / (scores.amax(0) - scores.amin(0))
    )
    flat, _ = pca_map(torch.ones(64, 192), (8, 8))
    assert torch.isfinite(flat).all()


def test_neighbours_are_those_of_the_gallery(index: NeighbourIndex, photos: Path, photograph: Image.Image) -> None:
    extractor = index.extractor
    corpus = list(extractor.stream(find_images([photos])))
    for image in (photograph, Image.open(find_images([photos])[4])):
        query = FeatureBatch(("a query",), extractor([image]), ())
        (expected,) = nearest(query, corpus, 8)
        found = index.nearest(image, 8)
        assert [match.name for match in found] == [match.name for match in expected]
        np.testing.assert_allclose([m.similarity for m in found], [m.similarity for m in expected], atol=1e-5)
    assert found[0].similarity == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="could be read"):
        NeighbourIndex(extractor, [], photos)


def test_neighbours_on_the_page(index: NeighbourIndex, photograph: Image.Image, tmp_path: Path) -> None:
    shown = Workbench(index=index).neighbours(photograph)
    assert shown.count("<figure>") == 8
    assert "24 images" in shown
    assert "pmae serve --folder" in Workbench().neighbours(photograph)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises pixels and holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"no image", "broken, or not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "broken, or not an image"),
        (png_header(100_000, 100_000), "too many pixels"),
        (png_header(10_000, 10_000), "100 million pixels; at most 64"),
        (png_header(5_000, 100), "a strip"),
        (png_header(0, 5), "broken"),
        (png_header(90, 90), "truncated"),
    ],
)
def test_what_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "upload.png"
    file.write_bytes(content)
    with pytest.raises(ImageError, match=reason) as caught:
        open_upload(file)
    assert caught.value.name == "upload.png"
    assert str(tmp_path) not in str(caught.value)


def test_large_and_missing_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "upload.bmp"
    Image.new("RGB", (40, 30)).save(file)
    assert open_upload(file).size == (40, 30)
    monkeypatch.setattr(uploads, "MAX_BYTES", 3000)
    with pytest.raises(ImageError, match="at most 0 MB"):
        open_upload(file)
    with pytest.raises(ImageError, match="No such file"):
        open_upload(tmp_path / "none.png")


def test_what_is_of_two_formats_is_read_as_what_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "upload.png"
    Image.new("RGB", (8, 8), "red").save(file)
    plugins = dict(Image.OPEN)
    # a plugin that is asked first, and takes every file for a strip
    strip = (lambda *_: Image.new("RGB", (1, 5000)), None)
    monkeypatch.setattr(Image, "ID", ["STRIP", *Image.ID])
    monkeypatch.setattr(Image, "OPEN", {"STRIP": strip, **plugins})
    assert open_image(file).size == (1, 5000)
    assert open_upload(file).size == (8, 8)
    monkeypatch.setattr(uploads, "open_image", lambda opened: Image.new("RGB", (1, 5000)))
    with pytest.raises(ImageError, match="a strip"):
        open_upload(file)


def test_other_sites_pages_are_refused() -> None:
    async def page(scope: Any, receive: Any, send: Any) -> None:
        answered.append(200)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answered.append(message["status"])

    for method, headers, status in (
        ("POST", {"host": "127.0.0.1:7860", "origin": "https://evil.example"}, 403),
        ("POST", {"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:7860"}, 200),
        ("POST", {"host": "inside:80", "origin": "https://demo.example", "sec-fetch-site": "same-origin"}, 200),
        ("POST", {"host": "127.0.0.1:7860", "sec-fetch-site": "cross-site"}, 403),
        ("POST", {"host": "127.0.0.1:7860"}, 200),  # a program
        ("POST", {"host": "127.0.0.1:7860", "origin": "null"}, 403),
        ("GET", {"host": "127.0.0.1:7860", "sec-fetch-site": "cross-site"}, 200),
    ):
        answered: list[int] = []
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": method, "headers": raw}
        asyncio.run(OwnPagesOnly(page)(scope, page, send))
        assert answered == [status], (method, headers)


def test_names_of_a_page() -> None:
    assert own_names("127.0.0.1", ["demo.example"])[:2] == ["127.0.0.1", "localhost"]
    assert "demo.example" in own_names("127.0.0.1", ["demo.example"])
    assert own_names("0.0.0.0") == []
    assert own_names("0.0.0.0", ["demo.example"]) == ["demo.example"]


def test_what_a_session_keeps_is_small(photograph: Image.Image) -> None:
    assert keepable(Image.new("RGB", (3000, 1500))).size == (1024, 512)
    assert keepable(photograph).tobytes() == photograph.tobytes()


def test_names_cannot_become_markup() -> None:
    evil = "<script>alert(1)</script>\"'"
    for html in (figures([Figure(Image.new("RGB", (2, 2)), evil, evil)]), message(evil)):
        assert "<script" not in html
        assert "\"'" not in html


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "example.org")))


def test_without_gradio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("perceptual_mae_models.commands.serve.find_spec", lambda _: None)
    assert cli.main(["serve"]) == 1
    assert "pip install -e '.[demo]'" in capsys.readouterr().err


def test_what_is_broken_in_the_folder_is_named_and_left_out(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "broken.jpg").touch()
    index = _read_folder(cli._parser().parse_args(["serve", "--folder", str(folder), "--device", "cpu"]))
    assert len(index.names) == 24
    assert capsys.readouterr().err == f"skipped {folder / 'broken.jpg'}: empty file\n"


def test_command(photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = pytest.importorskip("perceptual_mae_models.serve.page", reason="gradio is not installed")
    served = []
    monkeypatch.setattr(page, "build", lambda bench, images: (bench, images))
    monkeypatch.setattr(page, "launch", lambda built, host, port, names: served.append((built, host, port, names)))
    assert cli.main(["serve", "--folder", str(photos), "--device", "cpu"]) == 0
    ((bench, images), host, port, names) = served[0]
    assert names == []
    assert (host, port) == ("127.0.0.1", 7860)
    assert len(bench.index.names) == 24
    assert list(images) == list(samples())
    assert capsys.readouterr().err == ""
    assert cli.main(["serve", "--host", "0.0.0.0", "--port", "80", "--device", "cpu", "--name", "a.b"]) == 0
    assert served[1][1:] == ("0.0.0.0", 80, ["a.b"])
    assert "warning: 0.0.0.0 may be reached by other machines" in capsys.readouterr().err
    assert cli.main(["serve", "--folder", str(photos / "none")]) == 1


@pytest.fixture
def address(index: NeighbourIndex) -> Iterator[str]:
    page = pytest.importorskip("perceptual_mae_models.serve.page", reason="gradio is not installed")
    blocks = page.build(Workbench(index=index), samples())
    yield page.launch(blocks, "127.0.0.1", 0, block=False)
    blocks.close()


def test_a_page_of_this_machine_answers_to_its_own_names_alone(address: str) -> None:
    port = int(address.rstrip("/").rpartition(":")[2])
    statuses = {}
    for name in ("127.0.0.1", "localhost", "evil.example"):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/config", headers={"Host": f"{name}:{port}"})
        statuses[name] = connection.getresponse().status
        connection.close()
    assert statuses == {"127.0.0.1": 200, "localhost": 200, "evil.example": 400}
    assert own_names("::1") == own_names("[::1]") == ["127.0.0.1", "localhost", "[::1]", "["]
    assert own_names("0.0.0.0") == []


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_the_page_can_be_served_at_an_address_of_version_6(host: str) -> None:
    page = pytest.importorskip("perceptual_mae_models.serve.page", reason="gradio is not installed")
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no loopback of version 6 on this machine")
    blocks = page.build(Workbench(), {})
    address = page.launch(blocks, host, 0, block=False)
    assert urllib.request.urlopen(address, timeout=30).status == 200
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(address, headers={"Host": "evil.example"}), timeout=30)
    blocks.close()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_page_in_a_browser(address: str, width: int, height: int, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `browser`)")
    with playwright.sync_playwright() as driver:
        system = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if not Path(driver.chromium.executable_path).is_file() and not system:
            pytest.skip("there is no Chromium: `playwright install chromium` or the system's package")
        path = None if Path(driver.chromium.executable_path).is_file() else system
        # Without its sandbox, which needs rights that containers lack; it sees nothing but our own page.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": width, "height": height})
        tab = context.new_page()
        tab.set_default_timeout(60_000)
        foreign: list[str] = []

        def stay_here(route) -> None:
            if route.request.url.startswith((address, "data:", "blob:")):
                route.continue_()
            else:
                foreign.append(route.request.url)
                route.abort()

        tab.route("**/*", stay_here)
        use_the_page(tab, address, playwright.expect, tmp_path)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert foreign == []
        browser.close()


def use_the_page(tab, address: str, expect, tmp_path: Path) -> None:
    expect.set_options(timeout=60_000)
    rebuilt, told = tab.locator("#pmae-rebuilt"), tab.locator("#pmae-message")
    tab.goto(address)
    expect(rebuilt.locator("figure")).to_have_count(2 + len(shipped_autoencoders()))
    expect(rebuilt).to_contain_text("48 of 64 patches hidden")
    expect(tab.locator("#pmae-neighbours figure")).to_have_count(8)
    assert tab.locator("#pmae-rebuilt img").first.evaluate("e => getComputedStyle(e).imageRendering") == "pixelated"
    assert tab.locator("#pmae-rebuilt img").first.bounding_box()["width"] > 128

    tab.locator(".pmae-samples button").nth(1).click()
    expect(told).to_contain_text("Sample: chelsea")
    tab.get_by_label("number input for Hidden, %").fill("50")
    tab.get_by_role("button", name="Rebuild").click()
    expect(rebuilt).to_contain_text("32 of 64 patches hidden")
    mean = tab.locator("#pmae-maps img").nth(1).get_attribute("src")
    tab.get_by_label("Head 2").click()
    expect(tab.locator("#pmae-maps img").nth(1)).not_to_have_attribute("src", mean)

    tab.get_by_label("By painting").click()
    strokes = tab.locator(".pmae-painter")
    strokes.scroll_into_view_if_needed()
    box = strokes.bounding_box()
    cell = box["width"] / 8
    tab.mouse.move(box["x"] + 2.5 * cell, box["y"] + 1.5 * cell)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 4.5 * cell, box["y"] + 1.5 * cell, steps=10)
    tab.mouse.up()
    expect(rebuilt).to_contain_text("3 of 64 patches hidden")
    tab.get_by_role("button", name="Clear").click()
    expect(rebuilt).to_contain_text("Nothing is hidden")

    broken, bomb, whole = tmp_path / "broken.jpg", tmp_path / "bomb.png", tmp_path / "grün & <b>.png"
    broken.write_text("no image")
    bomb.write_bytes(png_header(100_000, 100_000))
    Image.new("RGB", (300, 200), "teal").save(whole)
    upload = tab.locator("#pmae-upload input[type=file]")
    for file, text in ((broken, "broken, or not an image"), (bomb, "too many pixels"), (whole, "300 x 200 pixels")):
        upload.set_input_files(file)
        expect(told).to_contain_text(text)
    assert tab.locator("#pmae-message [role=alert]").count() == 0
    large = tmp_path / "large.jpg"
    large.write_bytes(bytes(uploads.MAX_BYTES + 1))
    upload.set_input_files(large)
    expect(tab.get_by_text("exceed the maximum allowed size of 20")).to_be_visible()
