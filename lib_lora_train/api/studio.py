"""The routes under /lora-train/v1/studio/: the dataset studio, as JSON and pictures. Guarded as every route is (`gate.py`).

Pictures are called by "id", which `pictures` gives. "which" stands for {"ids": [...]} or {"filter": {...}}, with

    all_of, any_of, none_of (lists of tags), prefix, suffix, text, regex, changed_only, empty_only, problem (a code, or "any")

A filter {} is every picture. A background task is answered with {"id": n}; `state` tells its progress.

Every request may say ?dataset=name, the dataset it is about; it is refused (409) where that one is no longer open.

    GET  state            the open dataset, the others, the task under way, the captioners
    POST open             {"name", "discard"?} -> {"notes": [what was mended while it was opened, a sentence each]};
                          refused (409) while captions are unsaved, unless "discard"
    POST create           {"name", "concept"}      POST close  {"discard"?}
    POST import           {"paths": [...]}         task; folders, pictures, zips of the server
    POST import-samples   {"name": "style"|"subject"}   task; pictures that come with the extension
    POST upload?name=&batch=   one file as the body, application/octet-stream -> {"received": files of the batch}
    POST import-uploads   {"batch"}                task
    POST pictures         {"filter", "offset", "limit", "sort": "name"|"problems"|"score"} -> {"total", "pictures": [...]}
    GET  thumb?id=        a small JPEG             GET picture?id=   the full size
    POST tags             {"filter"} -> {"tags": [[tag, count], ...], "total"}
    POST edit             {"edit": {"kind": ...}, which} -> {"changed": n}
    POST caption          {"id", "text"} -> {"changed": 0 or 1}
    POST undo, redo       {} -> {"label"}
    POST save             {"overwrite"?} -> {"written", "conflicts": [names of captions that others changed]}
    POST tokens           {"text"} -> {"tokens", "chunks"}
    POST remove           {"ids"} -> {"removed": n}; undo brings them back
    POST hold-out         {which, "held_out": true|false|null} -> {"held_out": n of all}; null leaves it to the draw
    POST check            {"settings"?, "background"?} -> task, or none in the background; the report is in `state`
                          afterwards                      GET crops   its crops, a JPEG
    POST shape-preview    {"id", "shape": {"mode", "side", "focus", "flip", "enlarge"}} -> a JPEG
    POST shape            {"shape", which}         task
    POST crop             {"id", "box": [left, top, right, bottom]}      POST flip   {"id", "copy"?} -> {"id"}
    POST split            {"id", "tile"?} -> {"ids"}                     POST unshape {"ids"} -> {"done", "skipped"}
    GET  mask?id=         what of it is learnt     POST put-mask?id=   a picture of its size as the body; white is learnt
    POST remove-mask      {"id"}
    POST check-captions   {which, "seeds"?, "steps"?, "worst"?, "settings"?}   task; scores are in `pictures` as they come
    GET  checked?id=&n=   the n-th picture painted from the caption, from 0
    POST class-pictures   {"prompts": [...], "count", "size": side or [width, height], "steps"?, "cfg"?, "seed"?}   task;
                          the result holds reg_data_dir
    GET  tag-options      {"options": [...]}       POST tag  {"source", "options": {...}, which}   task
    POST use              {} -> the settings to train with
    POST stop-task        {} -> {"stopping": whether something was running}
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from lib_lora_train.api.gate import Gate, Refused
from lib_lora_train.errors import LoraTrainError
from lib_lora_train.studio import operations, shaping, thumbs, view
from lib_lora_train.studio.requests import StudioRequest, batch_name, some, validated
from lib_lora_train.studio.session import Studio
from lib_lora_train.studio.uploads import Receiving

_CHUNK = 1 << 20
_LARGEST_BODY = 16 << 20  # ids of a hundred thousand images
Answer = Callable[[StudioRequest], object]


def add_routes(gate: Gate, studio: Studio) -> None:
    """Every route of the studio's page."""
    def answered(answer: Answer, query: Mapping[str, str], values: Mapping[str, Any]) -> object:
        studio.mean(query.get("dataset"))
        return answer(validated(StudioRequest, values))

    def get(name: str, answer: Answer, about: str) -> None:
        gate.add("GET", f"studio/{name}", lambda query, _: answered(answer, query, query), about)

    def post(name: str, answer: Answer, about: str) -> None:
        # A function that returns nothing is answered with {}.
        gate.add("POST", f"studio/{name}", lambda query, body: answered(answer, query, body) or {}, about,
                 largest=_LARGEST_BODY)

    get("state", lambda _: view.state(studio), "The open dataset and the task under way")
    _add_datasets(post, studio)
    _add_images(get, post, studio)
    _add_captions(get, post, studio)
    _add_shapes(get, post, studio)
    _add_model(get, post, studio)
    gate.add_upload("studio/upload", lambda request: _upload(request, studio), "Send one file")
    gate.add_upload("studio/put-mask", lambda request: _put_mask(request, studio), "Keep a mask beside a picture")


def _add_datasets(post: Callable[..., None], studio: Studio) -> None:
    post("open", lambda r: {"notes": list(studio.open(r.name, discard=r.discard))}, "Open a dataset")
    post("create", lambda r: studio.create(r.name, concept=r.concept), "Make a dataset")
    post("close", lambda r: studio.close(discard=r.discard), "Leave the dataset")
    post("import", lambda r: {"id": operations.import_paths(studio, some(r.paths, "paths"))}, "Bring pictures in")
    post("import-samples", lambda r: {"id": operations.import_samples(studio, r.name)}, "Bring sample pictures in")
    post("import-uploads", lambda r: {"id": operations.import_uploads(studio, batch_name(r.batch))}, "Bring in what was sent")
    post("use", lambda _: studio.use(), "Save and train with the dataset")
    post("stop-task", lambda _: {"stopping": studio.tasks.stop()}, "Stop the task under way")


def _add_images(get: Callable[..., None], post: Callable[..., None], studio: Studio) -> None:
    post("pictures", lambda r: view.images(
        studio, r.filtered(), offset=r.offset, limit=r.limit, sort=r.sort or "name"), "A page of the gallery")
    get("thumb", lambda r: _image(studio.thumbnail(r.id), keep=True), "A small picture")
    get("picture", lambda r: _image(studio.image(r.id), keep=True), "A whole picture")
    post("hold-out", lambda r: {"held_out": studio.hold_out(r.selection(), r.held_out)}, "Hold pictures out of training")
    post("remove", lambda r: {"removed": studio.remove(some(r.ids, "ids"))}, "Take pictures out")


def _add_captions(get: Callable[..., None], post: Callable[..., None], studio: Studio) -> None:
    post("tags", lambda r: view.tags(studio, r.filtered()), "Tags by frequency")
    post("edit", lambda r: {"changed": studio.edit(r.edit, r.selection())}, "Change captions")
    post("caption", lambda r: {"changed": studio.caption(r.id, r.text)}, "Change one caption")
    post("undo", lambda _: {"label": studio.step(back=True)}, "Take the last step back")
    post("redo", lambda _: {"label": studio.step(back=False)}, "Do it again")
    post("save", lambda r: studio.save(overwrite=r.overwrite), "Write the captions")
    post("tokens", lambda r: dict(zip(("tokens", "chunks"), studio.tokens(r.text), strict=True)), "Count tokens")
    get("tag-options", lambda _: {"options": view.tag_options()}, "What can be chosen when captioning")
    post("tag", lambda r: {"id": operations.tag(studio, r.source, r.options, r.selection())}, "Caption pictures")


def _add_shapes(get: Callable[..., None], post: Callable[..., None], studio: Studio) -> None:
    post("check", lambda r: {"id": (operations.check_in_background if r.background else operations.check)(
        studio, r.settings)}, "Look at the pictures")
    get("crops", lambda _: _image(shaping.crops(studio), keep=False), "What crops lose")
    post("shape-preview", lambda r: _image(shaping.preview(studio, r.id, r.shape), keep=False), "What a shape would make")
    post("shape", lambda r: {"id": operations.shape(studio, r.shape, r.selection())}, "Cut and scale pictures")
    post("crop", lambda r: shaping.crop_to_box(studio, r.id, r.box or ()), "Cut a picture by hand")
    post("flip", lambda r: {"id": shaping.flip(studio, r.id, copy=r.copied)}, "Mirror")
    post("split", lambda r: {"ids": shaping.split(studio, r.id, tile=r.tile)}, "Split")
    get("mask", lambda r: _image(shaping.mask(studio, r.id), keep=False), "What of a picture is learnt")
    post("remove-mask", lambda r: shaping.remove_mask(studio, r.id), "Learn all of a picture")
    post("unshape", lambda r: shaping.unshape(studio, some(r.ids, "ids")), "Bring pictures back as they were")


def _add_model(get: Callable[..., None], post: Callable[..., None], studio: Studio) -> None:
    post("check-captions", lambda r: {"id": operations.check_captions(
        studio, r.selection(), seeds=r.seeds, steps=r.steps, worst=r.worst, values=r.settings)}, "Are the captions right")
    get("checked", lambda r: _image(operations.generated(studio, r.id, r.n), keep=False),
        "A picture painted from a caption")
    post("class-pictures", lambda r: {"id": operations.class_images(
        studio, prompts=some(r.prompts, "prompts"), size=(r.size, r.size) if isinstance(r.size, int) else r.size,
        count=r.count, steps=r.steps, cfg=float(r.cfg), seed=r.seed)}, "Paint preservation pictures")


async def _upload(request: Request, studio: Studio) -> object:
    """One file of a batch."""
    batch, name = batch_name(request.query_params.get("batch")), request.query_params.get("name", "")
    if not name.strip():
        raise Refused(400, "The file has no name.")
    receiving = await _receive(request, studio, batch, name)
    return {"received": await run_in_threadpool(receiving.done)}


async def _put_mask(request: Request, studio: Studio) -> object:
    """The mask of one picture."""
    name = request.query_params.get("id", "")
    receiving = await _receive(request, studio, "mask", "mask.png")
    try:
        await run_in_threadpool(receiving.flush)
        await run_in_threadpool(shaping.put_mask, studio, name, receiving.path)
    finally:
        await run_in_threadpool(receiving.abandon)
    return {}


async def _receive(request: Request, studio: Studio, batch: str, name: str) -> Receiving:
    """One file onto the disk as it comes; it is never held in memory."""
    said, parts = request.headers.get("content-length", ""), request.stream()
    size = int(said) if said.isascii() and said.isdigit() else None
    studio.mean(request.query_params.get("dataset"))
    receiving: Receiving | None = None
    try:
        receiving = await run_in_threadpool(_begin, studio, batch, name, size)
        waiting = bytearray()
        async for part in parts:
            waiting += part
            if len(waiting) >= _CHUNK:
                await run_in_threadpool(receiving.write, bytes(waiting))
                waiting.clear()
        await run_in_threadpool(receiving.write, bytes(waiting))
        return receiving
    except BaseException as error:
        if receiving is not None:
            receiving.abandon()
        if isinstance(error, ClientDisconnect):
            raise Refused(400, "The file did not arrive whole.") from error
        if isinstance(error, LoraTrainError):
            # Answered in the middle of it, a browser would see a broken connection and not the sentence.
            with contextlib.suppress(ClientDisconnect):
                async for _ in parts:
                    pass
        raise


def _begin(studio: Studio, batch: str, name: str, size: int | None) -> Receiving:
    with studio.using() as session:
        return session.uploads.begin(batch, name, size=size)


def _image(data: bytes, *, keep: bool) -> Response:
    """A picture of ours. Its address changes with it ("stamp"), so a browser may keep it for a while."""
    return Response(data, media_type=thumbs.MEDIA_TYPE, headers={
        "X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'; sandbox",
        "Cache-Control": "private, max-age=3600" if keep else "no-store"})
