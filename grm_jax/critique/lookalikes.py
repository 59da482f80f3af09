"""Characters that a reader does not see, or takes for other ones.

A section marker that is written with them looks like the template's own to a person, and may to a
model; a plain search for the marker passes it over. `skeleton` gives the text that a reader sees,
after the idea of Unicode's Technical Standard 39, for the letters and signs of section markers.
"""

from __future__ import annotations

import functools
import unicodedata

# Shown as nothing: Unicode's default-ignorable code points that are not of category Cf, and the
# controls that are no white space.
INVISIBLE = frozenset(
    [
        *(chr(code) for code in (*range(0x00, 0x09), *range(0x0E, 0x1C), *range(0x7F, 0x85))),
        *(chr(code) for code in range(0x86, 0xA0)),
        *"\u115f\u1160\u17b4\u17b5\u2065\u3164\uffa0",
        *(chr(code) for code in range(0xFFF0, 0xFFF9)),
    ]
)
BLANK = "\u2800"  # braille without dots: a space to the eye, no white space to Unicode

# plain letter or sign: what looks like it. Capitals and small letters, as their shapes differ:
# Cyrillic "В" is a B, its small letter "в" is not a b.
_SHAPES = {
    "a": "АаΑαɑᴀ", "b": "ВΒЬʙ", "c": "СсϹϲᴄ", "d": "ԁᴅ", "e": "ЕеΕᴇ", "f": "ꜰϜ", "g": "ɡԌɢ",
    "h": "НΗһҺʜ", "i": "ІіΙιıɪӀ", "j": "ЈјͿϳ", "k": "КкΚκᴋ", "l": "ʟӏ", "m": "МмΜᴍ", "n": "Νɴոп",
    "o": "ОоΟοօᴏ", "p": "РрΡρᴘ", "q": "Ԛԛ", "r": "ʀг", "s": "Ѕѕꜱ", "t": "ТтΤτᴛ", "u": "υսᴜ",
    "v": "νѵᴠ", "w": "Ԝԝᴡ", "x": "ХхΧχ", "y": "УуΥγʏ", "z": "Ζᴢ", "#": "♯⌗",
}  # fmt: skip
LOOKALIKES = {shape: plain for plain, shapes in _SHAPES.items() for shape in shapes}


@functools.lru_cache(maxsize=4096)
def plain_form(character: str) -> str:
    """One character as it is read: lower case, without accents, of the basic alphabet where it
    looks like a letter of it; "" where nothing is seen. Never more than one character."""
    if unicodedata.category(character) in ("Cf", "Mn", "Me") or character in INVISIBLE:
        return ""
    if character == BLANK:
        return " "
    if character in LOOKALIKES:
        return LOOKALIKES[character]
    whole = unicodedata.normalize("NFKD", character)
    seen = "".join(c for c in whole if unicodedata.category(c) not in ("Cf", "Mn", "Me"))
    # Only one-to-one: a ligature that stands for two characters cannot be split by a backslash,
    # and no marker needs one.
    for form in (seen, character):
        if len(form.lower()) == 1:
            return LOOKALIKES.get(form, form.lower())
    return character


def skeleton(text: str) -> tuple[str, list[int] | None]:
    """The text as it is read (`plain_form`), and for each of its characters the position in `text`;
    None for the same positions."""
    if text.isascii() and (text.isprintable() or INVISIBLE.isdisjoint(text)):
        return text.lower(), None
    forms, origin = [], []
    for position, character in enumerate(text):
        form = plain_form(character)
        if form:
            forms.append(form)
            origin.append(position)
    return "".join(forms), origin
