"""The texts that the page's scripts show, as templates: "{count} selected".

A text is a literal; those that a + joins are one text, and count(number, "picture") is two. What only a program reads is
told by its look and by what stands before it: names of classes, selectors, keys, addresses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_TOKEN = re.compile(r"""
    (?P<space>\s+|//[^\n]*|/\*.*?\*/)
  | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
  | (?P<template>`)
  | (?P<regex>(?<![\w)\]}"'`])/(?![*/ ])(?:[^/\\\n\[]|\\.|\[(?:[^\]\\\n]|\\.)*\])+/[a-z]*)
  | (?P<word>[\w$]+)
  | (?P<mark>.)
""", re.VERBOSE | re.DOTALL)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_NAME_OF_FIELD = re.compile(r"([A-Za-z_]\w*)\W*$")


def texts_of(path: Path) -> dict[str, int]:
    """template -> line of the first place."""
    source = path.read_text("utf-8")
    found: dict[str, int] = {}
    for text, start, before in _literals(source):
        if _shown(text, before):
            found.setdefault(text, source.count("\n", 0, start) + 1)
    for call in re.finditer(r"\bcount\([^\"\n]*?(\"[^;]*?\")\)", source):
        for noun in re.findall(r'"([^"]+)"', call[1]):
            found.pop(noun, None)
            for text in (f"1 {noun}", "{number} " + noun + "s"):
                found.setdefault(text, source.count("\n", 0, call.start()) + 1)
    return found


def _literals(source: str) -> Iterator[tuple[str, int, str]]:
    """(text, where, what stands before it) of each literal."""
    at, tokens, previous = 0, [], ""
    while at < len(source):
        found = _TOKEN.match(source, at)
        assert found is not None
        kind, text = str(found.lastgroup), found[0]
        if kind == "regex" and re.search(r"[\w)\]]$", previous):
            kind, text = "mark", text[0]
        start, at = at, at + len(text)
        if kind == "template":
            text, at, inner = _template(source, at)
            tokens.append((kind, text, start))
            tokens += [("inner", code, where) for code, where in inner]
        elif kind != "space":
            tokens.append((kind, text, start))
        previous = text if kind != "space" else previous
    yield from _in_one(tokens)


def _template(source: str, at: int) -> tuple[str, int, list[tuple[str, int]]]:
    """(the text with fields, where it ends, the code in its fields) of a template literal that begins before `at`."""
    text, inner, names = "", [], set()
    while source[at] != "`":
        if source.startswith("${", at):
            start = at = at + 2
            depth = 1
            while depth:
                found = _TOKEN.match(source, at)
                assert found is not None
                if found.lastgroup == "template":
                    _, at, _ = _template(source, at + 1)
                    continue
                depth += (found[0] == "{") - (found[0] == "}")
                at = found.end()
            code = source[start:at - 1]
            inner.append((code, start))
            name = _field(code)
            while name in names:
                name = re.sub(r"\d*$", lambda number: str(int(number[0] or 1) + 1), name, count=1)
            names.add(name)
            text += "{" + name + "}"
        else:
            length = 2 if source[at] == "\\" else 1
            text += _plain(source[at:at + length])
            at += length
    return text, at + 1, inner


def _field(code: str) -> str:
    """What a field is called: the last name in its expression, of a call the last one of what is called on."""
    bare = re.sub(r"\((?:[^()]|\([^()]*\))*\)", lambda call: call[0] if re.fullmatch(r"\([\w.]+\)", call[0]) else "", code)
    found = _NAME_OF_FIELD.search(bare)
    return found[1] if found else "value"


def _plain(text: str) -> str:
    return _ESCAPE.sub(lambda found: chr(int(found[1][1:], 16)) if len(found[1]) > 1 else
                       {"n": "\n", "t": "\t"}.get(found[1], found[1]), text)


def _in_one(tokens: list[tuple[str, str, int]]) -> Iterator[tuple[str, int, str]]:
    number = 0
    while number < len(tokens):
        kind, text, start = tokens[number]
        before = "".join(token[1] for token in tokens[max(0, number - 4):number])
        if kind == "string":
            whole = _plain(text[1:-1])
            while number + 2 < len(tokens) and tokens[number + 1][1] == "+" and tokens[number + 2][0] == "string":
                whole += _plain(tokens[number + 2][1][1:-1])
                number += 2
            yield whole, start, before
        elif kind == "template":
            yield text, start, before
        elif kind == "inner":
            for inner, where, earlier in _literals(text):
                yield inner, start + where, earlier
        number += 1


_TWO_WORDS = re.compile(r"[A-Za-z]{2,}[^\w\s]* +[^\w\s]*[A-Za-z({]|\} +[a-z]{2,}")
_WORD = re.compile(r"[A-Z][a-z+]+( [\w{}]+)*[?:.]?")
_CODE = re.compile(
    r"^[#.\[]|^(lts|ltr|lora-train|lora_train)\b|[<>=|]{2}|://|^[\w-]+: ?\w+$|^M\d|^use strict$|\[role|input|^\W+$")
_BEFORE = re.compile(r'(class:|closest\(|querySelector\w*\(|classList\.\w+\(|"data-\w+":|name===)$')


def _shown(text: str, before: str) -> bool:
    """Whether somebody may read it, and not only a program."""
    if before.endswith("translated") or before.endswith("translated("):
        return bool(re.search("[A-Za-z]{2}", text))
    if _CODE.search(text) or _BEFORE.search(before):
        return False
    return bool(_TWO_WORDS.search(text) or _WORD.fullmatch(text))
