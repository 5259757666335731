"""Captions in other encodings than UTF-8: as people write them, tags and sentences, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib_lora_train.dataset.text_files import Text, decode, read_text
from lib_lora_train.errors import DatasetError

CHINESE = ("zzk, 红色帽子", "1girl, 长发, 蓝眼睛", "一个女孩站在海边，穿着白色连衣裙", "白色背景", "杰作，最佳画质，高清",
           "水墨画", "樱花树下的少女", "特写，侧脸，逆光", "头发凌乱", "戒指，手链", "秋天的银杏树", "一辆红色跑车停在路边")
JAPANESE = ("zzk, 赤い帽子", "1girl, 長い髪, 青い目", "女の子が海辺に立っている、白いワンピース", "白背景", "着物、扇子",
            "ロボット", "桜の木の下の少女", "濡れた髪", "抱き枕", "赤い車が道端に止まっている", "初音ミク", "銀髪赤眼")
WESTERN = ("zzk, café", "une fille aux cheveux dorés, château à l’aube", "Mädchen, grüne Augen, weißes Kleid",
           "niña, montaña, árbol", "menina de olhos azuis, maçã", "Ølhus, blå himmel", "a woman’s hat, “quoted” – old",
           "30° angle", "très détaillé", "ÉTÉ", "île", "zzk’s hat")
RUSSIAN = ("zzk, красная шапка", "Девочка в белом платье у моря", "лес", "чёрно-белое фото")
KOREAN = ("zzk, 빨간 모자", "소녀가 바닷가에 서 있다, 하얀 원피스", "흰 배경", "수채화", "은행나무")
TRADITIONAL = ("zzk, 紅色帽子", "一個女孩站在海邊，穿著白色連身裙", "藍天白雲", "特寫，側臉", "頭髮凌亂")
NO_TEXT = b"caf\x81 \xff"


@pytest.mark.parametrize(("encoding", "name", "captions"), [
    ("gbk", "GBK", CHINESE), ("cp932", "Shift-JIS", JAPANESE), ("cp1252", "Windows-1252", WESTERN),
    ("cp1251", "Windows-1251", RUSSIAN), ("cp949", "EUC-KR", KOREAN), ("cp950", "Big5", TRADITIONAL)])
def test_each_caption_by_itself_is_read_in_its_encoding(encoding: str, name: str, captions: tuple[str, ...]) -> None:
    assert [decode(caption.encode(encoding)) for caption in captions] == [Text(caption, name) for caption in captions]


def test_koi8_is_not_taken_for_capitals_of_windows_1251() -> None:
    assert decode("Красные волосы, девушка".encode("koi8-r")) == Text("Красные волосы, девушка", "KOI8-R")
    assert decode("красные волосы".encode("koi8-r")) is None  # as well ЛТБУОЩЕ ЧПМПУЩ, which is no word but for people


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8", "utf-8-sig"])
def test_utf_16_is_read_with_and_without_a_mark(encoding: str) -> None:
    for caption in ("zzk, hat", "1girl, café", "红发, 女孩", "猫帽子", "赤い帽子、青い目", *JAPANESE[:3]):
        assert decode(caption.encode(encoding)) == Text(caption, "" if encoding.startswith("utf-8") else "UTF-16")
    assert decode("zzk, 猫".encode("iso2022_jp")) == Text("zzk, 猫", "ISO-2022-JP")


@pytest.mark.parametrize("caption", ["1girl", "solo", "b&w", ":d", "^_^", "2girls, 3:", "Bush hid the facts", "\x1b[0mred"])
def test_ascii_stays_what_it_is(caption: str) -> None:
    assert decode(caption.encode()) == Text(caption)


def test_bytes_of_which_nothing_is_clear_are_refused_by_name(tmp_path: Path) -> None:
    for data in (NO_TEXT, "龙".encode("gbk"), b"\xff\x81\x00", b"zzk\0hat"):
        (tmp_path / "a.txt").write_bytes(data)
        with pytest.raises(DatasetError, match=r"a\.txt is not UTF-8"):
            read_text(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"x" * (2 << 20))
    with pytest.raises(DatasetError, match="too large"):
        read_text(tmp_path / "a.txt")


def test_what_one_caption_leaves_open_the_others_of_the_folder_decide(tmp_path: Path) -> None:
    texts = [*CHINESE, "龙", "婚纱", "萌", "赤脚", "雀斑"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_bytes(text.encode("gbk"))
    (tmp_path / "other.txt").write_bytes("un café".encode("cp1252"))
    assert [read_text(tmp_path / f"{number}.txt") for number in range(len(texts))] == [Text(text, "GBK") for text in texts]
    assert read_text(tmp_path / "other.txt") == Text("un café", "Windows-1252")
