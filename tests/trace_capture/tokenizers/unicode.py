"""Measures by which version of Unicode Hugging Face's tokenizers splits and composes text, and prints the two lists
that trace_capture/text makes up for: kAdded (unicode_additions.cpp) and kNewerMarks (normalize.cpp).

    pip install tokenizers unicodedata2 && python unicode.py

unicodedata2 should know a newer Unicode than everything else here.
"""
import ctypes
import ctypes.util
import unicodedata2 as unicodedata

from tokenizers import Regex
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import Split

CATEGORIES = "Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Co".split()
CHARACTERS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def categories_of_tokenizers():
    """Each category asked for: everything else is removed from a text of all characters."""
    text = "".join(CHARACTERS)
    found = {}
    for name in CATEGORIES:
        split = Split(Regex(r"(?!\p{%s})[\s\S]" % name), "removed")
        for piece, _ in split.pre_tokenize_str(text):
            found.update(dict.fromkeys(piece, name))
    return found


def categories_of_pcre2():
    pcre2 = ctypes.CDLL(ctypes.util.find_library("pcre2-8"))
    pcre2.pcre2_compile_8.restype = ctypes.c_void_p
    pcre2.pcre2_match_data_create_8.restype = ctypes.c_void_p
    utf, ucp = 0x00080000, 0x00020000
    match = ctypes.c_void_p(pcre2.pcre2_match_data_create_8(1, None))
    encoded = [c.encode() for c in CHARACTERS]
    found = {}
    for name in CATEGORIES:
        pattern = (r"\p{%s}" % name).encode()
        error, offset = ctypes.c_int(), ctypes.c_size_t()
        code = pcre2.pcre2_compile_8(pattern, ctypes.c_size_t(len(pattern)), utf | ucp, ctypes.byref(error),
                                     ctypes.byref(offset), None)
        pcre2.pcre2_jit_compile_8(ctypes.c_void_p(code), 1)
        for character, text in zip(CHARACTERS, encoded):
            if character not in found and pcre2.pcre2_match_8(ctypes.c_void_p(code), text, ctypes.c_size_t(len(text)),
                                                              ctypes.c_size_t(0), 0, match, None) > 0:
                found[character] = name
    return found


def ranges(pairs):
    """(character, value) ascending -> [first, last, value] of neighbours with the same value."""
    merged = []
    for character, value in pairs:
        c = ord(character)
        if merged and merged[-1][1] == c - 1 and merged[-1][2] == value:
            merged[-1][1] = c
        else:
            merged.append([c, c, value])
    return merged


def newer_marks():
    """What newer versions reorder or compose and tokenizers does not know at all."""
    compose = NFC().normalize_str

    def is_mark_to_tokenizers(c):
        # A known mark changes places with one of a higher class before it or of a lower class behind it.
        return compose("a\u0345" + c) != "a\u0345" + c or compose("a" + c + "\u0334") != "a" + c + "\u0334"

    newer = set()
    for c in CHARACTERS:
        if unicodedata.combining(c) != 0 and not is_mark_to_tokenizers(c):
            newer.add(c)
        decomposition = unicodedata.normalize("NFD", c)
        if decomposition != c and compose(c) == c and compose(decomposition) != unicodedata.normalize("NFC", c):
            newer.add(c)
            # The first part is the newer one where the second has long been a mark.
            newer.add(decomposition[0] if is_mark_to_tokenizers(decomposition[1]) else decomposition[1])
    return sorted(newer)


def main():
    tokenizers, pcre2 = categories_of_tokenizers(), categories_of_pcre2()
    print("// kAdded")
    for first, last, category in ranges((c, tokenizers[c]) for c in CHARACTERS if c in tokenizers and c not in pcre2):
        print(f'    {{0x{first:05X}, 0x{last:05X}, "{category}"}},')
    other = [(f"U+{ord(c):04X}", pcre2[c], tokenizers.get(c)) for c in CHARACTERS
             if c in pcre2 and pcre2[c] != tokenizers.get(c)]
    print("// other category:", *other)
    print("// kNewerMarks")
    for first, last, _ in ranges((c, None) for c in newer_marks()):
        print(f"    {{0x{first:05X}, 0x{last:05X}}},")


if __name__ == "__main__":
    main()
