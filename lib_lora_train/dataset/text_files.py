"""Text files in any encoding that captions are found in. UTF-8, UTF-16 with a mark and ISO-2022-JP are certain.

The others are guessed from what the bytes spell: captions are too short for statistics of bytes (charset-normalizer read 7 of 28
short Chinese ones right), but they speak of pictures, and few words of that kind come out by chance.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from lib_lora_train.errors import DatasetError

MOST_BYTES = 1 << 20  # of one caption file: a larger one is a mistake and stays as it is
CAPTION_SUFFIXES = (".txt", ".caption")
_SIBLINGS = 200  # files of a folder that are asked for their encoding
_LEAST, _AHEAD = 0.3, 0.2  # of the score that the best reading must have, and be before the next

_BOTH_CHINESE = ("的一在有是女男孩子少短白黑灰金色大小眼睛身手嘴耳胸背肩上下左右前外中高低穿戴衣服衫帽坐躺走跑看向笑抱拿持三天空海水山花草木林城市街道房屋床椅桌"
                 "日月光夜晚春夏秋冬雨雪星火照片美可最佳作精特近全半正面角物狗兔狐刀老年古代校生制毛甲士服室河湖石傘")
# Of each encoding: its name, the first bytes of its frequent letters, and letters that captions of images are full of.
_SCRIPTS = {
    "gb18030": ("GBK", (0xB0, 0xD7), _BOTH_CHINESE + (
        "个人长发红蓝绿黄紫粉银头脚腿脸里后着裙裤鞋袜带镜站双单两风景云树叶内窗门阳影背简写真实画动漫丽爱质量杰细侧视图像猫鸟马龙鱼剑枪书车船机轻学铠骑伞旗袍装机器")),
    "cp950": ("Big5", (0xA4, 0xC6), _BOTH_CHINESE + (
        "個人長髮紅藍綠黃紫粉銀頭腳腿臉裡後著裙褲鞋襪帶鏡站雙單兩風景雲樹葉內窗門陽影背簡寫真實畫動漫麗愛質量傑細側視圖像貓鳥馬龍魚劍槍書車船機輕學鎧騎旗袍裝器")),
    "cp932": ("Shift-JIS", (0x82, 0x97), "".join(map(chr, range(0x3041, 0x30FD))) + (
        "一人女男少長短髪紅赤白黒青緑黄紫灰金銀色大小目眼頭身手足腿顔口耳胸背上下左右前後外中高低着服帽靴鏡立座走見向笑抱持双単両三風景天空雲海水山花草木葉城"
        "街室内窓門机日月光影夜晩春夏秋冬雨雪星火写真実画動美質最高傑作細特近全半正横面角図物犬猫鳥馬龍竜魚兎狐刀剣銃書車船機老年古代校学生制毛鎧桜和本")),
    "cp949": ("EUC-KR", (0xB0, 0xC8), (
        "가개거검게결경고곡과관교구귀그금기긴길까꽃나날남내네녀년노녹눈는늘다단달대도동두드들등라람랑래레로록를름리마말망매머면모목무문물미바반발밤밝밭배백벚벽별보복본부"
        "분붉비빛빨뿔사산살상새색생서선성세소속손수숲스시신실아안않앉애야양어얼에여연염영예오옷와외왼용우운원위유으은을음의이인일입있자작잔장재전점정제조주중지진집짧창"
        "채책천청체초최치카코크큰타탁터토투트티파판팔퍼편포푸품풍피하한할해햇헤현형호화환황회후흐흰힐")),
}
_SCRIPTS["utf-16-le"] = _SCRIPTS["utf-16-be"] = ("UTF-16", (0, 0), "".join(letters for _, _, letters in _SCRIPTS.values()))
_ALPHABETS = {"cp1252": ("Windows-1252", re.compile("[A-Za-zÀ-ÏÑ-ÖØ-Üß-ïñ-öø-üÿŒœŠšŽž]+")),
              "cp1251": ("Windows-1251", re.compile("[А-яЁё]+"))}
_PUNCTUATION = re.compile(  # of alphabets, where it stands as in a sentence
    r"(?<!\w)[“‘«„¡¿©](?=[\w\s])|(?<=[\w\s.,!?…])[”’»…°²½®™](?!\w)|(?<=\w)[’–—·](?=\w)|(?<= )[–—•·](?= )|\xa0")
_SIGNS = re.compile("[\x00-\x7f\u3000-\u303f\u30fb\u30fc\uff00-\uff20\uff5e“”‘’…—·]+")


class Text(NamedTuple):
    """What a file says, and the encoding's name where it is another than UTF-8."""

    text: str
    encoding: str = ""


def read_text(path: Path, *, most_bytes: int = MOST_BYTES) -> Text:
    """The text of a file, a mark at its beginning left out. Where its bytes are ambiguous, the other caption files of its
    folder decide.

    Raises DatasetError naming the file if nothing fits, if it is too large, or cannot be read.
    """
    try:
        if path.stat().st_size > most_bytes:
            raise DatasetError(f"The file {path} is too large for a caption", why=f"it holds over {most_bytes >> 10} KiB")
        data = path.read_bytes()
        found, usual = decode(data), ""
        if found is None or found.encoding not in ("", "UTF-16", "ISO-2022-JP"):
            usual = _usual_encoding(path.parent, path.parent.stat().st_mtime_ns)
    except OSError as error:
        raise DatasetError(f"The caption file {path} cannot be read", why=str(error)) from error
    fitting = [Text(text, name) for score, text, name in _readings(data) if name == usual and score > 0] if usual else []
    if not fitting and found is None:
        raise DatasetError(
            f"The caption file {path} is not UTF-8 text", why="nor is it clear which other encoding it has",
            remedy="save it again with the encoding UTF-8")
    return [*fitting, found][0]


def decode(data: bytes) -> Text | None:
    """Bytes as text; None where no encoding fits, or several."""
    for encoding in (_told_encoding(data), "utf-8-sig"):
        for text in _decoded(data, encoding):
            if "\0" not in text:
                return Text(text, {"utf-8-sig": "", "iso2022_jp": "ISO-2022-JP"}.get(encoding, "UTF-16"))
    best = _readings(data)[:2]
    if not best or best[0][0] < _LEAST or len(best) > 1 and best[0][0] - best[1][0] < _AHEAD:
        return None
    return Text(*best[0][1:])


def _readings(data: bytes) -> list[tuple[float, str, str]]:
    """(score up to 1, text, encoding's name) of every encoding that the bytes could be, the best first, each text once."""
    found: dict[str, tuple[float, str]] = {}
    for encoding, (name, _, _) in _SCRIPTS.items():
        for text in _decoded(data, encoding):
            if foreign := _SIGNS.sub("", text):
                common = sum(_weight(letter, encoding) for letter in foreign) / len(foreign)
                found[text] = max(found.get(text, (-1.0, "")), (common, name))
    for encoding, (name, alphabet) in _ALPHABETS.items():
        for text in _decoded(data, encoding):
            rest = _PUNCTUATION.sub("", text)
            words = re.findall(r"[^\W\d_]+", text)
            foreign = [word for word in words if not word.isascii()]
            if ("\0" not in text and all(letter.isascii() or letter.isalpha() for letter in rest)
                    and all(_is_word(word, alphabet) for word in foreign)
                    and (encoding == "cp1252" or max(map(len, foreign), default=0) > 1)):
                found.setdefault(text, (1.0, name))
    return sorted(((score, text, name) for text, (score, name) in found.items()), reverse=True)


def _decoded(data: bytes, encoding: str) -> Iterator[str]:
    try:
        yield data.decode(encoding)
    except UnicodeDecodeError:
        pass


def _weight(letter: str, encoding: str) -> float:
    _, (first, last), letters = _SCRIPTS[encoding]
    if letter in letters:
        return 1.0
    data = letter.encode(encoding)
    return 0.1 if first <= data[0] <= last and len(data) == 2 else -1.0


def _is_word(word: str, alphabet: re.Pattern[str]) -> bool:
    """Whether a word has letters of one alphabet, capitals where words have them, and not accents throughout."""
    return (alphabet.fullmatch(word) is not None and (word.islower() or word.istitle() or word.isupper())
            and (len(word) == 1 or min(word) > "\u0400" or re.search("[a-zA-Z]", word) is not None)
            and re.search("[\x80-\u0400]{3}", word) is None)


def _told_encoding(data: bytes) -> str:
    """The encoding that marks or zero bytes tell. Chinese and Japanese in UTF-16 can be ASCII as well: then there are no words in
    it, but frequent letters one and all."""
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    no_words = data.isascii() and len(data) > 3 and not re.search(rb"[ ,]|[A-Za-z]{3}", data)
    for encoding, high_bytes in (("utf-16-le", data[1::2]), ("utf-16-be", data[::2])):
        if 2 * high_bytes.count(0) > len(high_bytes) or no_words and any(
                set(text) <= set(_SCRIPTS[encoding][2]) for text in _decoded(data, encoding)):
            return encoding
    return "iso2022_jp" if b"\x1b" in data else "utf-8-sig"


@lru_cache(maxsize=8)
def _usual_encoding(folder: Path, changed: int) -> str:
    """The name of the encoding that most caption files of a folder have which are not UTF-8; "" where none has more than half.

    `changed` is the folder's time of change: a folder that is as it was is not asked again.
    """
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in CAPTION_SUFFIXES and not path.is_symlink()]
    found = (decode(path.read_bytes()) for path in files[:_SIBLINGS] if path.stat().st_size <= MOST_BYTES)
    votes = Counter(text.encoding if text else "" for text in found if text is None or text.encoding)
    return next((name for name, count in votes.most_common(1) if 2 * count > votes.total()), "")
