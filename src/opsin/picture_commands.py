"""The sub-commands of `opsin visualize`: what the features of a backbone show, as picture files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image

from opsin.errors import FINITE, OpsinError, within

if TYPE_CHECKING:
    from opsin.evaluate.maps import Look
    from opsin.evaluate.model import Model

Out = Annotated[Path, tyro.conf.arg(metavar="PATH")]


@dataclass(frozen=True)
class View:
    """How a backbone looks at images."""

    size: int = 448
    """Shorter side of an image in pixels; its aspect is kept."""
    images: int = 12
    """Images at most, evenly spaced over the data."""
    model: str | None = None
    """Name of the architecture, where the file of weights does not tell it."""
    device: str | None = None
    """cuda, mps or cpu; by default the first of these that is there."""

    def __post_init__(self) -> None:
        within(self, "--", size=(1, FINITE), images=(1, FINITE))

    def open(self, weights: Path) -> "Model":
        """The backbone."""
        from opsin.evaluate.model import open_model

        return open_model(weights, self.model, self.device)


def pca(
    weights: Path,
    data: str,
    out: Out,
    basis: Path | None = None,
    background: bool = False,
    view: Annotated[View, tyro.conf.arg(name="")] = View(),
) -> int:
    """Patch features as colours: one PCA over all images together, so that equal parts have equal colours.

    Args:
        weights: a file of ours, an official .pth, a Hugging Face folder or a timm file.
        data: an image, a folder of images or a list of them.
        out: folder of the pictures; basis.safetensors is written there too, for more pictures in the same colours.
        basis: basis.safetensors of earlier pictures, instead of fitting one.
        background: colour all patches; otherwise those are black that the first component takes for background.
        view: how images are looked at.
    """
    from opsin.backbone.probe import PcaPicture
    from opsin.evaluate.maps import images_of, joint_pca, patches
    from opsin.output import make_folder
    from opsin.report.maps import beside, enlarged

    known = None if basis is None else PcaPicture.load(basis)
    files, folder = images_of(data, view.images), make_folder(out)
    opened = view.open(weights)
    files, looks = _looks(opened, files, view.size)
    fitted, colours = joint_pca([patches(opened, each) for each in looks], known, background=background)
    fitted.save(folder / "basis.safetensors")
    for number, (file, each, colour) in enumerate(zip(files, looks, colours, strict=True)):
        _write(folder, number, file, beside([each.pixels, enlarged(colour, each.pixels.shape[:2])]))
    return _told(folder, len(files))


def attention(
    weights: Path,
    data: str,
    out: Out,
    layer: int = -1,
    register: int | None = None,
    view: Annotated[View, tyro.conf.arg(name="")] = View(),
) -> int:
    """What the class token attends to: the mean of the heads, then every head, of one block.

    Args:
        weights: a file of ours, an official .pth, a Hugging Face folder or a timm file.
        data: an image, a folder of images or a list of them.
        out: folder of the pictures.
        layer: the block, 0 the first, -1 the last.
        register: show what this register attends to, instead of the class token.
        view: how images are looked at.
    """
    from opsin.evaluate.maps import attention as weights_of
    from opsin.evaluate.maps import images_of
    from opsin.output import make_folder
    from opsin.report.maps import beside, heat

    files, folder = images_of(data, view.images), make_folder(out)
    opened = view.open(weights)
    files, looks = _looks(opened, files, view.size)
    for number, (file, each) in enumerate(zip(files, looks, strict=True)):
        heads = weights_of(opened, each, layer, register)
        shape = each.pixels.shape[:2]
        row = [each.pixels, heat(heads.mean(0), shape), *(heat(head, shape) for head in heads)]
        _write(folder, number, file, beside(row))
    return _told(folder, len(files))


def similarity(
    weights: Path,
    image: Path,
    at: tuple[float, float],
    out: Out,
    data: str | None = None,
    view: Annotated[View, tyro.conf.arg(name="")] = View(),
) -> int:
    """How similar all patches are to the one at a point of an image, in that image and in others.

    Args:
        weights: a file of ours, an official .pth, a Hugging Face folder or a timm file.
        image: the image with the point.
        at: the point, as fractions of the width and the height from 0 to 1.
        out: folder of the pictures.
        data: other images: an image, a folder or a list.
        view: how images are looked at.
    """
    from opsin.evaluate.maps import images_of, look, patch_at, patches
    from opsin.evaluate.maps import similarity as similarities
    from opsin.output import make_folder
    from opsin.report.maps import beside, heat, marked

    _check_image(image, "--image")
    others = images_of(data, view.images) if data else []
    folder, opened = make_folder(out), view.open(weights)
    first = look(opened, image, view.size)
    others, seen = _looks(opened, others, view.size) if others else ([], [])
    files, looks = [image, *others], [first, *seen]
    place = patch_at(looks[0], *at, opened.arch.patch)
    grids = [patches(opened, each) for each in looks]
    for number, (file, each, values) in enumerate(zip(files, looks, similarities(grids[0], place, grids), strict=True)):
        photo = marked(each.pixels, place, opened.arch.patch) if number == 0 else each.pixels
        _write(folder, number, file, beside([photo, heat(values, each.pixels.shape[:2], 0.0, 1.0)]))
    return _told(folder, len(files))


def matches(
    weights: Path,
    first: Path,
    second: Path,
    out: Out,
    limit: int = 50,
    radius: float = 2.0,
    view: Annotated[View, tyro.conf.arg(name="")] = View(),
) -> int:
    """Patches of two images that belong together, joined by lines.

    Args:
        weights: a file of ours, an official .pth, a Hugging Face folder or a timm file.
        first: an image.
        second: another one.
        out: folder of the picture.
        limit: lines at most.
        radius: of matches nearer to one another than so many patches only the best is drawn.
        view: how images are looked at.
    """
    from opsin.evaluate.maps import look, patches
    from opsin.evaluate.maps import matches as matched
    from opsin.output import make_folder
    from opsin.report.maps import joined

    if limit < 1 or not radius >= 0:
        raise OpsinError(f"--limit is {limit} and --radius {radius:g}: give 1 or more, and 0 or more.")
    _check_image(first, "--first")
    _check_image(second, "--second")
    folder, opened = make_folder(out), view.open(weights)
    one, other = (look(opened, file, view.size) for file in (first, second))
    found = matched(patches(opened, one), patches(opened, other), radius, limit)
    pairs = [(match.first, match.second) for match in found]
    picture = joined(one.pixels, other.pixels, pairs, opened.arch.patch)
    _write(folder, 0, Path(f"{first.stem}-{second.stem}"), picture)
    return _told(folder, 1)


PICTURES: dict[str, Callable[..., int]] = {
    "visualize pca": pca,
    "visualize attention": attention,
    "visualize similarity": similarity,
    "visualize matches": matches,
}
"""The commands by name."""


def _looks(opened: "Model", files: Sequence[Path], size: int) -> tuple[list[Path], list["Look"]]:
    """The images that can be decoded, as the backbone sees them; others are named and passed over.

    Raises:
        OpsinError: there is none.
    """
    from opsin.data.decode import DecodeError
    from opsin.evaluate.maps import look

    found = {}
    for file in files:
        try:
            found[file] = look(opened, file, size)
        except DecodeError as error:
            print(f"passed over: {error}")
    if not found:
        raise OpsinError(f"none of {len(files)} images can be decoded, such as {files[0]}: give others.")
    return list(found), list(found.values())


def _check_image(path: Path, option: str) -> None:
    if not path.is_file():
        raise OpsinError(f"there is no file {path}: give {option} an image.")


def _write(folder: Path, number: int, file: Path, picture: NDArray[np.uint8]) -> None:
    """Write the picture of an image under its number and name: images of other folders may have the same name."""
    Image.fromarray(picture).save(folder / f"{number:03}-{file.stem}.png")


def _told(folder: Path, count: int) -> int:
    print(f"{count} picture{'s' * (count != 1)} in {folder}")
    return 0
