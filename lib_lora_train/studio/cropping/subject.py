"""Where an image's subject is: a face if one is found, else what is not background, else what stands out.

Faces: OpenCV's YuNet if its file is there (the WebUI keeps it in models/opencv once its own cropping was used), else the
cascade that comes inside OpenCV (Viola & Jones 2001). Without OpenCV, or without a face: whatever differs from a background
of one colour; where there is none, the spectral residual of Hou & Zhang (CVPR 2007). Both need numpy only. Nothing is
downloaded; detectors whose weights are pickles are not used.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SubjectBox = tuple[int, int, int, int]  # left, top, right, bottom in pixels

YUNET_FILES = ("opencv/face_detection_yunet_2023mar.onnx", "opencv/face_detection_yunet.onnx")
_CASCADE = "haarcascade_frontalface_alt2.xml"
_FACE_SIDE = 800  # longest side that faces are looked for in, pixels
_YUNET_SCORE = 0.8
_SMALLEST_FACE = 1 / 14  # of the shorter side; smaller ones are not what an image is of, and mostly no faces
_NEIGHBOURS = 12  # detections that must agree: faces measured 13 to 41, blobs of noise and foliage up to 11
_MAP_SIDE = 64  # the paper's scale
_SIGMA = 2.5  # of the smoothing, in pixels of the map (the authors' code)
_STANDS_OUT = 1.5  # times the mean of the map; the paper's 3 finds the brightest spot of a thing, we want the thing
_TAIL = 0.3  # of what stands out on each side: the background's own structure, which draws the box to the image's middle
_SPECKS = 0.002  # the same on a background of one colour: dust
_GROUND_SIDE = 256  # longest side at which a plain background is looked for, pixels
_GROUND_DISTANCE = 24  # of 255 in any colour: what JPEG and a soft shadow make of one colour stays below
_GROUND_SHARE = 0.9  # of the image's edge must be background


def subject_box(image: Image.Image, *, mask: Image.Image | None = None, models_folder: Path | None = None) -> SubjectBox:
    """The box around the subject, inside the image; the whole image where nothing stands out.

    `mask` (mode L, same size) says it outright where it leaves something out. `models_folder` is the host's, where YuNet's
    file may be.
    """
    if mask is not None and mask.size == image.size and (drawn := mask.point(lambda v: 255 if v > 127 else 0).getbbox()):
        if drawn != (0, 0, *image.size):
            return drawn
    return face_box(image, models_folder=models_folder) or drawn_box(image) or salient_box(image)


def face_box(image: Image.Image, *, models_folder: Path | None = None) -> SubjectBox | None:
    """The box around the head or heads of an image in mode RGB; None where no face is found, or no OpenCV."""
    try:
        import cv2
    except ImportError:
        return None
    scale = min(1.0, _FACE_SIDE / max(image.size))
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))),
                         Image.Resampling.BILINEAR) if scale < 1 else image
    if min(small.size) < 40:
        return None
    try:
        faces = _yunet(cv2, small, models_folder) if models_folder else None
        faces = _cascade(cv2, small) if faces is None else faces
    except (cv2.error, AttributeError):
        return None  # a build without this detector, or a damaged file: what stands out is found without it
    faces = [face for face in faces if min(face[2:]) >= min(small.size) * _SMALLEST_FACE]
    if not faces:
        return None
    largest = max(width * height for _, _, width, height in faces)
    heads = [_head(face) for face in faces if face[2] * face[3] * 4 > largest]
    box = (min(h[0] for h in heads), min(h[1] for h in heads), max(h[2] for h in heads), max(h[3] for h in heads))
    return _inside(tuple(edge / scale for edge in box), image.size)


def drawn_box(image: Image.Image) -> SubjectBox | None:
    """The box around all that differs from a background of one colour; None if the image has no such background."""
    scale = min(1.0, _GROUND_SIDE / max(image.size))
    size = (max(2, round(image.width * scale)), max(2, round(image.height * scale)))
    pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX), dtype=np.int16)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(edge, axis=0)
    differs = np.abs(pixels - ground).max(axis=-1) > _GROUND_DISTANCE
    at_edge = np.concatenate([differs[0], differs[-1], differs[:, 0], differs[:, -1]])
    if at_edge.mean() > 1 - _GROUND_SHARE or not differs.any():
        return None
    left, right = _extent(differs.sum(axis=0), tail=_SPECKS)
    top, bottom = _extent(differs.sum(axis=1), tail=_SPECKS)
    across, down = image.width / size[0], image.height / size[1]
    return _inside((left * across, top * down, right * across, bottom * down), image.size)


def salient_box(image: Image.Image) -> SubjectBox:
    """The box around what stands out; the whole image if nothing does."""
    salient = saliency(image)
    salient = np.where(salient > _STANDS_OUT * salient.mean(), salient, 0.0)
    if not salient.any():
        return (0, 0, *image.size)
    left, right = _grown(*_extent(salient.sum(axis=0), tail=_TAIL), limit=salient.shape[1])
    top, bottom = _grown(*_extent(salient.sum(axis=1), tail=_TAIL), limit=salient.shape[0])
    across, down = image.width / salient.shape[1], image.height / salient.shape[0]
    return _inside((left * across, top * down, right * across, bottom * down), image.size)


def saliency(image: Image.Image) -> np.ndarray:
    """How much each pixel stands out: [rows, columns] float64 >= 0, the longer side 64, colours counted alike.

    Equations 5 to 9 of Hou & Zhang: what the log spectrum has beyond its own local average, brought back to the image.
    """
    scale = _MAP_SIDE / max(image.size)
    size = (max(4, round(image.width * scale)), max(4, round(image.height * scale)))
    pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX), dtype=np.float64) / 255
    found = np.zeros(pixels.shape[:2])
    for channel in np.moveaxis(pixels, -1, 0):
        if np.ptp(channel) < 1 / 255:
            continue  # even: its spectrum is rounding errors
        spectrum = np.fft.fft2(channel)
        log_amplitude = np.log(np.abs(spectrum) + 1e-9)
        residual = log_amplitude - _averaged(log_amplitude)
        found += np.abs(np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum)))) ** 2
    return _smoothed(found)


def _averaged(values: np.ndarray) -> np.ndarray:
    """The mean of 3 by 3 neighbours; a spectrum goes on at its edges."""
    rows = sum(np.roll(values, shift, axis=0) for shift in (-1, 0, 1))
    return sum(np.roll(rows, shift, axis=1) for shift in (-1, 0, 1)) / 9


def _smoothed(values: np.ndarray) -> np.ndarray:
    reach = math.ceil(2 * _SIGMA)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / _SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        padded = np.pad(values, [(reach, reach) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        values = np.apply_along_axis(lambda line: np.convolve(line, weights, mode="valid"), axis, padded)
    return values


def _extent(weights: np.ndarray, *, tail: float) -> tuple[float, float]:
    """Between which places all but the tails of `weights` lie."""
    share = np.cumsum(weights) / weights.sum()
    return float(np.searchsorted(share, tail)), float(np.searchsorted(share, 1 - tail) + 1)


def _grown(start: float, end: float, *, limit: float) -> tuple[float, float]:
    """From the middle of a thing, where 1 - 2 tails of it lie, to all of it, as if it were even; its middle stays."""
    middle = (start + end) / 2
    half = max((end - start) / 2, min((end - start) / 2 / (1 - 2 * _TAIL), middle, limit - middle))
    return middle - half, middle + half


def _yunet(cv2: Any, image: Image.Image, models_folder: Path) -> list[tuple[float, float, float, float]] | None:
    """(left, top, width, height) of each face; None if its file is not there or cannot be used."""
    for path in (models_folder / name for name in YUNET_FILES):
        if not path.is_file():
            continue
        try:
            detector = cv2.FaceDetectorYN.create(str(path), "", image.size, _YUNET_SCORE, 0.3, 50)
            _, found = detector.detect(np.ascontiguousarray(np.asarray(image)[:, :, ::-1]))
        except cv2.error:
            continue  # made for another version of OpenCV, or damaged
        return [] if found is None else [tuple(float(v) for v in face[:4]) for face in found]
    return None


def _cascade(cv2: Any, image: Image.Image) -> list[tuple[float, float, float, float]]:
    """(left, top, width, height) of each face, by the cascade inside OpenCV."""
    path = Path(cv2.data.haarcascades) / _CASCADE
    if not path.is_file():
        return []
    # Through memory: OpenCV cannot open paths beyond ASCII on Windows.
    storage = cv2.FileStorage(path.read_text(encoding="utf-8"), cv2.FILE_STORAGE_READ | cv2.FILE_STORAGE_MEMORY)
    classifier = cv2.CascadeClassifier()
    if not classifier.read(storage.getFirstTopLevelNode()):
        return []
    # Not equalised over the whole image: the cascade evens out each window by itself.
    grey = np.asarray(image.convert("L"))
    smallest = max(20, round(min(image.size) * _SMALLEST_FACE))
    found = classifier.detectMultiScale(grey, scaleFactor=1.1, minNeighbors=_NEIGHBOURS, minSize=(smallest, smallest))
    return [tuple(float(v) for v in face) for face in found]


def _head(face: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """A face from brow to chin, with hair and shoulders: (left, top, right, bottom)."""
    left, top, width, height = face
    return left - 0.5 * width, top - 0.6 * height, left + 1.5 * width, top + 2.0 * height


def _inside(box: tuple[float, ...], size: tuple[int, int]) -> SubjectBox:
    left, top = max(0, math.floor(box[0])), max(0, math.floor(box[1]))
    right, bottom = min(size[0], math.ceil(box[2])), min(size[1], math.ceil(box[3]))
    return min(left, size[0] - 1), min(top, size[1] - 1), max(right, left + 1), max(bottom, top + 1)
