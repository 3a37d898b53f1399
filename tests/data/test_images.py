"""Every kind of image ends as upright RGB, and both views show the same region."""

import io
import os

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from blip3o_jax.config import UserError
from blip3o_jax.data.images import crop_and_resize, decode, load, shape_of, views
from blip3o_jax.data.record import BadRecord

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def quadrants(height: int = 32, width: int = 48) -> np.ndarray:
    """Return red, green above blue, white."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2], image[: height // 2, width // 2 :] = RED, GREEN
    image[height // 2 :, : width // 2], image[height // 2 :, width // 2 :] = BLUE, WHITE
    return image


def corners(image: np.ndarray) -> np.ndarray:
    """Return colours well inside the four quadrants."""
    height, width = image.shape[:2]
    return image[
        [height // 4, height // 4, 3 * height // 4, 3 * height // 4],
        [width // 4, 3 * width // 4] * 2,
    ]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_rgb_is_exact(kind: str) -> None:
    image = quadrants()
    got = decode(encode(Image.fromarray(image), kind, lossless=True))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, image)


def test_exif_orientation_turns_the_image_upright() -> None:
    upright = quadrants()
    # Orientation 6: the camera was turned; the stored rows run up the right-hand side of the scene.
    stored = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    got = decode(encode(stored, "JPEG", exif=exif, quality=95))
    assert got.shape == (32, 48, 3)
    np.testing.assert_allclose(corners(got), corners(upright), atol=6)  # JPEG at quality 95


def test_cmyk_jpeg() -> None:
    # Cyan, magenta, yellow inks: no cyan and full magenta and yellow print red.
    image = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    np.testing.assert_allclose(
        decode(encode(image, "JPEG", quality=95)).reshape(-1, 3), [RED] * 1024, atol=6
    )


def test_alpha_is_laid_over_white() -> None:
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[:, :2] = (*BLUE, 255)
    rgba[:, 2:4] = (*BLUE, 0)
    rgba[:, 4:] = (*BLUE, 128)
    got = decode(encode(Image.fromarray(rgba)))
    np.testing.assert_array_equal(got[0, ::2], [BLUE, WHITE, (127, 127, 255)])


def test_palette_with_a_transparent_colour() -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([*RED, *GREEN])
    np.testing.assert_array_equal(decode(encode(image)), [[RED, GREEN]])
    np.testing.assert_array_equal(decode(encode(image, transparency=1)), [[RED, WHITE]])


def test_grey_in_8_and_16_bits_and_with_alpha() -> None:
    grey = np.array([[0, 100, 255]], np.uint8)
    expected = np.repeat(grey[..., None], 3, -1)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(grey))), expected)
    np.testing.assert_array_equal(
        decode(encode(Image.fromarray(grey.astype(np.uint16) * 256))), expected
    )
    with_alpha = Image.merge(
        "LA", [Image.fromarray(grey), Image.fromarray(np.array([[255, 0, 255]], np.uint8))]
    )
    np.testing.assert_array_equal(decode(encode(with_alpha)), [[(0, 0, 0), WHITE, WHITE]])


def test_broken_bytes_are_bad_records_with_a_reason() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with pytest.raises(BadRecord, match=r"^the image has zero bytes$"):
        decode(b"")
    with pytest.raises(BadRecord, match=r"cannot be decoded: it is no JPEG, PNG"):
        decode(b"this is no image")
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encode(Image.fromarray(noise), kind)
        with pytest.raises(BadRecord, match=r"cannot be decoded: .+"):
            decode(data[: len(data) // 2])
        with pytest.raises(BadRecord, match=r"cannot be decoded: .+"):
            decode(data[:20])
    with pytest.raises(BadRecord, match=r"pixel format F"):
        decode(encode(Image.new("F", (4, 4)), "TIFF"))


def test_a_large_jpeg_is_decoded_smaller_but_never_too_small() -> None:
    ramp = np.tile(np.linspace(0, 255, 800, dtype=np.uint8)[None, :, None], (600, 1, 3))
    data = encode(Image.fromarray(ramp), "JPEG", quality=95)
    assert decode(data).shape == (600, 800, 3)
    assert decode(data, at_least=300).shape == (300, 400, 3)
    assert decode(data, at_least=301).shape == (600, 800, 3)
    full, fast = crop_and_resize(decode(data), 64), crop_and_resize(decode(data, at_least=64), 64)
    # The inverse DCT averages 8 x 8 pixels here; on a smooth ramp that is the same picture to
    # within two grey levels.
    np.testing.assert_allclose(fast.astype(int), full.astype(int), atol=2)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64)])
def test_shared_views_show_the_same_centre_square(shape: tuple[int, int]) -> None:
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(np.uint8)
    image = np.stack([rows * 2, columns * 2, np.zeros_like(rows)], -1)
    pixels, tokenizer_pixels = views(image, 32, 16, "shared")
    assert pixels.shape == (32, 32, 3)
    assert tokenizer_pixels.shape == (16, 16, 3)
    side = min(shape)
    for view in (pixels, tokenizer_pixels):
        # Linear in the position: the mean gives the centre of the crop, the slope its extent.
        centre = [view[..., 0].mean() / 2, view[..., 1].mean() / 2]
        np.testing.assert_allclose(centre, [(shape[0] - 1) / 2, (shape[1] - 1) / 2], atol=0.6)
        middle = view[4:-4, 4:-4].astype(float)  # off the border, where the kernel is cut
        step = np.diff(middle[..., 1], axis=1).mean() / 2
        np.testing.assert_allclose(step, side / len(view), atol=0.1)


def test_reference_crop_squashes_the_tokenizer_view_only() -> None:
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, :20], image[:, 20:40], image[:, 40:] = RED, GREEN, BLUE
    shared, reference = views(image, 20, 30, "shared"), views(image, 20, 30, "reference")
    np.testing.assert_array_equal(shared[0], reference[0])
    assert (shared[0] == GREEN).all()
    assert (shared[1] == GREEN).all()
    np.testing.assert_array_equal(reference[1][15, [3, 15, 27]], [RED, GREEN, BLUE])
    with pytest.raises(ValueError, match=r"crop='random'"):
        views(image, 8, 8, "random")


def test_resizing_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = crop_and_resize(
        stripes, 16
    )  # four pixels to one: without antialiasing, stripes of aliases
    np.testing.assert_allclose(small[2:-2, 2:-2].astype(int), 127, atol=2)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_metadata_of_any_size_is_no_reason_to_refuse_an_image(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x9286] = b"x" * 60_000  # a comment; JPEG's segment holds 64 KiB
    options = {"icc_profile": bytes((1 << 20) + 9), "exif": exif, "lossless": True}
    if kind == "PNG":
        options["pnginfo"] = notes = PngImagePlugin.PngInfo()
        notes.add_itxt("XML:com.adobe.xmp", "x" * ((1 << 20) + 9), zip=True)
        notes.add_text("Comment", "y" * (1 << 21), zip=True)
        notes.add_text("Author", "z" * (1 << 21))
        for _ in range(80):  # more than Pillow takes of all texts together
            notes.add_text("Bomb", "\0" * ((1 << 20) - 1), zip=True)
    data = encode(Image.fromarray(quadrants()), kind, **options)
    assert decode(data).shape == (48, 32, 3) == (*shape_of(data), 3), (
        "and it is turned as its EXIF says"
    )


def test_a_png_turned_by_its_xmp_stays_so() -> None:
    xmp = 'tiff:Orientation="6"'
    for zipped in (False, True):
        notes = PngImagePlugin.PngInfo()
        notes.add_itxt("XML:com.adobe.xmp", xmp, zip=zipped)
        assert decode(encode(Image.fromarray(quadrants()), pnginfo=notes)).shape == (48, 32, 3)


@pytest.mark.parametrize(
    "kind", ["EPS", "PDF", "PPM", "ICO", "PCX", "TGA", "SGI", "ICNS", "JPEG2000"]
)
def test_no_other_decoder_is_started(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse an EPS named .png runs Ghostscript where Pillow may choose."""
    data = encode(Image.new("RGB", (64, 64)), kind)
    monkeypatch.setattr(
        Image, "open", lambda *args, **kwargs: pytest.fail("Pillow chooses the decoder")
    )
    with pytest.raises(
        BadRecord,
        match=r"^the image cannot be decoded: it is no JPEG, PNG, WebP, GIF, BMP or TIFF file$",
    ):
        decode(data)
    with pytest.raises(BadRecord, match="it is no JPEG"):
        shape_of(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_pixels_are_counted_before_they_are_decoded(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(Image.fromarray(quadrants(100, 120)), kind)
    assert decode(data, max_pixels=12_000).shape == (100, 120, 3)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(
        BadRecord,
        match=r"^the image is too large: 120 x 100 pixels, more than 11,999: ",
    ):
        decode(data, max_pixels=11_999)


@pytest.mark.parametrize("lossless", [False, True])
def test_a_webp_says_its_size_before_its_decoder_allocates(
    lossless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import WebPImagePlugin

    monkeypatch.setattr(WebPImagePlugin.WebPImageFile, "_open", lambda self: pytest.fail("opened"))
    plain = encode(Image.new("RGB", (120, 100)), "WEBP", lossless=lossless)
    extended = encode(
        Image.new("RGBA", (120, 100), (0, 0, 0, 9)), "WEBP", lossless=lossless, icc_profile=b"x"
    )
    for data in (plain, extended):
        with pytest.raises(BadRecord, match="120 x 100 pixels"):
            decode(data, max_pixels=11_999)
        with pytest.raises(BadRecord, match="120 x 100 pixels"):
            shape_of(data, max_pixels=11_999)
    claim = b"RIFF\x16\0\0\0WEBPVP8X" + bytes(
        [10, 0, 0, 0, 0, 0, 0, 0, *(16382).to_bytes(3, "little") * 2]
    )
    with pytest.raises(BadRecord, match="16383 x 16383 pixels"):
        shape_of(claim)


def test_a_file_that_a_user_names_is_one_picture_or_one_line(tmp_path, recwarn) -> None:
    path = tmp_path / "photo"
    path.write_bytes(encode(Image.fromarray(quadrants())))
    np.testing.assert_array_equal(load(path), quadrants())
    path.write_bytes(
        encode(
            Image.fromarray(quadrants()),
            "MPO",
            save_all=True,
            append_images=[Image.new("RGB", (8, 8))],
        )
    )
    assert load(path).shape == quadrants().shape, "a JPEG with a preview after it"
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE)]
    whole = encode(Image.fromarray(quadrants()), "JPEG")
    for data, line in {
        b"": "the image has zero bytes",
        b"words": "the image cannot be decoded: it is no JPEG, PNG, WebP, GIF, BMP or TIFF file",
        whole[: len(whole) // 2]: "the image cannot be ",
        encode(Image.new("RGB", (1, 1))): "1 x 1 pixels are no picture: give one of 8 x 8 or more",
        encode(
            frames[0], "GIF", save_all=True, append_images=frames[1:]
        ): "an animation of 2 frames: save the one that is meant",
        encode(
            Image.new("1", (20000, 20000))
        ): "the image is too large: 20000 x 20000 pixels, more than 80,000,000: scale it down",
        encode(
            Image.new("1", (10000, 9000))
        ): "the image is too large: 10000 x 9000 pixels, more than 80,000,000: scale it down",
        encode(
            Image.new("1", (10000, 8001))
        ): "the image is too large: 10000 x 8001 pixels, more than 80,000,000: scale it down",
    }.items():
        path.write_bytes(data)
        with pytest.raises(UserError) as error:
            load(path)
        assert (
            str(error.value).startswith(f"{path}: ")
            and line in str(error.value)
            and "\n" not in str(error.value)
        )
    animation = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    path.write_bytes(animation[: len(animation) * 6 // 10])  # within the header of the second
    with pytest.raises(UserError, match=r"photo: the image cannot be decoded: .+"):
        load(path)
    with pytest.raises(UserError, match=r"none: the image cannot be read: No such file"):
        load(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is a pipe or a device"):
        load(tmp_path / "pipe")
    assert not recwarn.list, "one line, and no warning of Pillow's"
