"""The routes under /lora-train/v1/studio/: the dataset studio, as JSON and pictures. Guarded as every route is (`gate.py`).

Pictures are called by "id", which `images` gives. "which" stands for {"ids": [...]} or {"filter": {...}}, with

    all_of, any_of, none_of (lists of tags), prefix, suffix, text, regex, changed_only, empty_only, problem (a code, or "any")

A filter {} is every picture. Work that takes long is answered with {"id": n}; `state` tells how it goes on.

    GET  state            the open dataset, the others, the work under way, what captions can come from
    POST open             {"name", "discard"?} -> {"notes": [what was mended while it was opened, a sentence each]};
                          refused (409) while captions are unsaved, unless "discard"
    POST create           {"name", "concept"}      POST close  {"discard"?}
    POST import           {"paths": [...]}         work; folders, pictures, zips of the server
    POST upload?name=&batch=   one file as the body, application/octet-stream -> {"received": files of the batch}
    POST import-uploads   {"batch"}                work
    POST pictures         {"filter", "offset", "limit", "sort": "name"|"problems"|"score"} -> {"total", "pictures": [...]}
    GET  thumb?id=        a small JPEG             GET picture?id=   the whole one
    POST tags             {"filter"} -> {"tags": [[tag, count], ...], "total"}
    POST edit             {"edit": {"kind": ...}, which} -> {"changed": n}
    POST caption          {"id", "text"} -> {"changed": 0 or 1}
    POST undo, redo       {} -> {"label"}
    POST save             {"overwrite"?} -> {"written", "conflicts": [names of captions that others changed]}
    POST tokens           {"text"} -> {"tokens", "chunks"}
    POST remove           {"ids"} -> {"removed": n}; undo brings them back
    POST check            {"settings"?} -> work; the report is in `state` afterwards     GET crops   its crops, a JPEG
    POST shape-preview    {"id", "shape": {"mode", "side", "focus", "flip", "enlarge"}} -> a JPEG
    POST shape            {"shape", which}         work
    POST crop             {"id", "box": [left, top, right, bottom]}      POST flip   {"id", "copy"?} -> {"id"}
    POST split            {"id", "tile"?} -> {"ids"}                     POST unshape {"ids"} -> {"done", "skipped"}
    GET  mask?id=         what of it is learnt     POST put-mask?id=   a picture of its size as the body; white is learnt
    POST remove-mask      {"id"}
    POST check-captions   {which, "seeds"?, "steps"?, "worst"?, "settings"?}   work; scores are in `images` as they come
    GET  checked?id=&n=   the n-th picture painted from the caption, from 0
    POST class-pictures   {"prompts": [...], "count", "size": side or [width, height], "steps"?, "cfg"?, "seed"?}   work;
                          the result holds reg_data_dir
    GET  tag-options      {"options": [...]}       POST tag  {"source", "options": {...}, which}   work
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

from lib_lora_train.api.gate import Door, Refused
from lib_lora_train.errors import LoraTrainError
from lib_lora_train.studio import model_operations, operations, requests, shaping, thumbs, view
from lib_lora_train.studio.session import Studio
from lib_lora_train.studio.uploads import Receiving

_PIECE = 1 << 20
_LARGEST_BODY = 16 << 20  # ids of a hundred thousand pictures
Body = Mapping[str, Any]


def add_routes(door: Door, studio: Studio) -> None:
    """Everything the page of the studio asks for."""
    def get(name: str, answer: Callable[[Mapping[str, str]], object], about: str) -> None:
        door.add("GET", f"studio/{name}", lambda query, _: answer(query), about)

    def post(name: str, answer: Callable[[Body], object], about: str) -> None:
        door.add("POST", f"studio/{name}", lambda _, body: answer(body), about, largest=_LARGEST_BODY)

    get("state", lambda _: view.state(studio), "The open dataset and the work under way")
    _add_datasets(post, studio)
    _add_images(get, post, studio)
    _add_captions(get, post, studio)
    _add_shapes(get, post, studio)
    _add_model(get, post, studio)
    door.add_upload("studio/upload", lambda request: _upload(request, studio), "Send one file")
    door.add_upload("studio/put-mask", lambda request: _put_mask(request, studio), "Keep a mask beside a picture")


def _add_datasets(post: Callable[..., None], studio: Studio) -> None:
    post("open", lambda body: {"notes": list(studio.open(requests.text(body, "name", required=True),
                                                         discard=requests.switch(body, "discard")))}, "Open a dataset")
    post("create", lambda body: _nothing(studio.create(requests.text(body, "name"), concept=requests.text(body, "concept"))),
         "Make a dataset")
    post("close", lambda body: _nothing(studio.close(discard=requests.switch(body, "discard"))), "Leave the dataset")
    post("import", lambda body: {"id": operations.import_paths(studio, requests.texts(body, "paths"))}, "Bring pictures in")
    post("import-uploads", lambda body: {"id": operations.import_uploads(studio, requests.batch_name(body.get("batch")))},
         "Bring in what was sent")
    post("use", lambda _: studio.use(), "Save and train with the dataset")
    post("stop-task", lambda _: {"stopping": studio.tasks.stop()}, "Stop the work under way")


def _add_images(get: Callable[..., None], post: Callable[..., None], studio: Studio) -> None:
    post("pictures", lambda body: view.images(
        studio, _filtered(body), offset=requests.integer(body, "offset", default=0, low=0, high=10**9),
        limit=requests.integer(body, "limit", default=48, low=0, high=view.MOST_A_PAGE),
        sort=requests.text(body, "sort") or "name"), "A page of the gallery")
    get("thumb", lambda query: _image(studio.thumbnail(query.get("id", "")), keep=True), "A small picture")
    get("picture", lambda query: _image(studio.image(query.get("id", "")), keep=True), "A whole picture")
    post("remove", lambda body: {"removed": studio.remove(requests.texts(body, "ids"))}, "Take pictures out")


def _add_captions(get: Callable[..., None], post: Callable[..., None], studio: Studio) -> None:
    post("tags", lambda body: view.tags(studio, _filtered(body)), "Tags by frequency")
    post("edit", lambda body: {"changed": studio.edit(requests.table(body, "edit"), requests.selection(body))}, "Change captions")
    post("caption", lambda body: {"changed": studio.caption(requests.text(body, "id"), requests.text(body, "text"))},
         "Change one caption")
    post("undo", lambda _: {"label": studio.undo()}, "Take the last step back")
    post("redo", lambda _: {"label": studio.undo(again=True)}, "Do it again")
    post("save", lambda body: studio.save(overwrite=requests.switch(body, "overwrite")), "Write the captions")
    post("tokens", lambda body: dict(zip(("tokens", "chunks"), studio.tokens(requests.text(body, "text")), strict=True)),
         "Count tokens")
    get("tag-options", lambda _: {"options": view.tag_options()}, "What can be chosen when captioning")
    post("tag", lambda body: {"id": operations.tag(studio, requests.text(body, "source", required=True), requests.table(body, "options"),
                                             requests.selection(body))}, "Caption pictures")


def _add_shapes(get: Callable[..., None], post: Callable[..., None], studio: Studio) -> None:
    post("check", lambda body: {"id": operations.check(studio, requests.table(body, "settings"))}, "Look at the pictures")
    get("crops", lambda _: _image(shaping.crops(studio), keep=False), "What crops lose")
    post("shape-preview", lambda body: _image(
        shaping.preview(studio, requests.text(body, "id"), requests.table(body, "shape")), keep=False), "What a shape would make")
    post("shape", lambda body: {"id": operations.shape(studio, requests.table(body, "shape"), requests.selection(body))},
         "Cut and scale pictures")
    post("crop", lambda body: _nothing(shaping.crop_to_box(
        studio, requests.text(body, "id"), requests.numbers(body, "box", count=4))), "Cut a picture by hand")
    post("flip", lambda body: {"id": shaping.flip(studio, requests.text(body, "id"), copy=requests.switch(body, "copy"))}, "Mirror")
    post("split", lambda body: {"ids": shaping.split(
        studio, requests.text(body, "id"), tile=requests.integer(body, "tile", default=0, low=0, high=16384))}, "Split")
    get("mask", lambda query: _image(shaping.mask(studio, query.get("id", "")), keep=False), "What of a picture is learnt")
    post("remove-mask", lambda body: _nothing(shaping.remove_mask(studio, requests.text(body, "id"))), "Learn all of a picture")
    post("unshape", lambda body: shaping.unshape(studio, requests.texts(body, "ids")), "Bring pictures back as they were")


def _add_model(get: Callable[..., None], post: Callable[..., None], studio: Studio) -> None:
    post("check-captions", lambda body: {"id": model_operations.check(
        studio, requests.selection(body), seeds=requests.integer(body, "seeds", default=2, low=0, high=8),
        steps=requests.integer(body, "steps", default=20, low=1, high=150),
        worst=requests.integer(body, "worst", default=model_operations.MOST_GENERATED, low=0, high=10**6),
        values=requests.table(body, "settings"))}, "Are the captions right")
    get("checked", lambda query: _image(model_operations.generated(
        studio, query.get("id", ""), requests.number_text(query.get("n", "0"))), keep=False), "A picture painted from a caption")
    post("class-pictures", lambda body: {"id": model_operations.class_images(
        studio, prompts=requests.texts(body, "prompts"), size=requests.size(body, "size", default=512),
        count=requests.integer(body, "count", default=20, low=1, high=10_000),
        steps=requests.integer(body, "steps", default=20, low=1, high=150),
        cfg=float(requests.integer(body, "cfg", default=7, low=1, high=30)),
        seed=requests.integer(body, "seed", default=1, low=0, high=2**32 - 1))}, "Paint preservation pictures")


async def _upload(request: Request, studio: Studio) -> object:
    """One file of a heap."""
    batch, name = requests.batch_name(request.query_params.get("batch")), request.query_params.get("name", "")
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
    receiving: Receiving | None = None
    try:
        receiving = await run_in_threadpool(_begin, studio, batch, name, size)
        waiting = bytearray()
        async for part in parts:
            waiting += part
            if len(waiting) >= _PIECE:
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


def _filtered(body: Body) -> requests.Selection:
    return requests.Selection(None, requests.table(body, "filter"))


def _image(data: bytes, *, keep: bool) -> Response:
    """A picture of ours. Its address changes with it ("stamp"), so a browser may keep it for a while."""
    return Response(data, media_type=thumbs.MEDIA_TYPE, headers={
        "X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'; sandbox",
        "Cache-Control": "private, max-age=3600" if keep else "no-store"})


def _nothing(_: None) -> dict[str, Any]:
    return {}
