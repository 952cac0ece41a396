"""Makes the small tokenizers of this folder and the ids that Hugging Face's tokenizers gives to fixtures.json.

    pip install tokenizers && python make.py

Each is configured as the models of its family are; only the vocabulary is small and learnt from the standard library's
own documentation and the sentences below. What is committed was made so; other versions of Python give other files.
"""
import json
import pydoc_data.topics
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from texts import SENTENCES, random_texts

HERE = Path(__file__).parent

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPACE = "\u2581"


def special(content, **how):
    return AddedToken(content, special=True, normalized=False, **how)


def byte_level_trainer(size):
    return trainers.BpeTrainer(vocab_size=size, special_tokens=[], show_progress=False,
                               initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def byte_fallback_trainer(size):
    return trainers.BpeTrainer(vocab_size=size, show_progress=False, limit_alphabet=150,
                               special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)])


def llama3(train):
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    train(tokenizer, byte_level_trainer(900))
    tokenizer.add_special_tokens([special(t) for t in (
        "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
        "<|reserved_special_token_1|>", "<|reserved_special_token_10|>")])
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(add_prefix_space=True, trim_offsets=False, use_regex=True),
        processors.TemplateProcessing(single="<|begin_of_text|> $A",
                                      pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
                                      special_tokens=[("<|begin_of_text|>", bos)])])
    return tokenizer


def qwen2(train):
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    train(tokenizer, byte_level_trainer(900))
    tokenizer.add_special_tokens([special(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    # Qwen3 has tokens that are not special; the rest exercises what AddedToken can say.
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False),
                          AddedToken("caf\u00e9", normalized=True), AddedToken("<left>", lstrip=True, normalized=False),
                          AddedToken("<right>", rstrip=True, normalized=False),
                          AddedToken("word", single_word=True, normalized=False),
                          AddedToken("words", normalized=False)])
    return tokenizer


def gpt2(train):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    train(tokenizer, byte_level_trainer(600))
    tokenizer.add_special_tokens([special("<|endoftext|>")])
    return tokenizer


def byte_fallback_bpe():
    return models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def with_bos(tokenizer):
    # What the trainer was told to know from the start became added tokens; in the models' files only these three are.
    file = json.loads(tokenizer.to_str())
    file["added_tokens"] = [t for t in file["added_tokens"] if t["content"] in ("<unk>", "<s>", "</s>")]
    tokenizer = Tokenizer.from_str(json.dumps(file))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    return tokenizer


def llama2(train):
    """Llama 2 and Mistral 7B v0.1: spaces are replaced by a normalizer, and nothing splits the text."""
    tokenizer = Tokenizer(byte_fallback_bpe())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    # Learnt from words: whole texts as one word would take for ever.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(SPACE, behavior="merged_with_next")
    train(tokenizer, byte_fallback_trainer(1300))
    file = json.loads(tokenizer.to_str())
    file["pre_tokenizer"] = None
    return with_bos(Tokenizer.from_str(json.dumps(file)))


def metaspace(train, scheme, split, size):
    tokenizer = Tokenizer(byte_fallback_bpe())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=True)
    train(tokenizer, byte_fallback_trainer(size))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=split)
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=split)
    return tokenizer


def mistral(train):
    """Mistral v0.3 and Llama 2 as newer transformers writes it."""
    tokenizer = metaspace(train, "first", False, 1300)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return with_bos(tokenizer)


def metaspace_always(train):
    return with_bos(metaspace(train, "always", True, 900))


def metaspace_never(train):
    """Unknown characters are not fused, and some bytes have no token."""
    file = json.loads(metaspace(train, "never", False, 900).to_str())
    model = file["model"]
    model["fuse_unk"] = False
    known = [t for t in sorted(model["vocab"], key=model["vocab"].get) if not "<0xE2>" <= t <= "<0xEF>"]
    model["vocab"] = {token: i for i, token in enumerate(known)}
    file["added_tokens"] = file["added_tokens"][:3]
    return with_bos(Tokenizer.from_str(json.dumps(file)))


MAKERS = {"llama3": llama3, "qwen2": qwen2, "gpt2": gpt2, "llama2": llama2, "mistral": mistral,
          "metaspace_always": metaspace_always, "metaspace_never": metaspace_never}


def corpus():
    topics = [line for topic in pydoc_data.topics.topics.values() for line in topic.splitlines()]
    return topics[:4000] + SENTENCES * 4


def compact(tokenizer):
    """The file without indentation, and merges as "a b" in the older form for some."""
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":")) + "\n"


def old_merges(text):
    file = json.loads(text)
    file["model"]["merges"] = [" ".join(pair) for pair in file["model"]["merges"]]
    return json.dumps(file, ensure_ascii=False, separators=(",", ":")) + "\n"


def main():
    lines = corpus()
    texts = SENTENCES + random_texts(random.Random(1), 60)
    fixtures = {"texts": texts, "ids": {}, "decoded": {}}  # decoded: of the first few
    for name, make in MAKERS.items():
        tokenizer = make(lambda t, trainer: t.train_from_iterator(lines, trainer))
        text = compact(tokenizer)
        if name in ("llama3", "llama2"):
            text = old_merges(text)
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        read = Tokenizer.from_file(str(folder / "tokenizer.json"))
        ids = [read.encode(t).ids for t in texts]
        fixtures["ids"][name] = ids
        fixtures["decoded"][name] = [read.decode(i, skip_special_tokens=False) for i in ids[:len(SENTENCES)]]
    (HERE / "fixtures.json").write_text(json.dumps(fixtures, ensure_ascii=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
