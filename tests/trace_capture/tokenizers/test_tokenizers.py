"""Every tokenizer of this folder against Hugging Face's tokenizers on random texts: ids and the text they decode to.

Runs where that package is installed; ctest tells where the program to test lies. By hand, on more texts and on any
folder with a tokenizer.json:

    KVREPLAY_TOKENIZE=build/release/tests/trace_capture/tokenizers/tokenize \\
        python test_tokenizers.py [--texts 20000] [--seed 0] [FOLDER...]
"""
import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from texts import SENTENCES, random_texts

HERE = Path(__file__).parent
NAMES = sorted(path.parent.name for path in HERE.glob("*/tokenizer.json"))


def ours(folder, texts, *options):
    run = subprocess.run([os.environ["KVREPLAY_TOKENIZE"], str(folder), *options], input=json.dumps(texts).encode(),
                         capture_output=True, check=False)
    assert run.returncode == 0, run.stderr.decode()
    out = json.loads(run.stdout)
    return out["ids"], out["texts"]


def differences(folder, texts):
    """What tokenizers makes of the texts where we do otherwise: (text, kind, theirs, ours)."""
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    found = []
    for add_special in (True, False):
        ids, decoded = ours(folder, texts, *([] if add_special else ["--plain"]))
        for text, our_ids, our_text in zip(texts, ids, decoded):
            their_ids = reference.encode(text, add_special_tokens=add_special).ids
            if their_ids != our_ids:
                found.append((text, "ids", their_ids, our_ids))
            elif (their_text := reference.decode(our_ids, skip_special_tokens=False)) != our_text:
                found.append((text, "decoded", their_text, our_text))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_same_ids_as_hugging_face(name):
    pytest.importorskip("tokenizers", reason="pip install tokenizers")
    assert differences(HERE / name, SENTENCES + random_texts(random.Random(2), 1000)) == []


def split(pattern, behavior, invert=False, kind="Regex"):
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
          r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LETTERS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
# What else a file may say: (tokenizer, part of the file, value).
VARIANTS = [("llama3", "pre_tokenizer", {"type": "Sequence", "pretokenizers": [step, LETTERS]}) for step in (
    split(TEKKEN, "Isolated"),
    split(r"\p{L}+|\p{N}{,2}", "Removed"),
    split(r"\p{L}+|\p{N}{2,}", "Removed", invert=True),
    split(r"[\s\p{P}]", "MergedWithPrevious"),
    split(r"[\s\p{P}]", "MergedWithNext"),
    split(r"[\s\p{P}]", "Contiguous"),
    split(r"\S", "Contiguous", invert=True),
    split(r"(?<=\s)\P{L}+?|(?:a|e|i|o|u){2}|(?>\D+)|.", "Isolated"),
    split(r"(?i:the|of|n't)\b".replace(r"\b", "(?=\\s)"), "Isolated"),
    split(r"\.*", "Isolated"),
    split(".", "MergedWithPrevious", kind="String"),
    split("the", "Isolated", kind="String"),
    {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first", "split": True},
    {"type": "Digits", "individual_digits": True},
    {"type": "Digits", "individual_digits": False},
)] + [
    ("gpt2", "pre_tokenizer", dict(LETTERS, add_prefix_space=False, use_regex=True)),
    ("gpt2", "pre_tokenizer", None),
    ("gpt2", "decoder", None),
    ("qwen2", "normalizer", {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "the"}, "content": "e\u0301"}, {"type": "NFC"}]}),
    ("qwen2", "normalizer", {"type": "Prepend", "prepend": "w"}),
    ("llama2", "pre_tokenizer", split("\u2581", "MergedWithNext", kind="String")),
    ("llama2", "normalizer", {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}),
    ("llama2", "decoder", {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}),
    ("llama2", "decoder", {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": True}),
    ("llama2", "decoder", {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "\u2581"},
                                                            "content": " "}, {"type": "ByteFallback"}]}),
    ("mistral", "pre_tokenizer", {"type": "Sequence", "pretokenizers": [
        split(",", "Isolated", kind="String"),
        {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}]}),
    ("mistral", "added_tokens", [
        {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True,
         "special": i != 2} for i, content in enumerate(("<unk>", "<s>", "</s>"))]),
    ("llama2", "added_tokens", [
        {"id": i, "content": content, "single_word": i == 0, "lstrip": i == 1, "rstrip": i == 2, "normalized": True,
         "special": i != 2} for i, content in enumerate(("<unk>", "<s>", "</s>"))]),
    ("mistral", "post_processor", {
        "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                   {"SpecialToken": {"id": "y", "type_id": 0}}],
        "special_tokens": {"x": {"id": "x", "ids": [1, 7], "tokens": ["<s>", "x"]},
                           "y": {"id": "y", "ids": [2], "tokens": ["</s>"]}}}),
]


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_what_else_a_file_may_say(variant, tmp_path):
    pytest.importorskip("tokenizers", reason="pip install tokenizers")
    name, part, value = VARIANTS[variant]
    file = json.loads((HERE / name / "tokenizer.json").read_text(encoding="utf-8"))
    file[part] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    assert differences(tmp_path, SENTENCES + random_texts(random.Random(3), 300)) == []


def test_there_are_tokenizers():
    assert len(NAMES) >= 7


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("folders", nargs="*", default=[HERE / name for name in NAMES])
    args = parser.parse_args()
    total = 0
    for folder in args.folders:
        texts = SENTENCES + random_texts(random.Random(args.seed), args.texts)
        found = differences(folder, texts)
        total += len(found)
        print(f"{Path(folder).name}: {len(texts)} texts, {sum(map(len, texts))} characters, {len(found)} differences")
        for text, kind, theirs, our in found[:5]:
            print(f"  {ascii(text)}\n    {kind} tokenizers {ascii(theirs)}\n    {kind} kvreplay   {ascii(our)}")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
